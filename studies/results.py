"""Results of long benchmarks, kept line by line so that nothing is run twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Values = Mapping[str, Any]


class Results:
    """The lines of ``results.jsonl`` in a folder.

    Args:
        folder: Made if missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "results.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._values = {(r["name"], r["seed"]): r["values"] for r in map(json.loads, lines)}

    def has(self, name: str, seed: int) -> bool:
        """Whether this run is finished."""
        return (name, seed) in self._values

    def add(self, name: str, seed: int, values: Values) -> None:
        """Keep the figures of a finished run."""
        self._values[name, seed] = dict(values)
        with self._path.open("a") as file:
            file.write(json.dumps({"name": name, "seed": seed, "values": values}) + "\n")

    def names(self) -> list[str]:
        """Names of finished runs, in the order in which they first finished."""
        return list(dict.fromkeys(name for name, _ in self._values))

    def of(self, name: str) -> list[Values]:
        """The figures of all seeds of one run."""
        return [values for (other, _), values in self._values.items() if other == name]

    def by_seed(self, name: str) -> dict[int, Values]:
        """The same, by seed."""
        return {seed: values for (other, seed), values in self._values.items() if other == name}
