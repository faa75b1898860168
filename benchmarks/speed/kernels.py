"""Kernels on every matrix of a model: quantize, dequantize, add, gather. One shape at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fedveil.quantization import QuantizedTensor, quantize
from speed import budgets
from speed.plan import Plan, Tell
from speed.rows import Row, measured
from speed.shapes import COLUMNS, ROWS, Matrices, gpt2, llama, matrices
from speed.timing import Pairs, alternate

__all__ = ["COPY", "dequantize_rows", "gather_rows", "quantize_rows", "released_units"]

COPY: Final = "preallocated fp32 copy"
MEMCPY: Final = "memcpy of the same bytes"
BITS: Final = (2, 3, 4, 8)
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GPT2, LLAMA = "GPT-2 small", "Llama 1B"

Case = dict[str, str | int]
Pass = Callable[[], object]


def quantize_rows(plan: Plan, tell: Tell) -> Iterator[Row]:
    """Quantize and pack every matrix, in every width, storage and input dtype."""
    every = [(s, d, b) for s in (ROWS, COLUMNS) for d in DTYPES for b in BITS]
    # A billion parameters take their time: every width once, and 4 bits every way.
    some = [c for c in every if c[2] == 4 or c[:2] == (ROWS, "float32")]
    for title, cases, repeats in ((GPT2, every, 7), (LLAMA, some, 3)):
        found: dict[tuple[str, str, int], Pairs] = {}
        for storage, group in _groups(plan, title):
            for dtype in DTYPES:
                widths = [b for s, d, b in cases if (s, d) == (storage, dtype)]
                tell(f"quantize {title} {storage} {list(group.shape)} {dtype}")
                for bits, pairs in _quantize(group, dtype, widths, plan.repeats(repeats)):
                    _add(found, (storage, dtype, bits), pairs)
        for (storage, dtype, bits), pairs in found.items():
            case: Case = {"model": title, "storage": storage, "dtype": dtype, "bits": bits}
            limit = budgets.QUANTIZE[storage] if bits == 4 else None
            yield measured("quantize/model", case, pairs, COPY, budget=limit)


def dequantize_rows(plan: Plan, tell: Tell) -> Iterator[Row]:
    """Decode every matrix into a preallocated tensor; decode and add it to a running sum."""
    for title, widths, repeats in ((GPT2, BITS, 7), (LLAMA, (4,), 3)):
        found: dict[tuple[str, str, int], Pairs] = {}
        for storage, group in _groups(plan, title):
            tell(f"dequantize {title} {storage} {list(group.shape)}")
            for bits, name, pairs in _dequantize(group, widths, plan.repeats(repeats)):
                _add(found, (name, storage, bits), pairs)
        for (name, storage, bits), pairs in found.items():
            case: Case = {"model": title, "storage": storage, "bits": bits}
            limit = budgets.DEQUANTIZE if name == "dequantize/model" else None
            yield measured(name, case, pairs, COPY, budget=limit)


def gather_rows(plan: Plan, tell: Tell) -> Iterator[Row]:
    """Gather 63 % of the units of every packed matrix into memory that is there."""
    for title, repeats in ((GPT2, 9), (LLAMA, 5)):
        found: dict[str, Pairs] = {}
        for storage, group in _groups(plan, title):
            tell(f"gather {title} {storage} {list(group.shape)}")
            _add(found, storage, _gather(group, plan.repeats(repeats)))
        for storage, pairs in found.items():
            case: Case = {"model": title, "storage": storage, "bits": 4}
            yield measured("gather/model", case, pairs, MEMCPY)


def released_units(units: int) -> Tensor:
    """63 % of the units, at random: what rates of .1 and .3 leave. int64, ascending."""
    order = torch.randperm(units, generator=torch.Generator().manual_seed(units))
    return order[: max(1, round(0.63 * units))].sort().values


def copies(sources: Sequence[Tensor], targets: Sequence[Tensor], group: Matrices) -> Pass:
    """The floor: as many fp32 copies as there are matrices, into memory that is there."""

    def floor() -> None:
        for turn in group.turns():
            targets[turn].copy_(sources[turn])

    return floor


def _groups(plan: Plan, title: str) -> list[tuple[str, Matrices]]:
    model = llama(plan) if title == LLAMA else gpt2(plan, data=False)
    return [(storage, group) for storage in (ROWS, COLUMNS) for group in matrices(model, storage)]


def _quantize(
    group: Matrices, dtype: str, widths: Sequence[int], repeats: int
) -> Iterator[tuple[int, Pairs]]:
    if not widths:
        return
    exact = group.tensors()
    weights = exact if dtype == "float32" else group.tensors(DTYPES[dtype])
    floor = copies(exact, [torch.empty_like(w) for w in exact], group)
    floor()
    for bits in widths:

        def every(bits: int = bits) -> None:
            for turn in group.turns():
                quantize(weights[turn], bits=bits, axis=group.axis)

        quantize(weights[0], bits=bits, axis=group.axis)
        yield bits, alternate(every, floor, repeats, warm=False)


def _dequantize(
    group: Matrices, widths: Sequence[int], repeats: int
) -> Iterator[tuple[int, str, Pairs]]:
    exact = group.tensors()
    targets = [torch.empty_like(w) for w in exact]
    floor = copies(exact, targets, group)
    floor()
    for bits in widths:
        packed = [quantize(w, bits=bits, axis=group.axis) for w in exact]
        units = torch.arange(packed[0].units)

        def write(packed: list[QuantizedTensor] = packed) -> None:
            for turn in group.turns():
                packed[turn].dequantize(targets[turn])

        def add(packed: list[QuantizedTensor] = packed, units: Tensor = units) -> None:
            for turn in group.turns():
                packed[turn].add_to(targets[turn], units, 0.5)

        packed[0].dequantize(targets[0])
        packed[0].add_to(targets[0], units, 0.5)
        yield bits, "dequantize/model", alternate(write, floor, repeats, warm=False)
        yield bits, "dequantize/add", alternate(add, floor, repeats, warm=False)


def _gather(group: Matrices, repeats: int) -> Pairs:
    packed = [quantize(w, bits=4, axis=group.axis) for w in group.tensors()]
    units = released_units(packed[0].units)
    targets = [one.select(units) for one in packed]
    moved = [[(part, torch.empty_like(part)) for part in _parts(one)] for one in targets]

    def select() -> None:
        for turn in group.turns():
            packed[turn].select(units, out=targets[turn])

    def memcpy() -> None:
        for turn in group.turns():
            for source, target in moved[turn]:
                target.copy_(source)

    return alternate(select, memcpy, repeats)


def _parts(packed: QuantizedTensor) -> list[Tensor]:
    parts = (packed.codes, packed.scales, packed.unit_scales)
    return [part for part in parts if part is not None]


def _add(found: dict[Any, Pairs], key: Any, pairs: Pairs) -> None:
    found[key] = found[key] + pairs if key in found else pairs
