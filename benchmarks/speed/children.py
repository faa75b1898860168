"""Measurements that need a process of their own: peak memory, and competitors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from speed.plan import Plan
from speed.rows import Row

__all__ = ["ChildError", "main", "require", "rows_of_child"]

_FOLDER = Path(__file__).parents[1]
_QUIET = {
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class ChildError(Exception):
    """A child process failed; says how."""


def require(*packages: str) -> None:
    """Say at once what a child could not import; starting one takes seconds.

    Raises:
        ChildError: A package is not installed.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ChildError(f"{' and '.join(missing)} not installed")


def rows_of_child(
    module: str,
    arguments: Sequence[str],
    plan: Plan,
    *,
    variables: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> list[Row]:
    """Run `python -m module` and return the rows that its `main` was given.

    Args:
        module: calls `main`.
        arguments: for the function that `main` was given.
        plan: for the same.
        variables: more environment variables.
        timeout: in seconds.

    Raises:
        ChildError: It failed or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="fedveil-bench-") as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", module, *arguments, str(int(plan.quick)), str(out)]
        paths = [str(_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            **_QUIET,
            **(variables or {}),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True,
                timeout=timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ChildError(f"took longer than {timeout:.0f} s") from None
        if done.returncode or not out.exists():
            raise ChildError(_last_line(done.stderr) or f"exit status {done.returncode}")
        return [Row.from_json(values) for values in json.loads(out.read_text(encoding="utf-8"))]


def main(measure: Callable[[Sequence[str], Plan], Iterable[Row]]) -> None:
    """What a child's module calls: hands the rows of `measure(arguments, plan)` to the parent."""
    import torch

    torch.set_num_threads(1)
    *arguments, quick, out = sys.argv[1:]
    rows = [row.to_json() for row in measure(arguments, Plan(quick=bool(int(quick))))]
    Path(out).write_text(json.dumps(rows), encoding="utf-8")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
