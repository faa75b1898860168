"""Kernels without bounds checks stay in bounds, whatever codes and scales they are given."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz_fence import FENCES, Fence

HERE = Path(__file__).parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("FEDVEIL_KERNELS", None)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(sys.platform != "linux", reason="pages are closed as Linux does it")
def test_kernels_touch_nothing_beyond_their_tensors():
    done = run(str(HERE / "fuzz_fence.py"), "0", "160")
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{done.returncode} after {last}\n{done.stderr[-2000:]}"
    assert last == ["done"]


@pytest.mark.skipif(sys.platform != "linux", reason="pages are closed as Linux does it")
def test_the_fences_hold():
    code = """
import ctypes, os, torch
from fuzz_fence import FENCES
for at_end in (False, True):
    t = FENCES["out"].place(9, torch.uint8, at_end=at_end)
    for place in (-1, 0, 8, 9):
        child = os.fork()
        if not child:
            ctypes.c_char.from_address(t.data_ptr() + place).value
            os._exit(0)
        print(at_end, place, os.WTERMSIG(os.waitpid(child, 0)[1]))
"""
    done = run("-c", code)
    died = [line for line in done.stdout.splitlines() if line.endswith(f" {int(signal.SIGSEGV)}")]
    assert len(done.stdout.splitlines()) == 8
    assert died == ["False -1 11", "True 9 11"]


def test_tensors_lie_where_they_are_said_to():
    fence = Fence(100)
    whole = fence.place(4096, torch.uint8, at_end=False)
    last = fence.place(2, torch.float32, at_end=True, short=1)
    whole.zero_()
    last.fill_(-1.5)
    assert whole.nonzero().flatten().tolist() == [4089, 4090, 4093, 4094]
    assert set(FENCES) == {"codes", "scales", "unit_scales", "out"}
