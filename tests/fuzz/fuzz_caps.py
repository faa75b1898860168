"""A process of its own that reads files under caps: `python fuzz_caps.py read|receive FILE ...`

For each file it prints a line of JSON: what was said, the processor's seconds, by how many bytes
memory grew at most (resident, and what Python and numpy asked for). Whoever asks for more than
`HEADROOM` at once gets a MemoryError, as in a container, and that is not a FedveilError.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import fuzz_entries
import pytest

HEADROOM = 2**29
ENTRIES = {"read": fuzz_entries.read_anything, "receive": fuzz_entries.receive_anything}


def status(field: str) -> int:
    """A size of this process in bytes, as the kernel tells it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def forget_the_peak() -> None:
    """From now on `VmHWM` is the peak since now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def refuse_more_than(headroom: int) -> None:
    """No allocation may take the process beyond its present size by more."""
    size = status("VmSize") + headroom
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def measured(entry: str, data: bytes) -> dict[str, Any]:
    """Run an entry twice: for resident memory and time, then traced."""
    run = ENTRIES[entry]
    forget_the_peak()
    before, began = status("VmRSS"), time.process_time()
    said = run(data)
    seconds = time.process_time() - began
    grown = status("VmHWM") - before
    tracemalloc.start()
    run(data)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"said": said[:200], "seconds": seconds, "grown": grown, "traced": traced}


def main(entry: str, paths: list[str]) -> None:
    """Measure every file, once what is imported and compiled late has been."""
    for path in paths[: 1 if entry == "read" else None]:
        ENTRIES[entry](Path(path).read_bytes())
    refuse_more_than(HEADROOM)
    for path in paths:
        print(json.dumps({"path": path, **measured(entry, Path(path).read_bytes())}), flush=True)


def under_caps(entry: str, paths: list[str]) -> list[dict[str, Any]]:
    """What this program prints about files, from a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process's memory is measured on Linux")
    here = Path(__file__)
    # Large pieces of memory go back to the system at once, so that what is measured is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(here), entry, *paths],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == len(paths)
    return lines


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
