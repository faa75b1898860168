"""Clients at work: in this process one after the other, or in single-threaded worker processes."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor, nn

from fedveil.engine.beginning import Beginning
from fedveil.engine.crew import Answer, Crew, Desk, Job, Measures, threads
from fedveil.engine.sending import (
    bytes_of_tensors,
    fits_shared_memory,
    taken,
    written_out,
)
from fedveil.errors import ConfigurationError, FedveilError, TrainingError
from fedveil.run.client_files import ClientFiles
from fedveil.schemes import ClientSide, Scheme
from fedveil.state import architecture_of
from fedveil.tasks import Prepared, Task
from fedveil.training import LocalRun, Trainer, evaluate
from fedveil.training.modes import on_device
from fedveil.units import Rule, register_rule
from fedveil.units.registry import registered
from fedveil.wire import Message

__all__ = [
    "OUT_OF_MEMORY",
    "InTurn",
    "Pool",
    "Workplace",
    "bare_architecture",
    "start_importing",
    "work",
    "workers",
]


@dataclass(frozen=True)
class Workplace:
    """All that clients have: no model weights, no secret, nothing of the server.

    ``architecture`` is a model whose weights were wiped; ``test`` is the owner's test set, lent to
    measure proxies in an experiment (real clients do not have it). ``memories`` is what clients
    keep for themselves between rounds, if they do. ``device`` is where proxies are measured.
    ``rules`` are those for units that were registered here: worker processes need them, too.
    """

    architecture: nn.Module
    side: ClientSide
    task: Task
    trainers: dict[str, Trainer]
    test: Prepared | None
    memories: ClientFiles | None = None
    device: str | None = None
    rules: tuple[Rule, ...] = field(default_factory=registered)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process: what was registered here is registered there."""
        self.__dict__.update(state)
        for rule in self.rules:
            register_rule(rule)

    @cached_property
    def beginning(self) -> Beginning:
        """What the architecture is before each message."""
        return self.begun_as({})

    def begun_as(self, origin: Mapping[str, Tensor]) -> Beginning:
        """The same, of values that are kept elsewhere already, by name."""
        tensors = getattr(self.side, "tensors", None)
        sent = frozenset() if tensors is None else frozenset(tensors(self.architecture))
        return Beginning(self.architecture, sent, origin)


def bare_architecture(scheme: Scheme, model: nn.Module) -> nn.Module:
    """What a client has of a model before the first message, wherever it is.

    Every weight is zero, also of what the scheme never sends, unless it says that clients hold that
    exactly as the owner does (:attr:`~fedveil.schemes.Scheme.clients_hold_rest`).
    """
    return architecture_of(model, zero=scheme.tensors(model) if scheme.clients_hold_rest else None)


def work(place: Workplace, job: Job, write: Callable[[Message], bytearray | memoryview]) -> Answer:
    """Do one job. Whatever goes wrong in it is the answer, not an exception."""
    started = time.perf_counter()
    try:
        message = Message.from_bytes(job.proxy)
        before = None
        if "before" in job.measure:
            before = _measure_received(place, job.client, message)
        run = LocalRun(place.trainers[job.client], job.seed)
        reply = write(_fit(place, job.client, message, run))
        after = _measure(place) if "after" in job.measure else None
    except FedveilError as error:
        return Answer(job.client, None, error)
    except (Exception, SystemExit) as error:
        return Answer(job.client, None, _failure(error))
    return Answer(job.client, reply, None, before, after, time.perf_counter() - started)


OUT_OF_MEMORY = "There is not enough memory to train"


def _failure(error: BaseException) -> TrainingError:
    """What went wrong in code that is not ours, or that we did not foresee."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    found = f"{type(error).__name__}: {error}"
    where = f"{frame.filename}:{frame.lineno}"
    words = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in words):
        fix = (
            "Lower batch_size, or raise gradient_accumulation_steps; gradient_checkpointing takes "
            "less memory, and so does an adapter (LoRA)."
        )
        return TrainingError(OUT_OF_MEMORY, found=found, where=where, fix=fix)
    return TrainingError("A client's training failed", found=found, where=where)


def _fit(place: Workplace, client: str, message: Message, run: LocalRun) -> Message:
    place.beginning.restore()
    if place.memories is None:
        return place.side.fit(message, place.architecture, run)
    memory = place.memories.recall(client, message.round)
    reply = place.side.fit(message, place.architecture, run, memory)
    place.memories.keep(client, message.round, memory)
    return reply


def _measure_received(place: Workplace, client: str, message: Message) -> Measures | None:
    place.beginning.restore()
    if place.memories is None:
        place.side.load(message, place.architecture)
    else:
        kept = place.memories.recall(client, message.round)
        place.side.load(message, place.architecture, kept)
    return _measure(place)


def _measure(place: Workplace) -> Measures | None:
    if place.test is None:
        return None
    with on_device(place.architecture, place.device):
        return evaluate(place.architecture, place.task, place.test)


@dataclass
class InTurn:
    """One client after the other, in this process, on one thread."""

    place: Workplace
    one_at_a_time: bool = True

    def present(self, wanted: int) -> None:
        """See :class:`~fedveil.engine.crew.Crew`: all are here."""

    def answers(self, jobs: Iterable[Job]) -> Iterator[Answer]:
        """See :class:`Crew`."""
        desk = Desk()
        for job in jobs:
            with threads(1):
                answer = work(self.place, job, desk.write)
            yield answer


class Pool:
    """Several processes of one thread each: two threads per process on two cores are far slower.

    A process that dies costs its client the round; the pool is started again.
    """

    one_at_a_time = False

    def __init__(self, place: Workplace, workers: int) -> None:
        self._place, self._workers = place, workers
        # What does not fit into shared memory goes as bytes: each process then has its own.
        self._by_value = not fits_shared_memory(bytes_of_tensors(place))
        self._executor = self._start()

    def present(self, wanted: int) -> None:
        """See :class:`~fedveil.engine.crew.Crew`: all are here."""

    def answers(self, jobs: Iterable[Job]) -> Iterator[Answer]:
        """See :class:`Crew`."""
        waiting: deque[tuple[Job, Future[Answer]]] = deque()
        for job in jobs:
            waiting.append((job, self._submit(job)))
            # One job beyond the busy workers keeps them busy; more would only hold memory.
            if len(waiting) > self._workers:
                yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def close(self) -> None:
        """Stop the processes."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        handed = written_out(self._place) if self._by_value else self._place
        try:
            return ProcessPoolExecutor(
                self._workers,
                mp_context=_process_context(self._place),
                initializer=_settle_in,
                initargs=(handed, torch.get_float32_matmul_precision()),
            )
        except OSError as error:
            raise ConfigurationError(
                "Processes for clients cannot be started",
                found=str(error),
                fix="Run it with workers=1, or give the machine more shared memory (/dev/shm; of a "
                "container --shm-size).",
            ) from error

    def _submit(self, job: Job) -> Future[Answer]:
        try:
            return self._executor.submit(_work_here, job)
        except BrokenProcessPool as error:
            # An earlier job broke the pool just now: this one waits to be tried again with it.
            broken: Future[Answer] = Future()
            broken.set_exception(error)
            return broken

    def _next(self, waiting: deque[tuple[Job, Future[Answer]]]) -> Answer:
        job, future = waiting.popleft()
        try:
            return future.result()
        except BrokenProcessPool:
            return self._again(job, waiting)

    def _again(self, job: Job, waiting: deque[tuple[Job, Future[Answer]]]) -> Answer:
        """A process died and took the pool with it: who killed it cannot be told, so each job that
        was under way gets one more try, alone; the client whose try dies again has failed."""
        self.close()
        self._executor = self._start()
        answer = self._alone(job)
        for index, (other, future) in enumerate(waiting):
            if future.done() and future.exception() is None:
                continue
            done: Future[Answer] = Future()
            done.set_result(self._alone(other))
            waiting[index] = (other, done)
        return answer

    def _alone(self, job: Job) -> Answer:
        try:
            return self._executor.submit(_work_here, job).result()
        except BrokenProcessPool:
            self.close()
            self._executor = self._start()
            failure = TrainingError(
                "A client's process died", where=job.client, fix="Look for a lack of memory."
            )
            return Answer(job.client, None, failure)


@contextmanager
def workers(place: Workplace, count: int) -> Iterator[Crew]:
    """The clients of a run, at work until the context ends."""
    if count == 1:
        yield InTurn(place)
        return
    with _tensors_by_name():
        pool = Pool(place, count)
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def _tensors_by_name() -> Iterator[None]:
    """Tensors are handed to processes by name: by file descriptor there is a limit of 256, which a
    model or a data set of many tensors is beyond."""
    before = torch.multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)  # type: ignore[no-untyped-call]


def start_importing(modules: Iterable[str]) -> None:
    """Let worker processes begin to import ``modules`` in the background.

    To be called as early as they are known: until then nobody waits for it. Later calls in the
    same process change nothing.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.get_context("forkserver").set_forkserver_preload(
            sorted({*modules, __name__})
        )
        forkserver.ensure_running()


def _process_context(place: Workplace) -> BaseContext:
    """Processes that inherit nothing of the server's memory, started as fast as the system can.

    A fork server imports the libraries once, before any thread exists, and forks from there.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    start_importing({type(place.architecture).__module__, type(place.task).__module__})
    return multiprocessing.get_context("forkserver")


_place: Workplace | None = None


def _settle_in(handed: Workplace | bytes, matmul_precision: str) -> None:
    global _place
    place: Workplace = taken(handed)
    # Ctrl-C reaches every process of the terminal: the server stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_the_server, daemon=True).start()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(matmul_precision)  # as in the process that started this one
    # Tensors that are handed to a process share memory with everyone else's: take a copy to train.
    _place = replace(place, architecture=copy.deepcopy(place.architecture))
    vars(_place)["beginning"] = _place.begun_as(_tensors_of(place.architecture))


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, the tensors themselves."""
    named = (*model.named_parameters(remove_duplicate=False),
             *model.named_buffers(remove_duplicate=False))  # fmt: skip
    return {name: tensor.detach() for name, tensor in named}


def _leave_with_the_server() -> None:
    """A server that is killed closes nothing: its workers would wait for work for ever."""
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os._exit(1)


def _work_here(job: Job) -> Answer:
    assert _place is not None
    return work(_place, job, Message.to_bytes)
