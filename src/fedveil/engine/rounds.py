"""The owner's half of a federation: who is sent what when, and what becomes of the answers."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import Tensor, nn

from fedveil.engine.beginning import Beginning
from fedveil.engine.bounds import Bounded, Bounds, Claim, times_median
from fedveil.engine.closing import Closing, Outcome
from fedveil.engine.crew import Answer, Crew, Desk, Job, Measures, order_of, seed_of, threads
from fedveil.engine.observer import Observer
from fedveil.engine.outliers import far_from_others
from fedveil.engine.spool import Spool
from fedveil.engine.verdict import Verdict
from fedveil.errors import (
    CheckpointError,
    ConfigurationError,
    ExposureError,
    FedveilError,
    ProtocolError,
)
from fedveil.files import write_whole
from fedveil.run import Exposure, Manifest
from fedveil.run.checkpoint import KEPT, Checkpoint, CheckpointFolder
from fedveil.run.client_files import ClientFiles
from fedveil.run.folder import RunFolder
from fedveil.run.ledger import open_ledger
from fedveil.run.records import RoundRecord
from fedveil.schemes import ServerSide, examples_of
from fedveil.secret import Secret
from fedveil.state import load_state, read_state
from fedveil.tasks import Prepared, Task
from fedveil.tasks.guessing import no_better_than_chance
from fedveil.training import evaluate
from fedveil.training.modes import on_device
from fedveil.wire import Limits, Message, reply_limits

__all__ = ["CrewFactory", "Evaluation", "Rounds"]

CrewFactory = Callable[[ClientFiles | None], AbstractContextManager[Crew]]

# Always the same, since the last bits of a loss depend on it.
MEASURING_THREADS = 2

_GLANCE = 32
"""Rows on which the global model is looked at in rounds in which it is not measured."""


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
        secret: The federation secret: who takes part, and with which seeds clients train, follow
            from it, so that no client can foresee the others'.
        seed: Another one gives other samples, batch orders and dropout under the same secret.
        clients_per_round: How many clients take part in a round; None for all.
        releases: How many proxies one client may be sent in all rounds together; None for any.
        bounds: How much one client may weigh and change.
        manifest: What the run is about. With a folder or a limit, every release is written down.
        exposure_limit: Share of the model that one client may be shown in all rounds together.
        evaluation: What is measured.
        folder: Where ``metrics.jsonl``, checkpoints and messages go; None writes nothing.
        keep_messages: Keep exactly the bytes that each client received, and its reply; or
            "proxies", what clients received alone.
        checkpoints: Of how many rounds checkpoints are kept.
        base: The owner's model before round 1.
        reached_by_base: What it reached, once a run has begun and if it is measured.
        doubt: Then, in words, that it is no better than chance, if it is not.
        limits: How much a reply may be; None for what an honest one can be at most.
        beside: What the scheme asks for beside updates; see :meth:`fedveil.schemes.Scheme.beside`.
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
    secret: Secret
    seed: int
    clients_per_round: int | None
    releases: int | None
    bounds: Bounds
    manifest: Manifest
    exposure_limit: float | None
    evaluation: Evaluation
    folder: Path | None
    keep_messages: bool | Literal["proxies"]
    observer: Observer
    checkpoints: int = KEPT
    base: Mapping[str, Tensor] | None = None
    limits: Limits | None = None
    beside: Mapping[str, int] = field(default_factory=dict)
    reached_by_base: dict[str, float] | None = field(default=None, init=False)
    doubt: str | None = field(default=None, init=False)
    _awaited: dict[str, Limits] = field(default_factory=dict, init=False)
    _released: list[str] = field(default_factory=list, init=False)
    _beginning: Beginning | None = field(default=None, init=False)

    def run(self, rounds: int, *, resume: bool, from_round: int | None = None) -> list[RoundRecord]:
        """Run until round ``rounds`` is finished; returns the records of all rounds.

        Args:
            rounds: Rounds in all.
            resume: Go on after the newest checkpoint.
            from_round: Go back to this round first, and give up those after it.

        Raises:
            CheckpointError: If a checkpoint is in the way, damaged, foreign, or cannot be written.
            ConfigurationError: If so many rounds need more releases than clients may be sent.
            FedveilError: If no client at all gave a usable reply in a round.
        """
        records = self._take_up(resume, from_round)
        self._open_exposure(records)
        if self.folder is not None and from_round is not None:
            # Only now, when all is known to be well, is what came after it given up.
            self._saved(self.folder).drop_after(from_round)
        self._write_metrics(records)
        self.check_budget(rounds)
        self.observer.run_started(rounds, len(records))
        self._measure_base()
        if len(records) >= rounds:
            return records
        with self._memories(len(records)) as memories, self.crew(memories) as clients:
            for number in range(len(records) + 1, rounds + 1):
                record = self._round(number, rounds, records, clients)
                records.append(record)
                self._save(records)
                if memories is not None:
                    memories.settle(self._oldest(number))
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
            memories = ClientFiles(RunFolder(self.folder).memories)
            if finished:
                memories.drop_after(finished)  # of a round that was cut short, or is given up
            else:
                memories.clear()
            yield memories

    def _measure_base(self) -> None:
        if self.base is not None and self.evaluation.base:
            self.reached_by_base = self._measure_state(self.base)
        if self.reached_by_base is not None and self.test is not None:
            self.doubt = no_better_than_chance(
                self.reached_by_base, self.task, self.test, self.model
            )
            if self.doubt is not None:
                self.observer.base_doubted(self.doubt)

    def _look(self, *, few: bool) -> Measures | None:
        """What the global model reaches now, on a few rows or all; None if that cannot be told."""
        if "global" not in self.server.views:
            return None
        return self._measure_state(self.server.view("global"), few=few)

    def _measure_state(self, state: Mapping[str, Tensor], *, few: bool = False) -> Measures | None:
        """What a model reaches on the owner's test set, or None without one."""
        if self.test is None:
            return None
        rows = self.test.part(range(min(_GLANCE, len(self.test)))) if few else self.test
        if self._beginning is None:
            self._beginning = Beginning(self.model, read_state(self.model).keys())
        self._beginning.restore()
        load_state(self.model, state)
        # The workers are idle meanwhile, but as many threads as workers would add up otherwise.
        with threads(MEASURING_THREADS), on_device(self.model, self.device):
            return evaluate(self.model, self.task, rows)

    def _round(
        self, number: int, rounds: int, records: Sequence[RoundRecord], clients: Crew
    ) -> RoundRecord:
        started = time.perf_counter()
        record, order = RoundRecord(number), self._order(number, records)
        present = clients.present(self._wanted)
        if present is not None:
            order = [client for client in order if client in present]
        self.observer.round_started(number, min(self._wanted, len(order)))
        is_due = _is_due(self.evaluation.every, number, rounds)
        begun, self._released, self._awaited = self.server.state(), [], {}
        self.server.begin_round(number)
        with Spool(self.folder) as spool:
            # The workers have the cores: more threads here would only wait for one another.
            with threads(1):
                jobs = self._jobs(record, order, rounds, clients)
                claims, measured = self._collect(record, clients.answers(jobs), spool)
            bounded = self.bounds.apply(claims)
            verdict = Verdict(records, self.reached_by_base, claims)
            outcome = Closing(
                self.server, number, begun, self._released, bounded, self._awaited, spool, verdict,
                partial(self._look, few=not is_due),
            ).run()  # fmt: skip
        self._write_down(record, outcome, bounded)
        record.unusual = far_from_others(record.loss_first, record.loss_last, times_median(claims))
        for client, why in record.unusual.items():
            self.observer.client_unusual(number, client, why)
        record.measures = self._measure(number, rounds, outcome.seen if is_due else None)
        if self._exposure is not None:
            record.exposed = {name: self._exposure.share([name]) for name in record.bytes_down}
            record.exposed_together = self._exposure.share(self._exposure.clients)
            record.ledger = self._exposure.head if self.folder is not None else None
        record.measures |= _mean_measures(measured)
        record.seconds = time.perf_counter() - started
        return record

    def _collect(
        self, record: RoundRecord, answers: Iterable[Answer], spool: Spool
    ) -> tuple[dict[str, Claim], list[tuple[Measures | None, Measures | None]]]:
        """Check every reply as it comes, and keep it until all have come.

        Returns:
            What the replies that can be used ask for, and what each client's proxy was measured at,
            before and after its training.

        Raises:
            ExposureError: No client may be sent anything.
            FedveilError: No client gave a usable reply.
        """
        claims: dict[str, Claim] = {}
        measured, failures = [], []
        for answer in answers:
            failure = self._receive(record, answer, claims, spool)
            failures += [failure] if failure else []
            measured.append((answer.before, answer.after))
            told = str(failure) if failure else None
            self.observer.client_finished(record.round, answer.client, told)
        if not measured:
            raise self._exhausted(record)
        if not claims:
            raise failures[0]
        return claims, measured

    def _write_down(
        self, record: RoundRecord, outcome: Outcome, bounded: Mapping[str, Bounded]
    ) -> None:
        """What came of the round, and of each reply."""
        record.metrics = dict(outcome.metrics)
        if outcome.rejected:
            record.rejected = outcome.problem
            self.observer.round_rejected(record.round, record.rejected)
            return
        if (client := outcome.left_out) is not None:
            why = f"left out, as the model is best without its update: {outcome.problem}"
            record.failed[client] = why
            for kept in (record.bytes_up, record.examples, record.loss_first, record.loss_last):
                kept.pop(client, None)
            self.observer.client_left_out(record.round, client, why)
        for client, given in bounded.items():
            if given.cuts and client != outcome.left_out:
                record.bounded[client] = "; ".join(given.cuts)
                self.observer.client_bounded(record.round, client, record.bounded[client])

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
        order = order_of(self.secret, self.seed, number, self.clients)
        if self.releases is None:
            return order
        sent = Counter(name for record in records for name in record.bytes_down)
        order = sorted(order, key=sent.__getitem__)
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
            message = self.server.release(client)
            self._released.append(client)
            proxy = write(message)
            if (reason := self._refusal(client, proxy)) is not None:
                record.refused[client] = reason
                self.observer.client_refused(record.round, client, reason)
                continue
            measure = views if len(record.bytes_down) < measured else ()
            record.bytes_down[client] = len(proxy)
            self._keep(record.round, client, "proxy", proxy)
            seed = seed_of(self.secret, self.seed, record.round, client)
            limits = self.limits or reply_limits(message, self.beside)
            self._awaited[client] = limits
            yield Job(client, proxy, seed, measure, limits)

    def _open_exposure(self, records: Sequence[RoundRecord]) -> None:
        """Everything that is written before a release, in places that are the run's own."""
        self._exposure = None
        if self.folder is not None:
            folder = RunFolder(self.folder)
            self._exposure = open_ledger(self.manifest, folder, records)
            for name in ("run.json", "metrics.jsonl"):
                folder.claim(name)
            for name in ("checkpoints", *(["messages"] if self.keep_messages else [])):
                folder.claim_folder(name)
            self.manifest.write(self.folder)
        elif self.exposure_limit is not None:
            self._exposure = Exposure(self.manifest)

    def _refusal(self, client: str, proxy: bytearray | memoryview) -> str | None:
        """Why a client may not be sent this; if it may, the release is written down."""
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

    def _receive(
        self, record: RoundRecord, answer: Answer, claims: dict[str, Claim], spool: Spool
    ) -> FedveilError | None:
        """Check one answer and keep it; returns why it cannot be used."""
        limits = self._awaited.get(answer.client, Limits())
        if answer.reply is not None and len(answer.reply) <= limits.max_bytes:
            self._keep(record.round, answer.client, "update", answer.reply)
        try:
            if answer.failure is not None or answer.reply is None:
                raise answer.failure or ProtocolError("A client gave no reply", where=answer.client)
            reply = Message.from_bytes(answer.reply, limits=limits)
            claim = Claim(examples_of(reply), self.server.inspect(answer.client, reply))
        except FedveilError as error:
            record.failed[answer.client] = str(error)
            return error
        spool.keep(answer.client, answer.reply)
        claims[answer.client] = claim
        record.bytes_up[answer.client] = len(answer.reply)
        record.examples[answer.client] = claim.examples
        for name, losses in (("loss_first", record.loss_first), ("loss_last", record.loss_last)):
            # Only a number for the log: a client that tells rubbish here loses no update by it.
            if isinstance(loss := reply.scalars.get(name), float):
                losses[answer.client] = loss
        return None

    def _measure(
        self, number: int, rounds: int, global_model: Measures | None
    ) -> dict[str, dict[str, float]]:
        """Measure the views that are due, each by an evaluation; the global model if it is not yet.

        Args:
            number: Of the round.
            rounds: In all.
            global_model: What that reaches, if it was measured.
        """
        if self.test is None:
            return {}
        measures = {}
        for view in self.server.views:
            every = self.evaluation.every if view == "global" else self.evaluation.proxies_every
            if _is_due(every, number, rounds):
                known = global_model if view == "global" else None
                measures[view] = known or self._measure_state(self.server.view(view)) or {}
        return measures

    def _take_up(self, resume: bool, from_round: int | None) -> list[RoundRecord]:
        """Continue from the newest checkpoint, or another, if that is wanted and there is one."""
        if self.folder is None:
            if resume:
                raise ConfigurationError(
                    "There is nothing to resume from", fix="Give the run a folder with out=..."
                )
            return []
        folder = self._saved(self.folder)
        if not resume:
            if folder.newest() is not None:
                raise CheckpointError(
                    "The run folder already holds a federation",
                    where=str(self.folder),
                    fix="Resume it, or use another folder.",
                )
            return []
        checkpoint = folder.load(self.configuration, from_round)
        if checkpoint is None:
            return []
        self.server.restore(checkpoint.state)
        return checkpoint.records

    def _save(self, records: Sequence[RoundRecord]) -> None:
        if self.folder is None:
            return
        checkpoint = Checkpoint(self.server.state(), list(records), self.configuration)
        folder = self._saved(self.folder)
        folder.save(checkpoint)
        self.observer.checkpoint_saved(len(records), folder.nbytes(), self.checkpoints)
        self._write_metrics(records)

    def _oldest(self, number: int) -> int:
        """The first round that a run can be taken back to, once round ``number`` is finished."""
        if self.folder is None:
            return number
        return min(self._saved(self.folder).rounds(), default=number)

    def _saved(self, folder: Path) -> CheckpointFolder:
        return CheckpointFolder(folder / "checkpoints", keep=self.checkpoints)

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
        fix = "The round before is in the checkpoint: free some space and run with resume."
        path = folder / f"{client}.{kind}.safetensors"
        # Nothing relies on it: that much data is not waited for until it is on disk.
        write_whole(path, data, CheckpointError, fix, synced=False)


def _is_due(every: int, number: int, rounds: int) -> bool:
    return number == rounds or (every > 0 and number % every == 0)


def _mean_measures(
    measured: Sequence[tuple[Measures | None, Measures | None]],
) -> dict[str, dict[str, float]]:
    means = {}
    for index, name in enumerate(("proxy_before", "proxy_after")):
        some = [pair[index] for pair in measured]
        found = [measures for measures in some if measures is not None]
        if found:
            means[name] = {key: sum(m[key] for m in found) / len(found) for key in found[0]}
    return means
