"""Runs that are not finished yet, in processes of one thread each."""

from __future__ import annotations

import functools
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, Protocol

import torch

from fedveil.demo import fast_matmul
from fedveil.demo.setting import offline
from fedveil.hub.models import quiet_transformers
from studies.fedqsn.scenes import SCENES, Scene
from studies.results import Results, Values

__all__ = ["Job", "run_missing"]


class Job(Protocol):
    """One run. Picklable, as is what it finds."""

    @property
    def scene(self) -> str:
        """What it runs on."""

    @property
    def seed(self) -> int:
        """What its chance begins with."""

    @property
    def name(self) -> str:
        """What it is called in the results, where its seed stands beside it."""

    def run(self, scene: Scene) -> dict[str, Any]:
        """What it finds."""


def run_missing(
    results: Results, jobs: Sequence[Job], *, processes: int, told: Callable[[Values], str]
) -> None:
    """Add what the jobs find to the results, each as soon as it is finished."""
    missing = [job for job in jobs if not results.has(job.name, job.seed)]
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running = {pool.submit(_work, job): job for job in missing}
        for done, future in enumerate(as_completed(running), start=1):
            job, values = running[future], future.result()
            results.add(job.name, job.seed, values)
            minutes = (time.perf_counter() - started) / 60
            line = f"{done} of {len(missing)}, {minutes:.0f} min: {job.name}, seed {job.seed}"
            print(f"{line}: {told(values)}", file=sys.stderr, flush=True)


def _work(job: Job) -> Mapping[str, Any]:
    torch.set_num_threads(1)
    with offline(), fast_matmul(), quiet_transformers():
        return job.run(_scene(job.scene, job.seed))


@functools.lru_cache(maxsize=1)
def _scene(name: str, seed: int) -> Scene:
    """A worker makes the scene once for all jobs that it is given of it, one after another."""
    return SCENES[name](seed)
