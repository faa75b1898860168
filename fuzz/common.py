"""What both fuzzing programs need: instrumentation, the mutator, a cap on memory."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
HEADROOM = 2**30
"""Bytes by which a program may grow; one more is a MemoryError, which no entry may raise."""

NOT_INSTRUMENTED = ["fedveil.quantization.kernels.loops", "fedveil.quantization.kernels.vectors"]
"""numba reads the bytecode of these."""

SHARE_OF_BYTES = 0.15
"""How often bytes are changed rather than what they mean."""


def fuzz(entry: str) -> None:
    """Hand inputs to an entry of `tests/fuzz/fuzz_entries.py` until time is up or it raises."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        sys.exit("atheris is not installed: pip install -e '.[fuzz]'")
    sys.path.insert(0, str(ROOT / "tests" / "fuzz"))
    with atheris.instrument_imports(include=["fedveil"], exclude=NOT_INSTRUMENTED):
        importlib.import_module("fedveil.merging")
        entries = importlib.import_module("fuzz_entries")
    forge: Any = importlib.import_module("fuzz_forge")
    known: Any = importlib.import_module("fuzz_known")
    run: Callable[[bytes], str] = known.besides_what_is_known(getattr(entries, entry))
    _warm_up()
    for place in entries.PLACES:
        entries.place(place)  # everything that is imported late, before memory is counted

    def changed(data: bytes, max_size: int, seed: int) -> bytes:
        dice = Random(seed)  # noqa: S311
        result = None if dice.random() < SHARE_OF_BYTES else forge.mutate(data, dice)
        if result is None or len(result) > max_size:
            result = atheris.Mutate(data, max_size)
            result = forge.sealed(result) if dice.random() < 0.5 else result
        return bytes(result)

    def crossed(one: bytes, other: bytes, max_size: int, seed: int) -> bytes:
        result = forge.spliced(one, other, Random(seed))  # noqa: S311
        return one if result is None or len(result) > max_size else bytes(result)

    def once(data: bytes) -> None:
        run(data)

    caps = importlib.import_module("fuzz_caps")
    caps.refuse_more_than(HEADROOM)
    arguments = [sys.argv[0], *_defaults(sys.argv[1:]), *sys.argv[1:]]
    atheris.Setup(arguments, once, custom_mutator=changed, custom_crossover=crossed)
    atheris.Fuzz()


def _warm_up() -> None:
    """Have numba compile now what would take an input's time later."""
    quantization: Any = importlib.import_module("fedveil.quantization")
    torch: Any = importlib.import_module("torch")
    importlib.import_module("fedveil.quantization.blockwise").kernels()
    for bits in quantization.BITS:
        packed = quantization.quantize(torch.ones(2, 3), bits=bits)
        packed.select(torch.tensor([0])).dequantize()


def _defaults(given: list[str]) -> list[str]:
    """libFuzzer's options, unless they are given."""
    options = {
        "-timeout": "10",  # seconds for one input
        "-rss_limit_mb": "3000",
        "-max_len": "40000",
        "-len_control": "0",
        "-print_final_stats": "1",
    }
    names = {argument.split("=")[0] for argument in given}
    return [f"{name}={value}" for name, value in options.items() if name not in names]
