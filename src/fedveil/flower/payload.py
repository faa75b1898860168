"""What travels through Flower: the bytes of fedveil's wire, and a few plain facts beside them."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedveil.errors import WireError

__all__ = ["pack", "unpack"]

Facts = Mapping[str, int | str]

_MESSAGE, _FACTS = "fedveil.message", "fedveil.facts"


def pack(data: bytes | bytearray | memoryview | None, facts: Facts | None = None) -> RecordDict:
    """Message bytes as one raw array, which Flower sends in pieces and stores by its hash.

    Args:
        data: As :meth:`fedveil.wire.Message.to_bytes` makes them; None sends none.
        facts: What is said beside them.
    """
    content = RecordDict({_FACTS: ConfigRecord(dict(facts or {}))})
    if data is not None:
        array = Array(dtype="uint8", shape=(len(data),), stype=_MESSAGE, data=bytes(data))
        content[_MESSAGE] = ArrayRecord({_MESSAGE: array})
    return content


def unpack(content: RecordDict) -> tuple[bytes | None, dict[str, int | str]]:
    """What :func:`pack` packed; the bytes themselves are not looked at.

    Raises:
        WireError: It is something else.
    """
    arrays, facts = content.array_records, content.config_records.get(_FACTS)
    if facts is None or set(arrays) - {_MESSAGE}:
        raise WireError(
            "A Flower message is not one of fedveil's",
            expected=f"records {_FACTS!r} and perhaps {_MESSAGE!r}",
            found=", ".join(map(repr, content)) or "no record",
        )
    plain = {key: value for key, value in facts.items() if isinstance(value, int | str)}
    if _MESSAGE not in arrays:
        return None, plain
    record = arrays[_MESSAGE]
    if set(record) != {_MESSAGE} or record[_MESSAGE].stype != _MESSAGE:
        raise WireError("A Flower message holds arrays that are none of fedveil's")
    return record[_MESSAGE].data, plain
