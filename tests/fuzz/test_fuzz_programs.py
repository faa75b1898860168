"""The fuzzing programs start, run and repeat one input; how much they find is not tested here."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed")


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, str(ROOT / "fuzz" / program), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(("program", "folder"), [("wire.py", "read"), ("rounds.py", "receive")])
def test_a_program_reads_the_corpus_and_mutates_it(program, folder, tmp_path):
    done = run(program, "-runs=150", str(tmp_path), f"tests/fuzz/corpus/{folder}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stat::number_of_executed_units: 150" in done.stderr
    assert list(tmp_path.iterdir()), "nothing new was reached by 150 inputs"


def test_one_input_is_repeated():
    done = run("wire.py", "tests/fuzz/corpus/read/gap")
    assert done.returncode == 0
    assert "Executed tests/fuzz/corpus/read/gap" in done.stderr
