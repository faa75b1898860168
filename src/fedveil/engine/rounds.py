"""The owner's half of a federation: who is sent what when, and what becomes of the answers."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import nn

from fedveil.audit import Exposure, Manifest
from fedveil.engine.checkpoint import Checkpoint, CheckpointFolder
from fedveil.engine.crew import Answer, Crew, Desk, Job, seed_of, threads
from fedveil.engine.memory import ClientFiles
from fedveil.engine.observer import Observer
from fedveil.engine.records import RoundRecord
from fedveil.errors import (
    CheckpointError,
    ConfigurationError,
    ExposureError,
    FedveilError,
    ProtocolError,
)
from fedveil.files import write_whole
from fedveil.schemes import ServerSide, examples_of
from fedveil.state import load_state
from fedveil.training import Prepared, Task, evaluate
from fedveil.training.modes import on_device
from fedveil.wire import Message

__all__ = ["CrewFactory", "Evaluation", "Rounds", "clear"]

CrewFactory = Callable[[ClientFiles | None], AbstractContextManager[Crew]]

# What clients keep, in the run folder.
_CLIENTS = "clients"

# Always the same, since the last bits of a loss depend on it.
MEASURING_THREADS = 2


@dataclass(frozen=True)
class Evaluation:
    """What is measured on the owner's test set, and how often.

    Attributes:
        every: Measure the global model every so many rounds; 0 only after the last.
        proxies_every: The same for the server model and for the clients' proxies, as received and
            as trained, which costs two evaluations per client.
        proxies: Measure at most this many of a round's clients; None measures all.
        received: Measure proxies as received, too, and not only as trained.
        base: Measure the base, too. Whoever compares schemes on one base needs it only once.
    """

    every: int = 1
    proxies_every: int = 0
    proxies: int | None = None
    received: bool = True
    base: bool = True

    def __post_init__(self) -> None:
        for name in ("every", "proxies_every", "proxies"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not whole and not (name == "proxies" and value is None):
                raise ConfigurationError(
                    f"The setting {name!r} is impossible",
                    expected="an integer of at least 0",
                    found=repr(value),
                )


@dataclass
class Rounds:
    """Runs rounds. Clients are sampled anew in each; replies are absorbed in sampled order.

    The same configuration, secret and seed give the same bytes, wherever clients are.

    Attributes:
        server: The owner's half of the scheme.
        crew: Makes those who do the clients' part, until its context ends; it is given what clients
            keep between rounds, if they keep anything on this machine.
        clients: Names of all clients.
        remembers: Whether clients of the scheme keep something between rounds.
        task: What the model is for.
        test: The owner's test set; None measures nothing.
        model: The owner's model object, used to measure; its weights are overwritten.
        device: Where it is measured; None where it is.
        configuration: What a checkpoint must agree with to be resumed.
        seed: Decides sampling, batch order and dropout; nothing secret.
        clients_per_round: How many clients take part in a round; None for all.
        releases: How many proxies one client may be sent in all rounds together; None for any.
        manifest: What the run is about. With a folder or a limit, every release is written down.
        exposure_limit: Share of the model that one client may be shown in all rounds together.
        evaluation: What is measured.
        folder: Where ``metrics.jsonl``, checkpoints and messages go; None writes nothing.
        keep_messages: Keep exactly the bytes that each client received, and its reply; or
            "proxies", what clients received alone.
    """

    server: ServerSide
    crew: CrewFactory
    clients: Sequence[str]
    remembers: bool
    task: Task
    test: Prepared | None
    model: nn.Module
    device: str | None
    configuration: Mapping[str, Any]
    seed: int
    clients_per_round: int | None
    releases: int | None
    manifest: Manifest
    exposure_limit: float | None
    evaluation: Evaluation
    folder: Path | None
    keep_messages: bool | Literal["proxies"]
    observer: Observer

    def run(self, rounds: int, *, resume: bool) -> list[RoundRecord]:
        """Run until round ``rounds`` is finished; returns the records of all rounds.

        Raises:
            CheckpointError: If a checkpoint is in the way, damaged, foreign, or cannot be written.
            ConfigurationError: If so many rounds need more releases than clients may be sent.
            FedveilError: If no client at all gave a usable reply in a round.
        """
        records = self._take_up(resume)
        self._open_exposure()
        self._write_metrics(records)
        self.check_budget(rounds)
        self.observer.run_started(rounds, len(records))
        if len(records) >= rounds:
            return records
        with self._memories(len(records)) as memories, self.crew(memories) as clients:
            for number in range(len(records) + 1, rounds + 1):
                record = self._round(number, rounds, self._order(number, records), clients)
                records.append(record)
                self._save(records)
                if memories is not None:
                    memories.settle(number)
                self.observer.round_finished(record)
        return records

    @contextmanager
    def _memories(self, finished: int) -> Iterator[ClientFiles | None]:
        """What clients keep between rounds, if they do: with the run, or as long as it lasts."""
        if not self.remembers:
            yield None
        elif self.folder is None:
            with TemporaryDirectory(prefix="fedveil-") as folder:
                yield ClientFiles(Path(folder))
        else:
            memories = ClientFiles(self.folder / _CLIENTS)
            if not finished:
                memories.clear()
            yield memories

    def measure_model(self, model: nn.Module) -> dict[str, float] | None:
        """What a model reaches on the owner's test set, or None without one."""
        if self.test is None:
            return None
        # The workers are idle meanwhile, but as many threads as workers would add up otherwise.
        with threads(MEASURING_THREADS), on_device(model, self.device):
            return evaluate(model, self.task, self.test)

    def _round(self, number: int, rounds: int, order: Sequence[str], clients: Crew) -> RoundRecord:
        started = time.perf_counter()
        record = RoundRecord(number)
        present = clients.present(self._wanted)
        if present is not None:
            order = [client for client in order if client in present]
        self.observer.round_started(number, min(self._wanted, len(order)))
        self.server.begin_round(number)
        answers, failures = [], []
        # The workers have the cores: more threads here would only wait for one another.
        with threads(1):
            for answer in clients.answers(self._jobs(record, order, rounds, clients)):
                failure = self._absorb(record, answer)
                failures += [failure] if failure else []
                answers.append(answer)
                told = str(failure) if failure else None
                self.observer.client_finished(number, answer.client, told)
        if not answers:
            raise self._exhausted(record)
        if len(failures) == len(answers):
            raise failures[0]
        record.metrics = dict(self.server.end_round())
        if self._exposure is not None:
            record.exposed = {name: self._exposure.share([name]) for name in record.bytes_down}
            record.exposed_together = self._exposure.share(self._exposure.clients)
        record.measures = self._measure(number, rounds) | _mean_measures(answers)
        record.seconds = time.perf_counter() - started
        return record

    @property
    def _wanted(self) -> int:
        return self.clients_per_round or len(self.clients)

    def check_budget(self, rounds: int) -> None:
        """Refuse so many rounds if they need more releases than clients may be sent.

        Raises:
            ConfigurationError: If they do.
        """
        allowed = len(self.clients) * (self.releases or rounds)
        if rounds * self._wanted > allowed:
            raise ConfigurationError(
                "So many rounds need more releases than clients may be sent",
                expected=f"at most {allowed // self._wanted} rounds of {self._wanted} clients",
                found=f"{rounds} rounds with releases={self.releases}",
                fix="Take fewer rounds with more local steps, fewer clients_per_round, or raise "
                "releases.",
            )

    def _order(self, number: int, records: Sequence[RoundRecord]) -> list[str]:
        """Who is asked first in a round, until enough take part; who may not be is left out.

        If releases are limited, those come first who were sent least so far.
        """
        names = sorted(self.clients)
        dice = random.Random(f"{self.seed}/sample/{number}")  # noqa: S311
        if self.releases is None:
            chosen = dice.sample(names, self._wanted)
            rest = sorted(set(names) - set(chosen))
            return chosen + dice.sample(rest, len(rest))
        sent = Counter(name for record in records for name in record.bytes_down)
        order = sorted(dice.sample(names, len(names)), key=sent.__getitem__)
        return [name for name in order if sent[name] < self.releases]

    def _jobs(
        self, record: RoundRecord, order: Sequence[str], rounds: int, crew: Crew
    ) -> Iterator[Job]:
        is_due = _is_due(self.evaluation.proxies_every, record.round, rounds)
        most = self.evaluation.proxies
        measured = 0 if not is_due else len(order) if most is None else most
        views = ("before", "after") if self.evaluation.received else ("after",)
        write = Desk().write if crew.one_at_a_time else Message.to_bytes
        for client in order:
            if len(record.bytes_down) == self._wanted:
                return
            proxy = write(self.server.release(client))
            if (reason := self._refusal(client, proxy)) is not None:
                record.refused[client] = reason
                self.observer.client_refused(record.round, client, reason)
                continue
            measure = views if len(record.bytes_down) < measured else ()
            record.bytes_down[client] = len(proxy)
            self._keep(record.round, client, "proxy", proxy)
            yield Job(client, proxy, seed_of(self.seed, record.round, client), measure)

    def _open_exposure(self) -> None:
        self._exposure = None
        if self.folder is not None:
            self.manifest.write(self.folder)
        if self.folder is not None or self.exposure_limit is not None:
            self._exposure = Exposure(self.manifest, self.folder)

    def _refusal(self, client: str, proxy: bytearray | memoryview) -> str | None:
        """Why a client may not be sent this; if he may, it is written down as released."""
        if self._exposure is None:
            return None
        message = Message.from_bytes(proxy)
        if self.exposure_limit is not None:
            share = self._exposure.share_after(client, message)
            if share > self.exposure_limit:
                return (
                    f"it would bring what {client} was shown to {share:.1%} of the model, "
                    f"and {self.exposure_limit:.1%} are allowed"
                )
        self._exposure.record(message)
        return None

    def _exhausted(self, record: RoundRecord) -> ExposureError:
        return ExposureError(
            f"No client may be released a proxy in round {record.round}",
            expected=f"a release within exposure_limit={self.exposure_limit}",
            found=next(iter(record.refused.values()), "no client"),
            fix="The rounds before are kept. Sticky or grouped masks show a client nothing new in "
            "later rounds; higher mask rates show less in the first.",
        )

    def _absorb(self, record: RoundRecord, answer: Answer) -> FedveilError | None:
        """Use one answer; returns why it could not be used."""
        if answer.reply is not None:
            self._keep(record.round, answer.client, "update", answer.reply)
        try:
            if answer.failure is not None or answer.reply is None:
                raise answer.failure or ProtocolError("A client gave no reply", where=answer.client)
            reply = Message.from_bytes(answer.reply)
            examples = examples_of(reply)
            self.server.absorb(answer.client, reply, float(examples))
        except FedveilError as error:
            record.failed[answer.client] = str(error)
            return error
        record.bytes_up[answer.client] = len(answer.reply)
        record.examples[answer.client] = examples
        for name, losses in (("loss_first", record.loss_first), ("loss_last", record.loss_last)):
            # Only a number for the log: a client that tells rubbish here loses no update by it.
            if isinstance(loss := reply.scalars.get(name), float):
                losses[answer.client] = loss
        return None

    def _measure(self, number: int, rounds: int) -> dict[str, dict[str, float]]:
        """Measure the views that are due: each costs one evaluation."""
        if self.test is None:
            return {}
        measures = {}
        for view in self.server.views:
            every = self.evaluation.every if view == "global" else self.evaluation.proxies_every
            if _is_due(every, number, rounds):
                load_state(self.model, self.server.view(view))
                measures[view] = self.measure_model(self.model) or {}
        return measures

    def _take_up(self, resume: bool) -> list[RoundRecord]:
        """Continue from the newest checkpoint, if that is wanted and there is one."""
        if self.folder is None:
            if resume:
                raise ConfigurationError(
                    "There is nothing to resume from", fix="Give the run a folder with out=..."
                )
            return []
        folder = CheckpointFolder(self.folder / "checkpoints")
        if not resume:
            if folder.newest() is not None:
                raise CheckpointError(
                    "The run folder already holds a federation",
                    where=str(self.folder),
                    fix="Resume it, or use another folder.",
                )
            return []
        checkpoint = folder.load(self.configuration)
        if checkpoint is None:
            return []
        self.server.restore(checkpoint.state)
        return checkpoint.records

    def _save(self, records: Sequence[RoundRecord]) -> None:
        if self.folder is None:
            return
        checkpoint = Checkpoint(self.server.state(), list(records), self.configuration)
        CheckpointFolder(self.folder / "checkpoints").save(checkpoint)
        self._write_metrics(records)

    def _write_metrics(self, records: Iterable[RoundRecord]) -> None:
        """The whole file anew: it says what the checkpoint says, also after a crash in between."""
        if self.folder is None:
            return
        lines = "".join(json.dumps(record.to_json()) + "\n" for record in records)
        fix = "The round is in the checkpoint: free some space and run again with resume."
        write_whole(self.folder / "metrics.jsonl", lines, CheckpointError, fix)

    def _keep(self, number: int, client: str, kind: str, data: bytearray | memoryview) -> None:
        if self.folder is None or not self.keep_messages:
            return
        if self.keep_messages == "proxies" and kind != "proxy":
            return
        folder = self.folder / "messages" / f"round-{number:06d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{client}.{kind}.safetensors").write_bytes(data)
        except OSError as error:
            raise CheckpointError(
                "A message could not be kept",
                found=str(error),
                where=str(folder),
                fix="The round before is in the checkpoint: free some space and run with resume.",
            ) from error


def clear(folder: Path) -> None:
    """Remove what an earlier run wrote into its folder, and nothing else."""
    for name in ("checkpoints", "messages", _CLIENTS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "run.json", "exposure.jsonl", "audit.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def _is_due(every: int, number: int, rounds: int) -> bool:
    return number == rounds or (every > 0 and number % every == 0)


def _mean_measures(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    means = {}
    for name in ("before", "after"):
        measured = [m for answer in answers if (m := getattr(answer, name)) is not None]
        if measured:
            means[f"proxy_{name}"] = {
                key: sum(m[key] for m in measured) / len(measured) for key in measured[0]
            }
    return means
