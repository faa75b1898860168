"""Which rooms of the house may import which: only those listed above them."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fedveil

SOURCE = Path(fedveil.__file__).parent
ROOMS = (
    "printable", "errors", "log", "files", "ties", "state", "unsupported", "modes",
    "units", "secret", "drawing", "masking", "selection",
    "shards", "shrinking", "removal", "quantization", "wire", "updates", "aggregation",
    "schemes", "tasks", "training", "run", "engine", "federation", "audit", "hub", "config",
    "merging", "screen", "report", "flower", "deploy", "demo", "cli", "",
)  # fmt: skip
CORE = ROOMS[: ROOMS.index("schemes") + 1]
FOREIGN = {"transformers", "flwr", "datasets", "flwr_datasets", "typer", "rich", "matplotlib"}


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if first in {"__init__", "__main__"} else first


def imports(path: Path, *, at_once: bool = False):
    """Every module that a file imports, inside functions too; or those that it needs to begin."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _at_once(tree) if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if base.startswith("fedveil") and file_of(inner) else base


def _at_once(node: ast.AST):
    """What of a file runs when it is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_once(child)


def file_of(module: str) -> Path | None:
    """The file of a module of fedveil; None if it is none."""
    package, *inside = module.split(".")
    if package != "fedveil":
        return None
    path = SOURCE.joinpath(*inside)
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


FILES = sorted(SOURCE.rglob("*.py"))


def test_a_room_imports_only_rooms_above_it():
    wrong = []
    for path in FILES:
        room = room_of(path)
        assert room in ROOMS, f"list the new room {room} in its place"
        for module in imports(path):
            if module.split(".")[0] == "fedveil":
                other = module.split(".")[1] if "." in module else ""
                # Names of the package itself (its version) may be read by the outermost rooms.
                above = ROOMS.index(other) < ROOMS.index(room)
                if not (above or other == room or room == "cli"):
                    wrong.append(f"{path.relative_to(SOURCE)} imports {module}")
    assert not wrong


def test_no_file_imports_what_imports_it():
    graph = {
        path: {f for m in imports(path, at_once=True) if (f := file_of(m)) not in (None, path)}
        for path in FILES
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(str(path.relative_to(SOURCE)) for path in error.args[1]))


def test_the_core_imports_no_framework_not_even_late():
    core = [path for path in FILES if room_of(path) in CORE]
    wrong = {
        f"{path.relative_to(SOURCE)} imports {module}"
        for path in core
        for module in imports(path)
        if module.split(".")[0] in FOREIGN
    }
    assert not wrong


@pytest.mark.parametrize("module", ["fedveil", "fedveil.schemes", "fedveil.engine"])
def test_importing_it_loads_no_framework(module):
    code = f"import sys, {module}; print(sorted(set(sys.modules) & {FOREIGN!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
