"""Progress of a run on the console: live on a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fedveil.engine import Observer
from fedveil.printable import one_line
from fedveil.report.words import human_bytes, human_percent, human_seconds
from fedveil.run import RoundRecord
from fedveil.screen import PlainConsole
from fedveil.tasks.metrics import metric_in

__all__ = ["ConsoleProgress"]


class ConsoleProgress(Observer):
    """Shows rounds, clients and how good the model is so far; names clients that failed, and why.

    On a terminal a bar moves below one line per round. Elsewhere (a file, a pipe, a log) there are
    only the lines, without control characters. Use it as a context manager so that the bar goes
    away when a run is interrupted:

        with ConsoleProgress(console) as progress:
            Federation(..., observer=progress).run(5)

    Args:
        console: Where to write; standard output unless told.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or PlainConsole()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._rounds = self._finished = self._clients = 0
        self._waiting = ""
        self._said_size = False

    def untried(self, reason: str) -> None:
        """See :class:`Observer`."""
        self._say(f"no round was tried in small before the first: {reason}", style="yellow")

    def run_started(self, rounds: int, finished: int) -> None:
        """See :class:`Observer`."""
        self.stop()
        self._rounds, self._finished, self._said_size = rounds, finished, False
        if finished >= rounds:
            self._say(f"all {rounds} rounds are finished already")
        elif finished:
            self._say(f"continuing after round {finished} of {rounds}")

    def base_doubted(self, reason: str) -> None:
        """See :class:`Observer`."""
        self._say(reason, style="bold yellow")

    def round_started(self, number: int, clients: int) -> None:
        """See :class:`Observer`."""
        self._clients, done = clients, number - 1 - self._finished
        if not self._console.is_terminal:
            return
        progress = self._progress or self._start()
        progress.update(
            self._task,
            total=(self._rounds - self._finished) * clients,
            completed=done * clients,
            description=f"round {number}/{self._rounds}",
            of_round=f"client 0/{clients}",
        )

    def waiting(self, text: str) -> None:
        """See :class:`Observer`; a line only if it says something new."""
        if text != self._waiting:
            self._waiting = text
            self._say(text)

    def client_refused(self, number: int, client: str, reason: str) -> None:
        """See :class:`Observer`."""
        self._say(f"round {number}: {client} sits out: {reason}", style="yellow")

    def client_finished(self, number: int, client: str, failure: str | None) -> None:
        """See :class:`Observer`."""
        if failure is not None:
            self._say(f"round {number}: {client} failed: {failure}", style="yellow")
        if self._progress is None:
            return
        self._progress.advance(self._task)
        done = int(self._progress.tasks[0].completed) % self._clients or self._clients
        self._progress.update(self._task, of_round=f"client {done}/{self._clients}")

    def client_bounded(self, number: int, client: str, cuts: str) -> None:
        """See :class:`Observer`."""
        self._say(f"round {number}: {client} counts for less: {cuts}", style="yellow")

    def client_unusual(self, number: int, client: str, why: str) -> None:
        """See :class:`Observer`."""
        self._say(f"round {number}: {client} is far from the others: {why}", style="yellow")

    def client_left_out(self, number: int, client: str, reason: str) -> None:
        """See :class:`Observer`."""
        self._say(f"round {number}: {client} is {reason}", style="bold red")

    def round_rejected(self, number: int, reason: str) -> None:
        """See :class:`Observer`."""
        self._say(f"round {number} is not applied: {reason}", style="bold red")

    def checkpoint_saved(self, number: int, nbytes: int, kept: int) -> None:
        """See :class:`Observer`; said once."""
        if not self._said_size:
            self._said_size = True
            size = human_bytes(nbytes)
            if kept == 1:
                self._say(f"the checkpoint of the last round is kept, {size}")
            else:
                self._say(f"checkpoints of the last {kept} rounds are kept, {size} each")

    def round_finished(self, record: RoundRecord) -> None:
        """See :class:`Observer`."""
        self._say(_line(record, self._rounds))
        if record.round >= self._rounds:
            self.stop()

    def stop(self) -> None:
        """Take the bar away, if there is one."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self) -> Progress:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[of_round]}"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, of_round="")
        self._progress.start()
        return self._progress

    def _say(self, line: str, style: str = "") -> None:
        # Text, not markup: names and reasons may hold brackets. Lines are left whole for grep.
        self._console.print(Text(one_line(line), style=style), soft_wrap=True)


def _reached(measures: Mapping[str, float]) -> str:
    """What a model reached: of a language model its loss, of others their accuracy."""
    metric = metric_in(measures)
    if metric.lower_is_better:
        return f"{metric.name} {metric.figure(measures[metric.name])}"
    return metric.text(measures[metric.name])


def _taken(metrics: Mapping[str, float]) -> str:
    """What the owner's model is made of, where clients train a public one."""
    if metrics.get("tuned"):
        return f"made of what clients taught + {metrics['tuned']:g} x the owner's tuning of that"
    if not metrics["taught"]:
        return "nothing taken over, as the base is best on the owner's rows"
    own, taught = metrics["own"], metrics["taught"]
    return f"made of {own:g} x the owner's tuning + {taught:g} x what clients taught"


def _line(record: RoundRecord, rounds: int) -> str:
    used = len(record.bytes_down) - len(record.failed)
    parts = [f"{used} of {len(record.bytes_down)} clients"]
    for view, name in (("global", "global model"), ("proxy_after", "trained proxy")):
        if view in record.measures:
            parts.append(f"{name} {_reached(record.measures[view])}")
    if "taught" in record.metrics:
        parts.append(_taken(record.metrics))
    for way, sizes in (("down", record.bytes_down), ("up", record.bytes_up)):
        parts.append(f"{human_bytes(sum(sizes.values()))} {way}")
    if record.exposed and record.exposed_together is not None:
        most = human_percent(100 * max(record.exposed.values()), sign=True)
        together = human_percent(100 * record.exposed_together, sign=True)
        parts.append(
            f"at most {most} of the model shown to one client so far, {together} to all together"
        )
    parts.append(human_seconds(record.seconds))
    return f"round {record.round}/{rounds}: " + ", ".join(parts)
