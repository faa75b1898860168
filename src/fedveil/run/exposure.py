"""What clients have been shown of the model so far: the accountant of the model's privacy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedveil.errors import CheckpointError
from fedveil.files import PRIVATE_FILE, write_whole
from fedveil.masking import Release
from fedveil.run.head import EMPTY, HEAD, NAME, RESTORE, Head, link_of
from fedveil.run.manifest import Manifest
from fedveil.run.shown import Proxy, Shown
from fedveil.selection import Selection
from fedveil.wire import Message

__all__ = ["Exposure"]


class Exposure:
    """The exposure ledger of a run: per client, which units were released, how often, at what bits.

    Every release is written down before it leaves, so that a crash can at most count too much.
    Reading changes nothing on disk. Each line carries the SHA-256 of the one before it, and
    ``exposure.head`` says how many lines there are and what the last one is: a ledger of which a
    line was lost, altered, or moved is an error, and never read as less. Lines are on disk before
    the head says so, and the head before the release leaves: lines beyond the head are of a crash
    in between and count, and half a line beyond it is of a release that never left.

    What a share says: how many of the owner's model's numbers some clients were ever sent, in any
    round, at any number of bits. Of a tensor that is cut along two axes a number counts as shown if
    its row and its column were ever shown, though not together: the share is never too small. Where
    a public model is released in the owner's place, none are the owner's.

    What it does NOT bound: what can be guessed of the rest (from a public base, or by training on
    own data); how well the shown part works as a model; what the trained model's other releases
    tell of it. A share of 60 % is no promise that 40 % of the model's worth is kept: the audit's
    attacks measure that. Nor does the chain protect against whoever may write to the folder and
    wants to deceive: no key is in it, and ledger and head can be written anew.

    Args:
        manifest: Of the run.
        folder: Where ``exposure.jsonl`` is kept; what it holds already is read. None keeps nothing.

    Raises:
        CheckpointError: The ledger cannot be read, is not what was written, or is of another run.
    """

    def __init__(self, manifest: Manifest, folder: Path | None = None) -> None:
        self._manifest = manifest
        self._sizes = {group.name: group.size for group in manifest.groups}
        self._path = None if folder is None else Path(folder) / NAME
        self._known: dict[str, Shown] = {}
        self._releases: dict[tuple[int, str], str] = {}
        self._totals: dict[str, Shown] = {}
        self._end, self._on_disk, self._is_chained = EMPTY, 0, True
        self._heads: set[str] = set()
        if self._path is not None:
            self._read(self._path)

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
        """The client's share after each round in which it was sent something, by round."""
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
        """The client's share if this message, too, were released to it."""
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
        values, digest = shown.to_json(), _digest(shown)
        lines = []
        if digest not in self._known:
            lines.append({"shown": digest, **values})
        if self._releases.get((message.round, message.client)) != digest:
            lines.append({"round": message.round, "client": message.client, "shown": digest})
        self._append(lines)
        self._known.setdefault(digest, shown)
        self._add(message.round, message.client, digest)

    def count(self, number: int, client: str, shown: Shown) -> None:
        """Count a release that is written down elsewhere; nothing is written."""
        digest = _digest(shown)
        self._known.setdefault(digest, shown)
        self._add(number, client, digest)

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

    @property
    def head(self) -> str:
        """How many lines there are, and the link that the next one carries."""
        return str(self._end)

    def had(self, head: str) -> bool:
        """Whether the ledger once ended as :attr:`head` said, and has gone on from there."""
        return head in self._heads or head == str(EMPTY)

    def begin(self) -> None:
        """Make the ledger and its head, unless they are there: what is missing later was lost.

        Raises:
            CheckpointError: They cannot be written.
        """
        if self._path is None:
            return
        if not (head := self._path.with_name(HEAD)).exists():
            self._end.write(head)
        if not self._path.exists():
            write_whole(self._path, b"", CheckpointError)

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if self._path is None or not lines:
            return
        if not self._is_chained:  # what an earlier version wrote is sealed by the first line
            lines = [{"sealed": self._end.lines}, *lines]
        chained, link = list[bytes](), self._end.last
        for line in lines:
            chained.append(json.dumps({**line, "after": link}).encode() + b"\n")
            link = link_of(chained[-1])
        end = self._end.after(chained)
        try:
            self.begin()
            self._check_untouched(self._path)
            self._write(self._path, b"".join(chained), end)
        except OSError as error:
            raise CheckpointError(
                "A release could not be written down, so it was not made",
                found=str(error),
                where=str(self._path),
                fix="Free some space and run again with resume.",
            ) from error
        self._end, self._on_disk, self._is_chained = end, end.size, True
        self._heads.add(str(end))

    def _check_untouched(self, path: Path) -> None:
        size = path.stat().st_size
        if size != self._on_disk:
            raise CheckpointError(
                "Somebody else has written to the exposure ledger, so no release was made",
                expected=f"{self._on_disk} bytes",
                found=f"{size} bytes",
                where=str(path),
                fix="Let one run at a time work in a folder, and run again with resume.",
            )

    def _write(self, path: Path, data: bytes, end: Head) -> None:
        """Append to the ledger, then to its head. If that fails, they are as they were."""
        try:
            with path.open("r+b") as file:
                path.chmod(PRIVATE_FILE)  # earlier versions made it for all to read
                file.seek(self._end.size)
                file.truncate()  # half a line that a crash has left
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            end.write(path.with_name(HEAD))
        except BaseException:
            with suppress(OSError):
                os.truncate(path, self._end.size)
                self._on_disk = self._end.size
            raise

    def _read(self, path: Path) -> None:
        # The head first: whoever writes meanwhile makes the ledger longer, never shorter.
        head = Head.read(path.with_name(HEAD))
        if not path.exists():
            if head is not None and head.lines:
                raise _lost(path, f"{head.lines} lines", "no file")
            return
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                "The exposure ledger cannot be read", found=str(error), where=str(path)
            ) from error
        self._replay(path, data, head)
        self._on_disk = len(data)

    def _replay(self, path: Path, data: bytes, head: Head | None) -> None:
        """Go through all lines that are whole."""
        *lines, torn = data.split(b"\n")
        unchained = hashlib.sha256()
        for number, line in enumerate(lines, start=1):
            try:
                self._take(json.loads(line.decode()))
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
                raise CheckpointError(
                    "The exposure ledger is damaged",
                    found=(str(error) if isinstance(error, _LinkError) else repr(error))[:160],
                    where=f"{path}, line {number}",
                    fix=RESTORE,
                ) from error
            self._end = self._end.after([line + b"\n"])
            if not self._is_chained:  # under a seal there is one link, of everything before it
                unchained.update(line + b"\n")
                self._end = replace(self._end, last=unchained.hexdigest())
            self._heads.add(str(self._end))
            if head is not None and number == head.lines and self._end != head:
                raise _lost(path, "the lines that its head is of", "others")
        if head is None and lines and self._is_chained:
            raise _lost(path, f"{HEAD} beside it", "no such file")
        if head is not None and self._end.lines < head.lines:
            found = f"{self._end.lines} lines" + (" and a half" if torn else "")
            raise _lost(path, f"{head.lines} lines", found)

    def _take(self, values: Mapping[str, Any]) -> None:
        """One line.

        Raises:
            KeyError, TypeError, ValueError: It is none, or not the one that follows.
        """
        link = values.get("after")
        if link is None and (self._end.lines == 0 or not self._is_chained):
            self._is_chained = False  # of a version that did not chain lines
        elif link != self._end.last:
            raise _LinkError("a line that does not follow the one before it")
        elif not self._is_chained:
            if values.get("sealed") != self._end.lines:
                raise _LinkError("no seal under the lines of an earlier version")
            self._is_chained = True
            return
        if "client" in values:
            self._add(int(values["round"]), str(values["client"]), values["shown"])
        else:
            self._known[values["shown"]] = Shown.from_json(values, self._sizes)


class _LinkError(ValueError):
    """A line is whole, and not the one that belongs here."""


def _lost(path: Path, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        "The exposure ledger is not what was written: some of it is lost or was altered",
        expected=expected,
        found=found,
        where=str(path),
        fix=RESTORE,
    )


def _digest(shown: Shown) -> str:
    """By what a ledger calls what was shown."""
    return hashlib.sha256(json.dumps(shown.to_json(), sort_keys=True).encode()).hexdigest()[:16]
