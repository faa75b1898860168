"""A client's step on the network that is physically without its withheld neurons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from shrink import Case, pairs_of

from speed import budgets
from speed.plan import Plan, Tell
from speed.rows import Row, measured
from speed.timing import Pairs

__all__ = ["shrink_rows"]

ZEROS: Final = "the same step with zeros in the place of withheld neurons"
MODELS: Final = {"gpt2": "two layers of GPT-2 small", "minilm": "MiniLM"}


def shrink_rows(plan: Plan, tell: Tell) -> Iterator[Row]:
    """40 % of the neurons withheld; more models, shares and memory: `benchmarks/shrink.py`."""
    for model in ("minilm",) if plan.quick else MODELS:
        tell(f"steps of {MODELS[model]}")
        batch, tokens = (1, 8) if plan.quick else (16, 64)
        case = Case(model, "neurons", 0.4, batch=batch, tokens=tokens, steps=4)
        taken = pairs_of(case, plan.repeats(5))
        step = Pairs(*([pair.step for pair in taken[shrink]] for shrink in (True, False)))
        what: dict[str, str | int] = {"model": MODELS[model], "batch": f"{batch} x {tokens} tokens"}
        yield measured("shrink/step", what, step, ZEROS, budget=budgets.STEP)
