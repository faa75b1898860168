"""The files of a run: results.json, results.md, scaling.png; and the docs that show them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from speed.plot import draw
from speed.rows import Row
from speed.table import markdown

__all__ = ["describe", "files", "publish", "read", "write", "write_plot"]

BEGIN: Final = "<!-- figures of `make bench`: begin -->"
END: Final = "<!-- figures of `make bench`: end -->"
JSON: Final = "results.json"
PAGE: Final = "results.md"
PLOT: Final = "scaling.png"
PUBLISHED_PLOT: Final = "performance.png"


def write(folder: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write what there is so far: a run that is broken off leaves what it measured."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"machine": dict(facts), "rows": [row.to_json() for row in rows]}
    text = json.dumps(values, indent=1, allow_nan=False)
    (folder / JSON).write_text(text + "\n", encoding="utf-8")
    page = f"{describe(facts)}\n\n{markdown(rows)}"
    (folder / PAGE).write_text(page, encoding="utf-8")


def write_plot(folder: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write the plot; an older one goes if nothing was measured that it would show."""
    if not draw(rows, folder / PLOT, describe(facts)):
        (folder / PLOT).unlink(missing_ok=True)


def files(folder: Path) -> list[str]:
    """Names of the files that a run left."""
    return [name for name in (JSON, PAGE, PLOT) if (folder / name).exists()]


def read(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """What `write` wrote."""
    values = json.loads((folder / JSON).read_text(encoding="utf-8"))
    return values["machine"], [Row.from_json(row) for row in values["rows"]]


def publish(folder: Path, page: Path) -> None:
    """Put a run's tables between the marks in a page of the docs, and its plot beside.

    Raises:
        ValueError: The page does not have the marks.
    """
    facts, rows = read(folder)
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for figures: it needs {BEGIN} and {END}")
    body = f"{BEGIN}\n{describe(facts)}\n\n{markdown(rows)}\n{END}"
    page.write_text(before + body + after, encoding="utf-8")
    if (folder / PLOT).exists():
        images = page.parent / "images"
        images.mkdir(exist_ok=True)
        shutil.copyfile(folder / PLOT, images / PUBLISHED_PLOT)


def describe(facts: Mapping[str, Any]) -> str:
    """The machine in a sentence."""
    caches = ", ".join(f"{name} {size}" for name, size in facts["caches"].items())
    versions = facts["versions"]
    shown = [f"{name} {versions[name]}" for name in ("torch", "numba") if versions.get(name)]
    parts = [
        f"{facts['cpu']}, {facts['cores']} cores ({caches or 'caches unknown'})",
        f"{facts['memory_gib']} GiB",
        f"Python {facts['python']}, {', '.join(shown)}",
        f"{facts['kernels']} kernels, {facts['threads']} thread",
        f"load {facts['load']:.1f} at the start" if facts["load"] is not None else "load unknown",
        f"commit {facts['commit'] or 'unknown'}",
        facts["date"][:10],
    ]
    return "; ".join(parts) + "."
