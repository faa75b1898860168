"""`Message`: what server and clients say to each other, and its one spelling in bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from fedveil.errors import WireError
from fedveil.wire.canonical import read_json, write_json
from fedveil.wire.codecs import Codec, codec_for_section, codec_for_type
from fedveil.wire.container import (
    Container,
    contiguous_parts,
    digest,
    open_container,
    write_container,
)
from fedveil.wire.limits import Limits
from fedveil.wire.sections import Section

__all__ = ["FORMAT_VERSION", "Message"]

FORMAT_VERSION: Final = 1
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
            quotation mark and backslash.
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
        for name in (*self.sections, *self.scalars):
            _check_name(name)
        for name, section in self.sections.items():
            with _within(name):
                codec_for_section(section)
        for name, value in self.scalars.items():
            _check_scalar(name, value)
        object.__setattr__(self, "sections", dict(self.sections))
        object.__setattr__(self, "scalars", dict(self.scalars))

    def to_bytes(self) -> bytes:
        """The message's bytes; equal messages have equal bytes, in whatever order they were built.

        Raises:
            WireError: a quantized section holds impossible values (a scale that is not finite).
        """
        infos: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, section in self.sections.items():
            with _within(name):
                codec = codec_for_section(section)
                info, parts = codec.encode(section)
            infos[name] = {"type": codec.name, **info}
            tensors |= {f"{part}:{name}": tensor for part, tensor in parts.items()}
        ready = _ready_to_write(tensors)
        header = {
            "client": self.client,
            "kind": self.kind,
            "round": self.round,
            "scalars": self.scalars,
            "scheme": self.scheme,
            "sections": infos,
            "version": FORMAT_VERSION,
        }
        checksum = digest(write_json(header), contiguous_parts(ready))
        return write_container(ready, write_json({**header, "digest": checksum}))

    @classmethod
    def from_bytes(
        cls, data: bytes | bytearray | memoryview, *, limits: Limits = _LIMITS
    ) -> Message:
        """Read a message that anyone may have written.

        Args:
            data: the bytes; not kept and not modified, the message's tensors have their own memory.
            limits: how much to accept.

        Raises:
            WireError: these bytes are not a message, were altered on the way, or ask too much.

        What it does NOT protect: whoever makes a message can make a well-formed one of poison.
        """
        container = open_container(data, limits)
        header = _read_header(container.metadata)
        plan = _plan(header["sections"], container, limits)
        body = write_json({key: value for key, value in header.items() if key != "digest"})
        if container.digest(body) != header["digest"]:
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


def _ready_to_write(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, on the CPU, and none sharing memory with another."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().resolve_neg().contiguous()
        storage = plain.untyped_storage().data_ptr()
        ready[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return ready


@contextmanager
def _within(section: str) -> Iterator[None]:
    """Say in which section it happened."""
    try:
        yield
    except WireError as error:
        where = f"section {section[:256]!r}" + (f", {error.where}" if error.where else "")
        raise WireError(
            error.problem, expected=error.expected, found=error.found, where=where, fix=error.fix
        ) from None


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
