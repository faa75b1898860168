"""What one hostile client of ten reads and breaks, with the default bounds and without any.

    python -m studies.active_clients               # seeds 0 1 2: about 20 minutes on two cores
    python -m studies.active_clients --quick       # one seed, fewer rounds: two minutes
    python -m studies.active_clients --only 'digits*' 'images*'

Handwritten digits, ten clients, of whom client-00 is hostile; all goes through the engine and real
messages. Finished runs are kept in runs/active/results.jsonl and not repeated; tables are printed
and written to results.json and results.md beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fedveil import Training
from fedveil.schemes import Scheme
from studies.active import scenes
from studies.active.backdoor import BACKDOORS, plant
from studies.active.damage import DAMAGES, break_model, unharmed
from studies.active.digits import read_digits, read_within
from studies.active.images import read_images
from studies.active.patient import read_patiently
from studies.active.scenes import Scene
from studies.results import Results

Figures = dict[str, float]
MakeScene = Callable[[int], Scene]

STRONG = Training(steps=20, batch_size=16, learning_rate=1e-3)
"""Training that moves the model far in a round: a client within bounds may move it far, too."""


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        passes: Traps that the imprinter sets.
        within: Rounds of those who keep within the bounds and read digits.
        patience: Rounds of the one who keeps within them and reads images.
        rounds: Rounds of those who break the model.
        digits, few, young: Make what is attacked, from a seed.
    """

    passes: int = 3
    within: int = 10
    patience: int = 200
    rounds: int = 3
    digits: MakeScene = scenes.digits
    few: MakeScene = scenes.few_images
    young: MakeScene = scenes.young


QUICK = Plan(passes=1, within=3, patience=110, rounds=1)


@dataclass(frozen=True)
class Case:
    """One attack.

    Attributes:
        measure: Its figures, with bounds or without.
        lines: What is told of them: a format over the figures by line of the table.
        bounded_only: Whether it is an attack from within the bounds.
        note: What has to be known beside its figures.
    """

    measure: Callable[[Plan, int, bool], Figures]
    lines: Mapping[str, str]
    bounded_only: bool = False
    note: str = ""


def digits(plan: Plan, seed: int, bounded: bool) -> Figures:
    """The amplifier."""
    found = read_digits(plan.digits(seed), bounded)
    return {"honest": found.honest, "best": found.best, "accuracy": found.accuracy}


def digits_within(plan: Plan, seed: int, bounded: bool) -> Figures:
    """The crown and the dither."""
    found = read_within(replace(plan.digits(seed), training=STRONG), bounded, plan.within)
    calm = read_within(plan.digits(seed), bounded, plan.within)
    return {
        "released": found.released, "told": found.told, "read": found.read, "calm": calm.read,
        "dithered": calm.dithered, "dithered_strong": found.dithered, "rounds": plan.within,
    }  # fmt: skip


def images(plan: Plan, seed: int, bounded: bool) -> Figures:
    """The imprinter."""
    found = read_images(plan.few(seed), bounded, plan.passes)
    return {
        "found": found.found, "images": len(found.similarities), "rounds": found.rounds,
        "best": max(found.similarities), "base": found.base, "accuracy": found.accuracy,
    }  # fmt: skip


def images_within(plan: Plan, seed: int, bounded: bool) -> Figures:
    """The patient client."""
    found = read_patiently(plan.few(seed), plan.patience, bounded=bounded)
    return {
        "found": found.found, "images": len(found.similarities), "rounds": found.rounds,
        "ready": float("nan") if found.ready is None else found.ready,
        "best": max(found.similarities), "base": found.base, "accuracy": found.accuracy,
    }  # fmt: skip


@cache
def without_attack(plan: Plan, seed: int, scheme: Scheme) -> float:
    """What the model reaches where nobody is hostile: the same for several attacks."""
    return unharmed(plan.young(seed), scheme, plan.rounds)


def damage(plan: Plan, seed: int, bounded: bool, *, how: str) -> Figures:
    """A client that breaks the model."""
    found = break_model(plan.young(seed), how, bounded, plan.rounds)
    honest = without_attack(plan, seed, DAMAGES[how][1])
    return {"honest": honest, "accuracy": found.accuracy, "rejected": found.rejected}


@cache
def unplanted(plan: Plan, seed: int, how: str) -> float:
    """How often the model answers so where the client is honest."""
    return plant(plan.young(seed), how, bounded=True, poisoned=False).answered


def backdoor(plan: Plan, seed: int, bounded: bool, *, how: str) -> Figures:
    """A client that plants a backdoor."""
    found = plant(plan.young(seed), how, bounded)
    return {"backdoor": found.answered, "unplanted": unplanted(plan, seed, how), **found.measured}


CASES: Mapping[str, Case] = {
    "digits": Case(
        digits,
        {
            "released weights, relative error of the best of six rounds (a proxy as it is: "
            "{honest:.3f})": "{best:.2g}",
            "the owner's accuracy afterwards, %": "{accuracy:.1f}",
        },
    ),
    "digits, from within": Case(
        digits_within,
        {
            "weights read to float32 in {rounds:.0f} rounds, of {released:.0f} (one proxy's scales "
            "tell {told:.0f})": "{read:.0f}",
            "the same, clients training by default": "{calm:.0f}",
            "error of eight dithered weights, in those of one proxy": "{dithered:.2f}",
            "the same, clients training hard": "{dithered_strong:.2f}",
        },
        bounded_only=True,
    ),
    "images": Case(
        images,
        {
            "images of others above 30 dB in {rounds:.0f} rounds, of {images:.0f}": "{found:.0f}",
            "the nearest, dB": "{best:.0f}",
            "the owner's accuracy afterwards, % (before: {base:.1f})": "{accuracy:.1f}",
        },
    ),
    "images, from within": Case(
        images_within,
        {
            "images of others above 30 dB in {rounds:.0f} rounds, of {images:.0f}": "{found:.0f}",
            "the nearest, dB": "{best:.0f}",
            "rounds of preparation": "{ready:.0f}",
            "the owner's accuracy afterwards, % (before: {base:.1f})": "{accuracy:.1f}",
        },
        bounded_only=True,
    ),
    **{
        f"damage: {how}": Case(
            partial(damage, how=how),
            {
                "accuracy, % (nobody hostile: {honest:.1f})": "{accuracy:.1f}",
                "rounds of which nothing was applied": "{rejected:.0f}",
            },
        )
        for how in DAMAGES
    },
    **{
        f"backdoor: {how}": Case(
            partial(backdoor, how=how),
            {
                "answers as planted, % (planted by nobody: {unplanted:.1f})": "{backdoor:.1f}",
                "accuracy, %": "{accuracy:.1f}",
            },
            note=""
            if "honest" not in how
            else "An honest weight and length: no bound on them helps, and none is expected to.",
        )
        for how in BACKDOORS
    },
}
WITH, WITHOUT = "default bounds", "no bounds"


def sides(case: Case) -> tuple[str, ...]:
    """With which bounds a case is measured."""
    return (WITH,) if case.bounded_only else (WITHOUT, WITH)


def measure(
    results: Results, plan: Plan, seeds: Sequence[int], names: Sequence[str], console: Console
) -> None:
    """Run what is missing."""
    for seed in seeds:
        for name in names:
            for side in sides(CASES[name]):
                key, started = f"{name} | {side}", time.perf_counter()
                if results.has(key, seed):
                    continue
                results.add(key, seed, CASES[name].measure(plan, seed, side == WITH))
                seconds = time.perf_counter() - started
                console.print(f"seed {seed}, {name}, {side}: {seconds:.0f} s", soft_wrap=True)


def lines(results: Results) -> Iterator[list[str]]:
    """The table: attack, what is told, without bounds, with them; means and ranges over seeds."""
    for name, case in CASES.items():
        found = {side: results.of(f"{name} | {side}") for side in sides(case)}
        every = [values for those in found.values() for values in those]
        if not every:
            continue
        means = {key: statistics.fmean(one[key] for one in every) for key in every[0]}
        for number, (what, cell) in enumerate(case.lines.items()):
            cells = [over_seeds(cell, found.get(side, [])) for side in (WITHOUT, WITH)]
            yield [name if number == 0 else "", what.format(**means), *cells]


def over_seeds(cell: str, rows: Sequence[Mapping[str, float]]) -> str:
    """The mean of a figure, and its range where seeds differ."""
    if not rows:
        return "-"
    key = cell.strip("{}").split(":")[0]
    values = [row[key] for row in rows]
    low, high = (cell.format(**{key: end}) for end in (min(values), max(values)))
    mean = cell.format(**{key: statistics.fmean(values)})
    return mean if low == high else f"{mean} ({low} to {high})"


HEAD = ["attack", "what", WITHOUT, WITH]


def show(results: Results, console: Console) -> None:
    """Print the table."""
    table = Table(*HEAD)
    for line in lines(results):
        table.add_row(*line)
    console.print(table)
    for note in notes():
        console.print(note)


def notes() -> list[str]:
    """What has to be known beside the figures."""
    told: dict[str, list[str]] = {}
    for name, case in CASES.items():
        if case.note:
            told.setdefault(case.note, []).append(name)
    return [f"{'; '.join(names)}: {note}" for note, names in told.items()]


def markdown(results: Results) -> str:
    """The table and its notes in Markdown."""
    head = [HEAD, ["---", "---", "---:", "---:"]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [*head, *lines(results)])
    return f"{table}\n\n" + "\n".join(f"- {note}" for note in notes()) + "\n"


def write(results: Results, folder: Path) -> None:
    """Put the table and all figures beside the runs."""
    figures = {name: results.by_seed(name) for name in results.names()}
    (folder / "results.json").write_text(json.dumps(figures, indent=1))
    (folder / "results.md").write_text(markdown(results))


def main(arguments: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Run what is missing, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed, fewer rounds")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--out", type=Path, default=Path("runs/active"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    # Tables are wide; a pipe has no width of its own.
    console = Console(width=None if Console().is_terminal else 160)
    names = [n for n in CASES if any(fnmatchcase(n, pattern) for pattern in options.only)]
    if not names:
        console.print(f"No attack matches; there are {', '.join(CASES)}.")
        return 2
    folder = options.out / "quick" if options.quick else options.out
    results = Results(folder)
    seeds = options.seeds[:1] if options.quick else options.seeds
    measure(results, plan or (QUICK if options.quick else Plan()), seeds, names, console)
    show(results, console)
    write(results, folder)
    console.print(f"Written to {folder}: results.json, results.md")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
