"""Which rooms of the house may import which: only those listed above them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedveil

SOURCE = Path(fedveil.__file__).parent
ROOMS = (
    "printable", "errors", "log", "files", "unsupported", "modes",
    "units", "secret", "drawing", "masking", "selection",
    "state", "shards", "shrinking", "removal", "quantization", "wire", "updates", "aggregation",
    "schemes", "tasks", "training", "run", "engine", "federation", "audit", "data", "config",
    "merging", "screen", "report", "flower", "deploy", "demo", "cli", "",
)  # fmt: skip
CORE = ROOMS[: ROOMS.index("schemes") + 1]
FOREIGN = {"transformers", "flwr", "datasets", "flwr_datasets", "typer", "rich", "matplotlib"}


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if first in {"__init__", "__main__"} else first


def imports(path: Path):
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            base = node.module or ""
            yield from ([f"{base}.{a.name}" for a in node.names] if base == "fedveil" else [base])


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_only_rooms_above_it(path):
    room = room_of(path)
    assert room in ROOMS, "list the new room in its place"
    for module in imports(path):
        if module.split(".")[0] == "fedveil":
            other = module.split(".")[1] if "." in module else ""
            # Names of the package itself (its version) may be read by the outermost rooms.
            other = other if other in ROOMS else ""
            assert other == room or ROOMS.index(other) < ROOMS.index(room) or room == "cli", module


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in CORE], ids=lambda p: p.stem)
def test_the_core_imports_no_framework_not_even_late(path):
    assert not {module.split(".")[0] for module in imports(path)} & FOREIGN


@pytest.mark.parametrize("module", ["fedveil", "fedveil.schemes", "fedveil.engine"])
def test_importing_it_loads_no_framework(module):
    code = f"import sys, {module}; print(sorted(set(sys.modules) & {FOREIGN!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
