"""Exactly the bytes that clients received, as a run has kept them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedveil.audit.manifest import Manifest
from fedveil.errors import AuditError, FedveilError
from fedveil.masking import Release
from fedveil.quantization import QuantizedTensor
from fedveil.schemes.client import UNIT_PREFIX
from fedveil.selection import Selection
from fedveil.units import UnitGroup
from fedveil.wire import Dense, Message, UnitIndex

__all__ = ["Evidence", "Kept", "OvershownError", "Proxy"]

_ROUND = re.compile(r"round-(\d{6})")
_FILE = re.compile(r"(.+)\.([a-z]+)\.safetensors")


class OvershownError(AuditError):
    """A message has more in it than the units that it says it releases."""


@dataclass(frozen=True, order=True)
class Kept:
    """One message on disk.

    Attributes:
        round: From 1.
        client: Who was sent it, or sent it.
        kind: "proxy" on the way down, "update" on the way up; of anything else fedveil sends none.
        path: Where it is.
    """

    round: int
    client: str
    kind: str
    path: Path

    def read(self) -> Message:
        """The message, checked.

        Raises:
            AuditError: It cannot be read, was altered, or is not the one that the file's name says.
        """
        try:
            message = Message.from_bytes(self.path.read_bytes())
        except OSError as error:
            raise AuditError(
                "A kept message cannot be read", found=str(error), where=str(self.path)
            ) from error
        except FedveilError as error:
            raise AuditError(
                "A kept message is damaged or was altered",
                found=str(error),
                where=str(self.path),
                fix="An audit is of the bytes that were sent: restore the file, or run again.",
            ) from error
        found = (message.kind, message.round, message.client)
        if found != (self.kind, self.round, self.client):
            raise AuditError(
                "A kept message is not the one that its name says",
                expected=f"{self.kind} of round {self.round} and client {self.client}",
                found="{} of round {} and client {}".format(*found),
                where=str(self.path),
            )
        return message


class Proxy:
    """What one message shows of a model.

    Args:
        message: What a client was sent.
        manifest: Of the run that it belongs to.

    Attributes:
        released: Per unit group that is cut, its released units.
        selection: Which elements of which tensor these are.

    Raises:
        AuditError: It is of another architecture.
        OvershownError: It has more in it than the released units.
    """

    def __init__(self, message: Message, manifest: Manifest) -> None:
        self.round, self.client = message.round, message.client
        self._sections = message.sections
        # The server may leave out a group: then nothing of it is cut.
        self.groups = [g for g in manifest.groups if UNIT_PREFIX + g.name in message.sections]
        self.released = {group.name: self._release(group) for group in self.groups}
        self._shapes = {name: torch.Size(info.shape) for name, info in manifest.tensors.items()}
        self.selection = Selection(self.groups, self.released, self._shapes)
        self._check_tensors()

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors of which it shows something."""
        return [name for name in self._sections if not name.startswith(UNIT_PREFIX)]

    def part(self, name: str) -> Tensor:
        """What is released of a tensor, decoded, at its released shape.

        Factors that make a proxy unbiased travel beside the values and are not applied. All is NaN
        of a tensor that was left out.
        """
        section = self._sections.get(name)
        if section is None:
            return torch.full(self.selection.shape(name, self._shapes[name]), torch.nan)
        assert isinstance(section, QuantizedTensor | Dense)
        return section.dequantize() if isinstance(section, QuantizedTensor) else section.tensor

    def whole(self, name: str) -> Tensor:
        """A tensor at its whole shape, float32: NaN where this proxy shows nothing of it."""
        return self.spread(name, self.part(name).float())

    def spread(self, name: str, part: Tensor) -> Tensor:
        """Values at a tensor's released shape, put where they belong; NaN elsewhere."""
        dtype = torch.float64 if part.dtype == torch.float64 else torch.float32
        whole = torch.full(self._shapes[name], torch.nan, dtype=dtype)
        self.selection.scatter(name, part, whole)
        return whole

    def shows(self, name: str) -> Tensor:
        """Which elements of a tensor it shows: bool, whole shape."""
        shape = self._shapes[name]
        if name not in self._sections:
            return torch.zeros(shape, dtype=torch.bool)
        if not self.selection.positions(name):
            return torch.ones(shape, dtype=torch.bool)
        return self.selection.released(name, shape).bool()

    def interval(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Between which values the released part of a tensor lies; None if it is exact."""
        section = self._sections.get(name)
        return section.interval() if isinstance(section, QuantizedTensor) else None

    def bits(self, name: str) -> int:
        """Bits in which each released value of a tensor travels, scales not counted."""
        section = self._sections[name]
        if isinstance(section, QuantizedTensor):
            return section.bits
        assert isinstance(section, Dense)
        return 8 * section.tensor.element_size()

    def _release(self, group: UnitGroup) -> Release:
        section = self._sections[UNIT_PREFIX + group.name]
        if not isinstance(section, UnitIndex) or section.size != group.size:
            raise self._foreign(f"{group.size} units", "another number", group.name)
        return Release(section.released, section.scale)

    def _check_tensors(self) -> None:
        shapes = self._shapes
        # A backbone that is sent once is left out later on.
        if not shapes.keys() & set(self.tensors):
            raise self._foreign("the run's tensors", "none of them", next(iter(shapes), "the run"))
        if unknown := sorted(set(self.tensors) - shapes.keys()):
            raise self._overshown("the model's tensors alone", "another section", unknown[0])
        for name, full in shapes.items():
            section = self._sections.get(name)
            if section is None:
                continue
            if not isinstance(section, QuantizedTensor | Dense):
                raise self._foreign("a tensor", type(section).__name__, name)
            if isinstance(section, QuantizedTensor):
                shape = section.shape
            else:
                shape = tuple(section.tensor.shape)
            if shape != (expected := tuple(self.selection.shape(name, full))):
                more = math.prod(shape) > math.prod(expected)
                raise (self._overshown if more else self._foreign)(
                    f"{list(expected)}", f"{list(shape)}", name
                )

    def _overshown(self, expected: str, found: str, where: str) -> OvershownError:
        return OvershownError(
            f"The proxy of client {self.client} in round {self.round} shows more than the units "
            "that it releases",
            expected=expected,
            found=found,
            where=where,
            fix="Release nothing more with this scheme.",
        )

    def _foreign(self, expected: str, found: str, where: str) -> AuditError:
        return AuditError(
            f"The proxy of client {self.client} in round {self.round} is of another architecture",
            expected=expected,
            found=found,
            where=where,
            fix="Audit messages with the run.json of their own run.",
        )


class Evidence:
    """The messages of a run, in the order of rounds.

    Args:
        folder: The run folder; messages are in ``messages``, where ``keep_messages`` puts them.

    Raises:
        AuditError: No message was kept.
        CheckpointError: It is not the folder of a run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self._kept = sorted(_find(self.folder / "messages"))
        if not any(kept.kind == "proxy" for kept in self._kept):
            raise AuditError(
                "The run has kept no messages",
                expected=f"messages in {self.folder / 'messages'}",
                where=str(self.folder),
                fix="Run it with keep_messages=True ([federation] keep_messages in its file).",
            )

    @property
    def unread(self) -> list[Path]:
        """Files among the messages whose names are not those of messages: nobody reads them."""
        known = {kept.path for kept in self._kept}
        found = (self.folder / "messages").rglob("*")
        return sorted(path for path in found if path.is_file() and path not in known)

    @property
    def clients(self) -> list[str]:
        """All clients that were sent a proxy, sorted."""
        return sorted({kept.client for kept in self._kept if kept.kind == "proxy"})

    @property
    def rounds(self) -> list[int]:
        """All rounds in which proxies were sent, ascending."""
        return sorted({kept.round for kept in self._kept if kept.kind == "proxy"})

    def proxies(self, clients: Collection[str] | None = None) -> list[Kept]:
        """What some clients were sent, oldest first; by default what all were."""
        return self._of_kind("proxy", clients)

    def down(self) -> list[Kept]:
        """Everything that was sent to clients, of whatever kind."""
        return [kept for kept in self._kept if kept.kind != "update"]

    def updates(self, clients: Collection[str] | None = None) -> list[Kept]:
        """What some clients returned, oldest first."""
        return self._of_kind("update", clients)

    def open(self, kept: Kept) -> Proxy:
        """What a kept proxy shows."""
        return Proxy(kept.read(), self.manifest)

    def _of_kind(self, kind: str, clients: Collection[str] | None) -> list[Kept]:
        return [
            kept
            for kept in self._kept
            if kept.kind == kind and (clients is None or kept.client in clients)
        ]


def _find(folder: Path) -> list[Kept]:
    found = []
    for path in sorted(folder.glob("*/*.safetensors")):
        rounds, file = _ROUND.fullmatch(path.parent.name), _FILE.fullmatch(path.name)
        if rounds and file:
            found.append(Kept(int(rounds[1]), file[1], file[2], path))
    return found
