"""The command line of `benchmarks/run.py`."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from speed import results
from speed.machine import facts
from speed.plan import Plan
from speed.rows import Row
from speed.suite import BENCHMARKS, choose, run
from speed.table import show

__all__ = ["main"]

_ROOT = Path(__file__).parents[2]
DOCS = _ROOT / "docs" / "performance.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status is 0 whatever the figures are."""
    options = _parse(arguments)
    # Tables are wide; a pipe has no width of its own.
    console = Console(width=None if Console().is_terminal else 160)
    if options.publish:
        results.publish(options.out, DOCS)
        console.print(f"{options.out} is now in {DOCS}")
        return 0
    names = choose(options.only)
    if not names:
        console.print(f"No benchmark matches {options.only!r}; there are {', '.join(BENCHMARKS)}.")
        return 2
    torch.set_num_threads(1)
    _hush()
    rows = _measure(names, Plan(quick=options.quick), options.out, console)
    show(console, rows)
    console.print(f"Written to {options.out}: {', '.join(sorted(results.files(options.out)))}")
    return 0


def _measure(names: Sequence[str], plan: Plan, out: Path, console: Console) -> list[Row]:
    machine, rows, started = {**facts(), "quick": plan.quick}, list[Row](), time.perf_counter()
    columns = (
        TextColumn("{task.fields[name]:<10}"), BarColumn(bar_width=20), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names), name=names[0])

        def tell(what: str) -> None:
            progress.update(task, description=what)

        for number, (name, found) in enumerate(run(names, plan, tell), start=1):
            rows += found
            following = names[number] if number < len(names) else name
            progress.update(task, completed=number, name=following)
            results.write(out, {**machine, "seconds": _since(started)}, rows)
            progress.console.print(f"{name}: {len(found)} figures after {_since(started)} s")
    results.write_plot(out, machine, rows)
    return rows


def _hush() -> None:
    """What other libraries find worth saying when they are imported would tear the display."""
    for name in ("torchao", "torch.utils._pytree", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _since(started: float) -> int:
    return round(time.perf_counter() - started)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description="Speed, bytes and memory as ratios to the physical floor, beside competitors.",
    )
    parser.add_argument("--quick", action="store_true", help="small models, two repeats")
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help=f"of {', '.join(BENCHMARKS)}"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    parser.add_argument(
        "--publish", action="store_true", help="measure nothing: put the figures in OUT in the docs"
    )
    return parser.parse_args(arguments)
