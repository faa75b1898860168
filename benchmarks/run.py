"""Speed and bytes of the main operations, as ratios to a plain copy of the same tensor.

    make bench        # or: python benchmarks/run.py --rows 2048 --columns 2048

Each operation is timed several times in one process, in turn with a copy into a preallocated
tensor of the same fp32 bytes; the ratio is between the fastest times of both.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fedveil.quantization import quantize
from fedveil.wire import Message


def best(operation: Callable[[], object], floor: Callable[[], object], repeats: int) -> float:
    """Fastest time of ``operation`` over the fastest time of ``floor``, taken alternately."""
    times: dict[str, list[float]] = {"operation": [], "floor": []}
    for _ in range(repeats):
        for name, call in (("operation", operation), ("floor", floor)):
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return min(times["operation"]) / min(times["floor"])


def measure(rows: int, columns: int, bits: int, repeats: int) -> dict[str, float]:
    """Ratios for one [rows, columns] weight, of which 63 % of the rows are released."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    target = torch.empty_like(weight)
    packed = quantize(weight, bits=bits)
    units = torch.arange(rows)[torch.arange(rows) % 100 < 63]
    part = packed.select(units)
    message = Message("proxy", "bench", 1, "client", {"weight": part}, {})
    data = message.to_bytes()
    part_bytes, buffer = torch.empty(len(data), dtype=torch.uint8), bytearray(len(data))

    def copy() -> None:
        target.copy_(weight)

    def copy_part() -> None:
        memoryview(buffer)[:] = memoryview(part_bytes.numpy())

    return {
        "quantize and pack / fp32 copy": best(lambda: quantize(weight, bits=bits), copy, repeats),
        "dequantize / fp32 copy": best(lambda: packed.dequantize(target), copy, repeats),
        "gather a client's units / copy of them": best(
            lambda: packed.select(units), copy_part, repeats
        ),
        "message to bytes / copy of them": best(message.to_bytes, copy_part, repeats),
        "bytes to message / copy of them": best(
            lambda: Message.from_bytes(data), copy_part, repeats
        ),
        "bytes unmasked, % of fp32": 100 * packed.nbytes / (4 * weight.numel()),
        "bytes at 63 % released, % of fp32": 100 * len(data) / (4 * weight.numel()),
    }


def main() -> None:
    """Measure, print a table, write ``runs/bench/results.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        bits: measure(arguments.rows, arguments.columns, bits, arguments.repeats)
        for bits in (2, 3, 4, 8)
    }
    table = Table("", *(f"{bits} bit" for bits in results), title="Ratios, one thread")
    for name in results[4]:
        table.add_row(name, *(f"{values[name]:.2f}" for values in results.values()))
    Console().print(table)
    facts = {"machine": platform.machine(), "torch": torch.__version__, **vars(arguments)}
    path = Path("runs/bench/results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"facts": facts, "results": results}, indent=1))
    Console().print(f"Written to {path}")


if __name__ == "__main__":
    main()
