"""All benchmarks by name, and running them without losing what is measured already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Final

from speed.kernels import dequantize_rows, gather_rows, quantize_rows
from speed.memory import memory_rows
from speed.peers import peer_rows
from speed.plan import Plan, Tell
from speed.rounds import round_rows
from speed.rows import Row, skipped
from speed.scaling import client_rows, parameter_rows
from speed.server import server_rows
from speed.shrink import shrink_rows
from speed.sizes import size_rows

__all__ = ["BENCHMARKS", "choose", "run"]

Benchmark = Callable[[Plan, Tell], Iterator[Row]]

BENCHMARKS: Final[dict[str, Benchmark]] = {
    "quantize": quantize_rows,
    "dequantize": dequantize_rows,
    "gather": gather_rows,
    "server": server_rows,
    "bytes": size_rows,
    "memory": memory_rows,
    "peers": peer_rows,
    "rounds": round_rows,
    "shrink": shrink_rows,
    "clients": client_rows,
    "parameters": parameter_rows,
}


def choose(pattern: str) -> list[str]:
    """Names of the benchmarks that a shell pattern matches, in order."""
    return [name for name in BENCHMARKS if fnmatchcase(name, pattern)]


def run(
    names: Sequence[str], plan: Plan, tell: Tell, benchmarks: dict[str, Benchmark] | None = None
) -> Iterator[tuple[str, list[Row]]]:
    """Run benchmarks one after the other; one that fails leaves a row that says why.

    Yields:
        Each name with its rows, as soon as they are there.
    """
    known = BENCHMARKS if benchmarks is None else benchmarks
    for name in names:
        rows: list[Row] = []
        try:
            for row in known[name](plan, tell):
                rows.append(row)  # what came before a failure is kept
        except Exception as error:
            rows.append(skipped(f"{name}/failed", {}, f"{type(error).__name__}: {error}"))
        yield name, rows
