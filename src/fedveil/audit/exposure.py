"""What clients have been shown of the model so far: the accountant of the model's privacy."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedveil.audit.evidence import Proxy
from fedveil.audit.manifest import Manifest
from fedveil.errors import CheckpointError
from fedveil.masking import Release
from fedveil.selection import Selection
from fedveil.wire import Message

__all__ = ["Exposure", "Shown"]

NAME = "exposure.jsonl"


@dataclass(frozen=True)
class Shown:
    """What one release shows, without its values: the same for all clients who share a mask.

    Attributes:
        units: Per unit group that is cut, which units: bool [units]. A group that is missing is
            shown whole.
        bits: Per tensor, bits of each value, scales not counted.
    """

    units: Mapping[str, np.ndarray]
    bits: Mapping[str, int]

    @classmethod
    def of(cls, proxy: Proxy) -> Shown:
        """What a proxy shows."""
        units = {}
        for group in proxy.groups:
            units[group.name] = np.zeros(group.size, bool)
            units[group.name][proxy.released[group.name].units.numpy()] = True
        return cls(units, {name: proxy.bits(name) for name in proxy.tensors})

    def __or__(self, other: Shown) -> Shown:
        """What both show together."""
        units = {
            name: mask | other.units[name]
            for name, mask in self.units.items()
            if name in other.units
        }
        bits = {
            name: max(self.bits.get(name, 0), other.bits.get(name, 0))
            for name in {**self.bits, **other.bits}
        }
        return Shown(units, bits)

    def to_json(self) -> dict[str, Any]:
        """Plain values: bitmaps in base64, least significant bit first."""
        return {
            "units": {
                name: base64.b64encode(np.packbits(mask, bitorder="little").tobytes()).decode()
                for name, mask in self.units.items()
            },
            "bits": dict(self.bits),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], sizes: Mapping[str, int]) -> Shown:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: A bitmap is of another size, or of a group that is not there.
        """
        units = {}
        for name, text in values["units"].items():
            octets = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
            if name not in sizes or len(octets) != (sizes[name] + 7) // 8:
                raise ValueError(f"the units of {name}")
            units[name] = np.unpackbits(octets, count=sizes[name], bitorder="little").astype(bool)
        return cls(units, {name: int(bits) for name, bits in values["bits"].items()})


class Exposure:
    """The exposure ledger of a run: per client, which units were released, how often, at what bits.

    Every release is written down before it leaves, so that a crash can at most count too much.
    Reading changes nothing on disk.

    What a share says: how many of the owner's model's numbers some clients were ever sent, in any
    round, at any number of bits. Of a tensor that is cut along two axes a number counts as shown if
    its row and its column were ever shown, though not together: the share is never too small. Where
    a public model is released in the owner's place, none are his.

    What it does NOT bound: what can be guessed of the rest (from a public base, or by training on
    own data); how well the shown part works as a model; what the trained model's other releases
    tell of it. A share of 60 % is no promise that 40 % of the model's worth is kept: the audit's
    attacks measure that.

    Args:
        manifest: Of the run.
        folder: Where ``exposure.jsonl`` is kept; what it holds already is read. None keeps nothing.

    Raises:
        CheckpointError: The file cannot be read, or does not belong to the run.
    """

    def __init__(self, manifest: Manifest, folder: Path | None = None) -> None:
        self._manifest = manifest
        self._sizes = {group.name: group.size for group in manifest.groups}
        self._path = None if folder is None else folder / NAME
        self._known: dict[str, Shown] = {}
        self._releases: dict[tuple[int, str], str] = {}
        self._whole_bytes: int | None = None
        self._totals: dict[str, Shown] = {}
        if self._path is not None and self._path.exists():
            self._replay(self._path)

    @property
    def clients(self) -> list[str]:
        """Everyone who was ever sent a proxy, sorted."""
        return sorted(self._totals)

    @property
    def enrolled(self) -> list[str]:
        """The same in the order of their first release."""
        return list(self._totals)

    def releases(self, clients: Collection[str] | None = None) -> Iterator[tuple[int, str, Shown]]:
        """Round, client and what was shown, oldest first; by default of all clients."""
        for (number, client), digest in sorted(self._releases.items()):
            if clients is None or client in clients:
                yield number, client, self._known[digest]

    def counts(self, client: str) -> dict[str, np.ndarray]:
        """Per unit group, in how many rounds each unit was released to a client: int [units]."""
        counts = {name: np.zeros(size, int) for name, size in self._sizes.items()}
        for _, _, shown in self.releases([client]):
            for name, count in counts.items():
                count += shown.units.get(name, np.True_)
        return counts

    def share(self, clients: Collection[str]) -> float:
        """Which share of the model's parameters these clients hold together, from 0 to 1."""
        total = self._total(clients)
        return 0.0 if total is None else self._share(total)

    def history(self, client: str) -> dict[int, float]:
        """The client's share after each round in which he was sent something, by round."""
        shares, total = {}, None
        for number, _, shown in self.releases([client]):
            total = shown if total is None else total | shown
            shares[number] = self._share(total)
        return shares

    def mean_bits(self, clients: Collection[str]) -> float:
        """Bits per parameter of the whole model that these clients hold together at best.

        Each number counts with the most bits in which it was ever released; 32 are all of it.
        """
        total = self._total(clients)
        if total is None:
            return 0.0
        return sum(count * total.bits[name] for name, count in self._elements(total)) / (
            self._manifest.parameters
        )

    def share_after(self, client: str, message: Message) -> float:
        """The client's share if this message, too, were released to him."""
        shown = Shown.of(Proxy(message, self._manifest))
        before = self._totals.get(client)
        return self._share(shown if before is None else before | shown)

    def added_by(self, message: Message, clients: Collection[str]) -> float:
        """Which share of the parameters a message would show these clients for the first time."""
        before = self._total(clients)
        shown = Shown.of(Proxy(message, self._manifest))
        if before is None:
            return self._share(shown)
        return self._share(before | shown) - self._share(before)

    def record(self, message: Message) -> None:
        """Write down that a message is being released. To be called before it leaves.

        A round that is repeated after a crash shows the same again and is not counted twice.

        Raises:
            CheckpointError: It cannot be written down; then it must not leave.
        """
        shown = Shown.of(Proxy(message, self._manifest))
        values = shown.to_json()
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
        lines = []
        if digest not in self._known:
            lines.append({"shown": digest, **values})
        if self._releases.get((message.round, message.client)) != digest:
            lines.append({"round": message.round, "client": message.client, "shown": digest})
        self._append(lines)
        self._known.setdefault(digest, shown)
        self._add(message.round, message.client, digest)

    def _add(self, number: int, client: str, digest: str) -> None:
        self._releases[number, client] = digest
        shown, before = self._known[digest], self._totals.get(client)
        self._totals[client] = shown if before is None else before | shown

    def _total(self, clients: Collection[str]) -> Shown | None:
        total = None
        for client in clients:
            shown = self._totals.get(client)
            if shown is not None:
                total = shown if total is None else total | shown
        return total

    def _share(self, shown: Shown) -> float:
        shared = sum(count for _, count in self._elements(shown))
        return shared / self._manifest.parameters

    def _elements(self, shown: Shown) -> Iterator[tuple[str, int]]:
        """Per floating-point tensor, how many of the owner's numbers are shown."""
        if self._manifest.is_of_public:
            return
        tensors = self._manifest.tensors
        groups = [group for group in self._manifest.groups if group.name in shown.units]
        released = {
            group.name: Release(torch.from_numpy(np.flatnonzero(shown.units[group.name])), 1.0)
            for group in groups
        }
        shapes = {name: torch.Size(info.shape) for name, info in tensors.items()}
        selection = Selection(groups, released, shapes)
        for name in shown.bits:
            if tensors[name].is_floating_point:
                yield name, selection.shape(name, shapes[name]).numel()

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if self._path is None or not lines:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                if self._whole_bytes is not None:
                    file.truncate(self._whole_bytes)
                    self._whole_bytes = None
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                "A release could not be written down, so it was not made",
                found=str(error),
                where=str(self._path),
                fix="Free some space and run again with resume.",
            ) from error

    def _replay(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                "The exposure ledger cannot be read", found=str(error), where=str(path)
            ) from error
        *lines, torn = text.split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
                if "client" in values:
                    self._add(int(values["round"]), str(values["client"]), values["shown"])
                else:
                    self._known[values["shown"]] = Shown.from_json(values, self._sizes)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    "The exposure ledger is damaged",
                    found=repr(error)[:120],
                    where=f"{path}, line {number}",
                    fix="It must list every release: restore it, or begin a new run.",
                ) from error
        if torn:  # a crash cut its writing short: the message it was about never left
            self._whole_bytes = len(text.encode()) - len(torn.encode())
