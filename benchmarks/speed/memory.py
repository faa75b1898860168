"""Peak extra memory of each step of a server, each in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from fedveil.quantization import kernels_in_use
from fedveil.schemes import FedQSN
from fedveil.state import read_state
from speed import budgets
from speed.children import ChildError, main, rows_of_child
from speed.kernels import GPT2
from speed.plan import Plan, Tell
from speed.rows import Row, plain, skipped
from speed.server import Round
from speed.shapes import ROWS, gpt2, matrices
from speed.sizes import packed_bytes

__all__ = ["memory_rows", "peak"]

FIRST: Final = "absorb, the first of a round"
STEPS: Final = ("begin_round", "release", "absorb", FIRST)
UNITS: Final = "packed model + largest tensor + one proxy"

# Memory that is freed goes back to the system at once, so that a peak is of what is in use.
_RETURN = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def memory_rows(plan: Plan, tell: Tell) -> Iterator[Row]:
    """Each step of a round; the first absorb makes the running sum in fp32, and has no budget."""
    tell(f"peak memory of {', '.join(STEPS)}")
    try:
        yield from rows_of_child("speed.memory", [], plan, variables=_RETURN)
    except ChildError as error:
        for step in STEPS:
            yield skipped(*_name(step), str(error), unit="parts", floor=UNITS, budget=_limit(step))


def measure(arguments: Sequence[str], plan: Plan) -> Iterator[Row]:
    """In the child: every step, in units of packed model + largest tensor + one proxy."""
    kernels_in_use()
    for step in STEPS:  # libraries and compiled code are there before anything is measured
        _measure(step, Plan(quick=True))
    processes = multiprocessing.get_context("fork")
    for step in STEPS:
        with processes.Pool(1) as pool:
            value, note = pool.apply(_measure, (step, plan))
        yield plain(*_name(step), value, "parts", floor=UNITS, budget=_limit(step), reason=note)


def peak(call: Callable[[], object]) -> int:
    """Bytes by which the process was larger while `call` ran than before.

    Raises:
        OSError: The system does not tell (only Linux does, where /proc can be written to).
    """
    gc.collect()
    _RESET.write_text("5", encoding="ascii")  # the high-water mark starts again from here
    before = _status("VmRSS")
    kept = call()
    high = _status("VmHWM")
    del kept
    return max(0, high - before)


def _measure(step: str, plan: Plan) -> tuple[float, str]:
    """Peak extra memory of a step, and what it is made up of."""
    model = gpt2(plan)
    largest = 4 * max(tensor.numel() for tensor in read_state(model).values())
    packed = packed_bytes(matrices(model, ROWS), bits=4)
    stage = Round(model, FedQSN(policy="fresh", update_bits=8))
    del model  # the server has its own copy
    extra, proxy = _peak_of(stage, step)
    sizes = {"extra": extra, "packed": packed, "largest tensor": largest, "proxy": proxy}
    note = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
    return extra / (packed + largest + proxy), note


def _peak_of(stage: Round, step: str) -> tuple[int, int]:
    """Peak extra bytes of a step, and bytes of a proxy."""
    if step == "begin_round":
        extra = peak(stage.begin)
        return extra, stage.release().nbytes
    stage.begin()
    proxy = stage.release().nbytes
    if step == "release":
        buffer = np.ones(proxy, np.uint8)  # memory that is there: it was written to
        return peak(lambda: stage.release().write_into(buffer)), proxy
    sections = stage.encode(stage.updates())
    if step != FIRST:
        stage.receive(stage.reply(sections).to_bytes())
        stage.release()
    data = stage.reply(sections).to_bytes()
    del sections
    return peak(lambda: stage.receive(data)), proxy


def _name(step: str) -> tuple[str, dict[str, str | int]]:
    name = "memory/running_sum" if step == FIRST else "memory/step"
    return name, {"model": GPT2, "step": step}


def _limit(step: str) -> float | None:
    return None if step == FIRST else budgets.EXTRA_MEMORY


def _status(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


if __name__ == "__main__":
    main(measure)
