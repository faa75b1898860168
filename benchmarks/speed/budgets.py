"""What each figure should not exceed, and the lines of the summary that say so.

Timing is no test: a figure over its budget is marked in the table, and nothing fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from speed.rows import FEDVEIL, Row

__all__ = [
    "BYTES",
    "DEQUANTIZE",
    "EXTRA_MEMORY",
    "FLAT",
    "HEADLINES",
    "LOAD",
    "PROXY",
    "QUANTIZE",
    "ROUND",
    "STEP",
    "Headline",
]

QUANTIZE: Final = {"[out, in]": 3.0, "[in, out]": 4.5}
"""Quantizing and packing at 4 bits, over a preallocated copy of the same values in fp32, by
storage: units that lie along rows, or across them."""
DEQUANTIZE: Final = 1.8
"""Decoding into a preallocated tensor, over the same copy."""
LOAD: Final = 2.0
"""All that a client does with a proxy before it trains, over the same copy."""
PROXY: Final = 1.5
"""One client's message from packed units, over a memcpy of its bytes."""
BYTES: Final = 12.9
"""An unmasked 4-bit message, in per cent of fp32; a masked one times the released share."""
EXTRA_MEMORY: Final = 1.0
"""Peak extra memory on the server, over packed model + largest tensor + one proxy."""
ROUND: Final = {"FedAvg": 1.15, "FedQSN": 1.5}
"""A round of the in-process engine, over a bare training loop, by scheme."""
STEP: Final = 0.75
"""A client's step without 40 % of the neurons, over one with zeros in their place."""
FLAT: Final = 1.25
"""Server time per client with the most clients, over that with the fewest."""


@dataclass(frozen=True)
class Headline:
    """One line of the summary: the rows that a budget is about, and competitors' rows beside.

    Attributes:
        title: what is measured.
        name: the rows' name.
        case: what their case agrees with.
        beside: name of the rows in which competitors do the same.
        beside_case: what the case of those agrees with.
    """

    title: str
    name: str
    case: dict[str, str | int] = field(default_factory=dict)
    beside: str = ""
    beside_case: dict[str, str | int] = field(default_factory=dict)

    def own(self, rows: Sequence[Row]) -> list[Row]:
        """fedveil's rows, measured or not."""
        found = [row for row in rows if row.matches(self.name, **self.case)]
        return [row for row in found if row.who == FEDVEIL]

    def others(self, rows: Sequence[Row]) -> list[Row]:
        """Competitors' rows, measured or not."""
        found = [row for row in rows if row.matches(self.beside, **self.beside_case)]
        return [row for row in found if row.who != FEDVEIL]


HEADLINES: Final = (
    *(
        Headline(
            f"quantize and pack, 4 bit, {storage} from {dtype} / fp32 copy",
            "quantize/model",
            {"bits": 4, "storage": storage, "dtype": dtype},
            "peers/layers" if (storage, dtype) == ("[out, in]", "float32") else "",
            {"what": "quantize"},
        )
        for dtype in ("float32", "bfloat16")
        for storage in QUANTIZE
    ),
    Headline(
        "decode into a tensor, 4 bit / fp32 copy",
        "dequantize/model",
        {"bits": 4},
        "peers/layers",
        {"what": "dequantize"},
    ),
    Headline("a client reads and loads its proxy / fp32 copy", "client/load"),
    Headline("one client's proxy into a buffer / memcpy of it", "server/release"),
    Headline(
        "4-bit bytes, unmasked / fp32", "bytes/unmasked", {}, "peers/layers", {"what": "bytes"}
    ),
    Headline("4-bit bytes, masked / fp32", "bytes/masked"),
    Headline(
        "FedAvg round in process, one step each / bare loop",
        "rounds/fedveil",
        {"scheme": "FedAvg"},
        "rounds/simulator",
    ),
    Headline(
        "FedQSN round in process, one step each / bare loop",
        "rounds/fedveil",
        {"scheme": "FedQSN, 4 bit, (.1, .3)"},
    ),
    Headline("client's step without 40 % of the neurons / with zeros", "shrink/step"),
    Headline("extra memory of the server / packed + tensor + proxy", "memory/step"),
    Headline("server time per client, most clients / few", "clients/flat"),
)
