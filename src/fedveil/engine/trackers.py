"""Records of a run in TensorBoard and MLflow, where these are installed."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from fedveil.engine.observer import Observer
from fedveil.errors import CheckpointError, ConfigurationError
from fedveil.files import PRIVATE_FILE, write_whole
from fedveil.log import LOG
from fedveil.run import RoundRecord
from fedveil.run.folder import RunFolder

__all__ = ["MLflow", "TensorBoard", "Tracker", "numbers_of", "watched"]

Name = Literal["tensorboard", "mlflow"]

_RUN_ID = "mlflow-run"
"""What keeps the id of the run in MLflow, in the run folder: a resumed run goes on there."""


class Tracker(Protocol):
    """Where the numbers of rounds go."""

    def open(self, finished: int) -> None:
        """A run begins, or goes on after ``finished`` rounds."""

    def write(self, number: int, values: dict[str, float]) -> None:
        """The numbers of one round, by name."""

    def close(self) -> None:
        """The run is over, or was interrupted."""


class TensorBoard:
    """Writes event files: ``tensorboard --logdir runs/federation``.

    Args:
        folder: The run folder; they go into ``tensorboard/`` there.

    Raises:
        ConfigurationError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        _require("tensorboard")
        self._run = folder
        self._writer: Any = None

    def open(self, finished: int) -> None:
        """See :class:`Tracker`; what was written of later rounds is taken back."""
        from torch.utils.tensorboard import SummaryWriter

        folder = RunFolder(self._run).claim_folder("tensorboard")
        self._writer = SummaryWriter(str(folder), purge_step=finished + 1)
        self._close_to_others(folder)

    def write(self, number: int, values: dict[str, float]) -> None:
        """See :class:`Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def close(self) -> None:
        """See :class:`Tracker`."""
        if self._writer is not None:
            self._writer.close()
            self._close_to_others(self._run / "tensorboard")

    def _close_to_others(self, folder: Path) -> None:
        """TensorBoard makes files as the system does."""
        for path in folder.iterdir():
            path.chmod(PRIVATE_FILE)


class MLflow:
    """Logs metrics to MLflow, wherever its own settings (``MLFLOW_TRACKING_URI``) point.

    The run is named after the run folder, in MLflow's active experiment.

    Args:
        folder: The run folder.

    Raises:
        ConfigurationError: MLflow is not installed.
    """

    def __init__(self, folder: Path) -> None:
        _require("mlflow")
        self._folder = folder

    def open(self, finished: int) -> None:
        """See :class:`Tracker`."""
        import mlflow

        kept = self._folder / _RUN_ID
        known = kept.read_text(encoding="utf-8").strip() if finished and kept.exists() else None
        run = mlflow.start_run(run_id=known, run_name=None if known else self._folder.name)
        write_whole(RunFolder(self._folder).claim(_RUN_ID), run.info.run_id, CheckpointError)

    def write(self, number: int, values: dict[str, float]) -> None:
        """See :class:`Tracker`."""
        import mlflow

        mlflow.log_metrics(values, step=number)

    def close(self) -> None:
        """See :class:`Tracker`."""
        import mlflow

        mlflow.end_run()


_TRACKERS: dict[Name, Callable[[Path], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}


@contextmanager
def watched(
    observer: Observer, folder: Path, names: Sequence[Name] | None = None
) -> Iterator[Observer]:
    """An observer whose rounds are also tracked, until the context ends.

    A tracker that fails is left out from then on, with a warning: no round is lost by it.

    Args:
        observer: Hears of everything.
        folder: The run folder.
        names: Which trackers; None takes TensorBoard if it is installed, and MLflow if it is and
            ``MLFLOW_TRACKING_URI`` says where to.

    Raises:
        ConfigurationError: One that is named is not installed.
    """
    chosen = _usable() if names is None else names
    guarded = [_Guarded(_TRACKERS[name](folder)) for name in chosen]
    try:
        yield _Watched(observer, guarded)
    finally:
        for tracker in guarded:
            tracker.tell("close")


def numbers_of(record: RoundRecord) -> dict[str, float]:
    """What is worth a curve of a round: ``measure/global/accuracy``, ``bytes/down`` and so on."""
    values = {
        "bytes/down": float(sum(record.bytes_down.values())),
        "bytes/up": float(sum(record.bytes_up.values())),
        "clients/answered": float(len(record.bytes_up)),
        "clients/failed": float(len(record.failed)),
        "clients/refused": float(len(record.refused)),
        "clients/bounded": float(len(record.bounded)),
        "rejected": float(bool(record.rejected)),
        "seconds": record.seconds,
    }
    for name, losses in (("first", record.loss_first), ("last", record.loss_last)):
        if losses:
            values[f"loss/{name}"] = sum(losses.values()) / len(losses)
    for view, measures in record.measures.items():
        values.update({f"measure/{view}/{name}": value for name, value in measures.items()})
    values.update({f"scheme/{name}": float(value) for name, value in record.metrics.items()})
    if record.exposed:
        values["exposure/most"] = max(record.exposed.values())
    if record.exposed_together is not None:
        values["exposure/together"] = record.exposed_together
    return values


class _Guarded:
    """A tracker that may fail."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker: Tracker | None = tracker

    def tell(self, event: str, *words: Any) -> None:
        """Call a method of the tracker, unless one has failed before."""
        if self._tracker is None:
            return
        try:
            with _interrupted_later():
                getattr(self._tracker, event)(*words)
        except Exception as error:
            LOG.warning("%s fails and is left out: %s", type(self._tracker).__name__, error)
            self._tracker = None


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Let Ctrl-C wait until the context ends: what others do inside may lose it, or break by it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
        if came and callable(before):
            before(*came[0])


class _Watched(Observer):
    def __init__(self, observer: Observer, trackers: Sequence[_Guarded]) -> None:
        self._observer, self._trackers = observer, trackers

    def untried(self, reason: str) -> None:
        self._observer.untried(reason)

    def run_started(self, rounds: int, finished: int) -> None:
        self._observer.run_started(rounds, finished)
        for tracker in self._trackers:
            tracker.tell("open", finished)

    def base_doubted(self, reason: str) -> None:
        self._observer.base_doubted(reason)

    def round_started(self, number: int, clients: int) -> None:
        self._observer.round_started(number, clients)

    def waiting(self, text: str) -> None:
        self._observer.waiting(text)

    def client_refused(self, number: int, client: str, reason: str) -> None:
        self._observer.client_refused(number, client, reason)

    def client_finished(self, number: int, client: str, failure: str | None) -> None:
        self._observer.client_finished(number, client, failure)

    def client_bounded(self, number: int, client: str, cuts: str) -> None:
        self._observer.client_bounded(number, client, cuts)

    def client_unusual(self, number: int, client: str, why: str) -> None:
        self._observer.client_unusual(number, client, why)

    def client_left_out(self, number: int, client: str, reason: str) -> None:
        self._observer.client_left_out(number, client, reason)

    def round_rejected(self, number: int, reason: str) -> None:
        self._observer.round_rejected(number, reason)

    def checkpoint_saved(self, number: int, nbytes: int, kept: int) -> None:
        self._observer.checkpoint_saved(number, nbytes, kept)

    def round_finished(self, record: RoundRecord) -> None:
        self._observer.round_finished(record)
        for tracker in self._trackers:
            tracker.tell("write", record.round, numbers_of(record))


def _usable() -> list[Name]:
    usable: list[Name] = []
    if importlib.util.find_spec("tensorboard"):
        usable.append("tensorboard")
    if importlib.util.find_spec("mlflow") and os.environ.get("MLFLOW_TRACKING_URI"):
        usable.append("mlflow")
    return usable


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigurationError(
            "Rounds cannot be tracked as the file says",
            expected=f"the package {package}",
            found="none",
            fix=f"pip install {package}, or take it out of `track`.",
        )
