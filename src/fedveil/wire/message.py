"""`Message`: what server and clients say to each other, and its one spelling in bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from fedveil.errors import WireError
from fedveil.quantization.blockwise import Pieces
from fedveil.wire.canonical import read_json, write_json
from fedveil.wire.codecs import Codec, Part, codec_for_section, codec_for_type, encode
from fedveil.wire.container import (
    NO_DIGEST,
    Container,
    Plan,
    digest,
    open_container,
    place_of_digest,
    plan_container,
)
from fedveil.wire.limits import Limits
from fedveil.wire.sections import Gathered, Section, Sections

__all__ = ["FORMAT_VERSION", "Message"]

FORMAT_VERSION: Final = 2
"""The version that is written; also the only one that is read."""

_LIMITS: Final = Limits()

Scalar = int | float | str | bool

_TOKEN: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NAME: Final = re.compile(r"[!#-\[\]-~]{1,256}")
"""Printable ASCII without space, quotation mark and backslash: never escaped in JSON."""

_LARGEST_INT: Final = 2**63 - 1
_KEYS: Final = frozenset(
    {"client", "digest", "kind", "round", "scalars", "scheme", "sections", "version"}
)


@dataclass(frozen=True, eq=False)
class Message:
    """Typed sections with the few words that say what they are for.

    Attributes:
        kind: what the message is: "proxy" on its way to a client, "update" on its way back, or a
            word that a scheme defines. Like `scheme` and `client` 1 to 64 of A-Z a-z 0-9 . _ -
        scheme: name of the scheme that speaks.
        round: number of the round, from 0 up.
        client: to whom, or from whom. A claim: nothing here proves it.
        sections: name -> section; names are 1 to 256 printable ASCII characters without space,
            quotation mark and backslash. `Sections` may hold some that are not gathered yet.
        scalars: name -> whole number of 64 bits, finite float, text, or bool.

    What it does NOT protect: nothing is encrypted or signed.

    Raises:
        WireError: a field is not as described.
    """

    kind: str
    scheme: str
    round: int
    client: str
    sections: Mapping[str, Section] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("kind", "scheme", "client"):
            _check_token(name, getattr(self, name))
        if type(self.round) is not int or not 0 <= self.round <= _LARGEST_INT:
            raise WireError("a round is a whole number from 0 up", where="round")
        given = self.sections
        sections = given if isinstance(given, Sections) else Sections(given)
        if sections.written_as is None:
            _check_sections(sections)
        for name, value in self.scalars.items():
            _check_name(name)
            _check_scalar(name, value)
        object.__setattr__(self, "sections", sections)
        object.__setattr__(self, "scalars", dict(self.scalars))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole message."""
        return len(self._header) + self._body.plan.nbytes

    def to_bytes(self) -> bytearray:
        """The message's bytes; equal messages have equal bytes, in whatever order they were built.

        Raises:
            WireError: a quantized section holds impossible values (a scale that is not finite).
        """
        data = bytearray(self.nbytes)
        self.write_into(data)
        return data

    def write_into(self, buffer: bytearray | memoryview | NDArray[np.uint8]) -> memoryview:
        """Write the message's bytes to memory that is there already: each is moved once.

        Args:
            buffer: at least `nbytes` contiguous bytes that may be written to.

        Returns:
            The part of the buffer that is the message.

        Raises:
            WireError: as `to_bytes`, or the buffer does not fit; it may be partly written.
        """
        memory = _writable(buffer, self.nbytes)
        start = len(self._header)
        memory[:start] = np.frombuffer(self._header, np.uint8)
        data = memory[start:]
        self._body.pieces.write_to(data)
        # The same sections have the same bytes: their digests are those of the message before.
        if not self._body.digests:
            self._body.digests.extend(
                xxh3_128(data[i:j].data).digest() for i, j in self._body.plan.ranges
            )
        place = place_of_digest(self._header)
        digits = digest(self._header, self._body.digests).encode("ascii")
        memory[place : place + len(digits)] = np.frombuffer(digits, np.uint8)
        return memory.data.cast("B")

    @property
    def _body(self) -> _Body:
        sections = self.sections
        assert isinstance(sections, Sections)
        if sections.written_as is None:
            sections.written_as = _body(sections)
        body: _Body = sections.written_as
        return body

    @cached_property
    def _header(self) -> bytes:
        """All bytes before the tensors', with no digest yet."""
        words = {
            "client": self.client,
            "digest": NO_DIGEST,
            "kind": self.kind,
            "round": self.round,
            "scalars": self.scalars,
            "scheme": self.scheme,
        }
        last = f'"sections":{self._body.infos},"version":{FORMAT_VERSION}'
        return self._body.plan.header(f"{write_json(words)[:-1]},{last}}}")

    @classmethod
    def from_bytes(
        cls, data: bytes | bytearray | memoryview, *, limits: Limits = _LIMITS
    ) -> Message:
        """Read a message that anyone may have written.

        Args:
            data: the bytes. The message's tensors are views of it where it can be written to (a
                bytearray): leave it alone as long as they are used. Of anything else (bytes) there
                is one copy.
            limits: how much to accept.

        Raises:
            WireError: these bytes are not a message, were altered on the way, or ask too much.

        What it does NOT protect: whoever makes a message can make a well-formed one of poison.
        """
        container = open_container(data, limits)
        header = _read_header(container.metadata)
        plan = _plan(header["sections"], container, limits)
        if container.digest() != header["digest"]:
            raise WireError("message was altered on the way", expected="the digest it carries")
        tensors = container.tensors()
        sections = {}
        for name, (codec, info, parts) in plan.items():
            with _within(name):
                sections[name] = codec.decode(info, {p: tensors[f"{p}:{name}"] for p in parts})
        words = {key: header[key] for key in ("kind", "scheme", "round", "client", "scalars")}
        return cls(**words, sections=sections)


def _read_header(text: str) -> dict[str, Any]:
    header: dict[str, Any] = read_json(text, "header")
    version = header.get("version") if isinstance(header, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise WireError(
            "this message's format version is not spoken here",
            expected=f"version {FORMAT_VERSION}",
            found=f"{version!r}"[:80],
            fix="Run the same fedveil release on both sides.",
        )
    if set(header) != _KEYS:
        raise WireError("the header's keys are wrong", expected=", ".join(sorted(_KEYS)))
    if write_json(header) != text:
        raise WireError("the header is not in canonical spelling")
    for key in ("scalars", "sections"):
        if not isinstance(header[key], dict):
            raise WireError("not an object", where=key)
    return header


def _plan(
    infos: dict[str, Any], container: Container, limits: Limits
) -> dict[str, tuple[Codec, dict[str, Any], tuple[str, ...]]]:
    """Who reads which parts; everything is checked that can be without looking at values."""
    if len(infos) > limits.max_sections:
        raise WireError(
            "too many sections", expected=f"up to {limits.max_sections}", found=f"{len(infos)}"
        )
    plan, elements, used = {}, 0, 0
    for name, info in infos.items():
        with _within(name):
            _check_name(name)
            codec = codec_for_type(info)
            parts = codec.parts(info)
            entries = {p: e for p in parts if (e := container.entries.get(f"{p}:{name}"))}
            if len(entries) < len(parts):
                raise WireError("a part of the section is missing", expected=", ".join(parts))
            elements += codec.check(info, entries, limits)
        plan[name] = (codec, info, parts)
        used += len(parts)
    if used != len(container.entries):
        raise WireError(
            "tensors that belong to no section",
            expected=f"{used} tensors",
            found=f"{len(container.entries)}",
        )
    if elements > limits.max_elements:
        raise WireError(
            "too many numbers",
            expected=f"up to {limits.max_elements}",
            found=f"{elements}",
            fix="Raise Limits.max_elements if this is meant.",
        )
    return plan


@dataclass(frozen=True)
class _Body:
    """What messages with the same sections have in common.

    Attributes:
        infos: what the message header says of the sections, canonical JSON.
        plan: where tensors will lie.
        pieces: what will lie there.
        digests: of each tensor, once it has been written.
    """

    infos: str
    plan: Plan
    pieces: Pieces
    digests: list[bytes] = field(default_factory=list)


def _body(sections: Sections) -> _Body:
    infos: dict[str, Any] = {}
    parts: dict[str, Part] = {}
    for name, section in sections.as_built.items():
        with _within(name):
            infos[name], own = encode(section)
        parts |= {f"{part}:{name}": tensor for part, tensor in own.items()}
    plan = plan_container({name: (part.tensor.dtype, part.shape) for name, part in parts.items()})
    pieces = Pieces([(parts[name].tensor, parts[name].rows) for name in plan.names])
    return _Body(write_json(infos), plan, pieces)


def _writable(buffer: bytearray | memoryview | NDArray[np.uint8], needed: int) -> NDArray[np.uint8]:
    try:
        memory = np.frombuffer(buffer, np.uint8, count=needed)
    except (ValueError, TypeError) as error:
        raise WireError(
            "the buffer cannot take the message",
            expected=f"{needed} contiguous bytes",
            found=f"{error}"[:200],
        ) from None
    if not memory.flags.writeable:
        raise WireError("the buffer cannot be written to", found=type(buffer).__name__)
    return memory


def _check_sections(sections: Sections) -> None:
    for name, section in sections.as_built.items():
        _check_name(name)
        with _within(name):
            codec_for_section(section.source if isinstance(section, Gathered) else section)


@contextmanager
def _within(section: str) -> Iterator[None]:
    """Say in which section it happened."""
    try:
        yield
    except WireError as error:
        raise error.within(f"section {section[:256]!r}") from None


def _check_token(where: str, value: object) -> None:
    if not isinstance(value, str) or not _TOKEN.fullmatch(value):
        raise WireError(
            "not a short name",
            expected="1 to 64 of A-Z a-z 0-9 . _ -",
            found=f"{value!r}"[:80],
            where=where,
        )


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise WireError(
            "not a name for a section or scalar",
            expected='1 to 256 printable ASCII characters without space, " and \\',
            found=f"{name!r}"[:80],
        )


def _check_scalar(name: str, value: object) -> None:
    where = f"scalar {name!r}"
    if type(value) not in (int, float, str, bool):
        raise WireError(
            "not a scalar",
            expected="int, float, str or bool",
            found=type(value).__name__,
            where=where,
        )
    if isinstance(value, int) and not -_LARGEST_INT - 1 <= value <= _LARGEST_INT:
        raise WireError("a whole number does not fit into 64 bits", where=where)
    if isinstance(value, float) and not math.isfinite(value):
        raise WireError("NaN and infinity are no scalars", found=f"{value}", where=where)
    if isinstance(value, str) and not _is_unicode(value):
        raise WireError("text is not valid Unicode", where=where)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
