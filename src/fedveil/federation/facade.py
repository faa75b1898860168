"""The facade: a model, its clients, a scheme, and `run`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from fedveil.engine import Evaluation, Observer, Rounds
from fedveil.engine.bounds import Bounds
from fedveil.engine.crew import Crew
from fedveil.engine.in_process import Workplace, bare_architecture, workers
from fedveil.errors import AuditError, ConfigurationError
from fedveil.federation.clients import (
    Remote,
    Rows,
    check_names,
    name_clients,
    prepared,
    run_on,
    trainer_of,
)
from fedveil.federation.owner import Judge, Tuner, Tuning
from fedveil.federation.preflight import Preflight
from fedveil.federation.settings import (
    check_count,
    check_declared,
    check_keeping,
    check_limit,
    check_return,
)
from fedveil.federation.stage import Stage
from fedveil.run import Manifest, RoundRecord
from fedveil.run.checkpoint import KEPT, CheckpointFolder
from fedveil.run.client_files import ClientFiles
from fedveil.run.folder import RunFolder
from fedveil.schemes import Facts, FedQSN, Scheme, ServerSide, Transfer, check_public
from fedveil.schemes.likeness import Likeness, check_likeness, likeness_of
from fedveil.secret import Secret
from fedveil.state import (
    architecture_of,
    copy_of,
    fingerprint,
    read_state,
    with_state,
)
from fedveil.tasks import Prepared, Task
from fedveil.tasks.classes import check_stated
from fedveil.tasks.reading import check_read
from fedveil.training import Trainer, Training
from fedveil.unsupported import check_supported
from fedveil.wire import Limits

__all__ = ["Federation", "Result"]


@dataclass(frozen=True)
class Result:
    """What a federation leaves behind.

    Attributes:
        global_model: The owner's fine-tuned model, after the merge. An ordinary PyTorch or Hugging
            Face model: ``result.global_model.save_pretrained("tuned")``.
        rounds: A record of every round; the same lines are in ``metrics.jsonl``.
        base: What the model reached on the owner's test set before round 1; None if not measured.
        parameters_bytes: Bytes in float32 of what the scheme releases: what one fp32 release would
            take.
        doubt: In words, that the base is no better than chance, if it was measured and is not.
    """

    global_model: nn.Module
    rounds: list[RoundRecord]
    base: dict[str, float] | None
    parameters_bytes: int
    doubt: str | None = None

    def mean_bytes_down(self) -> float:
        """Mean bytes per client and round that the server sent."""
        return _mean([size for record in self.rounds for size in record.bytes_down.values()])

    def mean_bytes_up(self) -> float:
        """Mean bytes per client and round that a client returned."""
        return _mean([size for record in self.rounds for size in record.bytes_up.values()])


class Federation:
    """An owner's model and the clients on whose data it is fine-tuned.

    Example:
        >>> federation = fedveil.Federation(
        ...     model, clients, task=fedveil.TextClassification(tokenizer), scheme=fedveil.FedQSN()
        ... )  # doctest: +SKIP
        >>> result = federation.run(rounds=5)  # doctest: +SKIP

    With ``workers`` above 1 a script needs the usual ``if __name__ == "__main__":`` guard, because
    worker processes import it.

    Args:
        model: The owner's model. It is never changed.
        clients: Data sets by client name (letters, digits, ``.``, ``_``, ``-``), or a sequence,
            whose clients are called ``client-00`` and so on; or :class:`Remote` clients.
        task: What the model is trained for.
        scheme: The method; unless told, that of :meth:`FedQSN.default`.
        public: What the model was fine-tuned from, if anybody can get that. Clients are then sent
            proxies of it, and not a byte depends on the model, which learns on the server what they
            teach the public one (:class:`~fedveil.schemes.Transfer`). Without it, proxies are of
            the model itself.
        owner: With ``public``, the owner's own data: they say how much the model is to learn. Best
            are rows that it was not tuned on; some dozens are enough.
        tuning: With ``public``, what the model was made of it with, if the owner can repeat that:
            the server does so on what clients taught, and the rows of ``owner`` say what is better.
            Then ``public`` may be any model of the architecture, as a random initialization where
            nothing better is public.
        fresh: With ``public``, patterns of what the model did not begin with as it is there: a new
            head, such as "classifier.*". Best is a public model with the very head that the owner's
            began with, and no pattern.
        training: How clients train.
        test: The owner's test set; without it nothing is measured.
        evaluation: What is measured, and how often.
        clients_per_round: How many clients take part in a round; None for all.
        releases: How many proxies one client may be sent in all rounds together, counted over
            resumed runs too; None for any number. A client that fails after it was sent its proxy
            has used it up. A proxy shows what earlier rounds have added: in the only round of a
            federation nobody is shown any of its gain, in a second one everybody sampled is.
        exposure_limit: Share of the model's parameters, above 0 and up to 1, that one client may be
            shown in all rounds together; None for any. Who would be shown more sits a round out,
            and another client is asked instead (:class:`~fedveil.audit.Exposure` says what a share
            bounds, and what it does not).
        bounds: How much one client may weigh and change in a round; unless told, that of
            :class:`Bounds`, and ``Bounds.none()`` for what clients claim and send, as it is.
        secret: The federation secret. None draws a new one, which is then lost: a run that is to
            be resumed or repeated needs its secret kept by you.
        seed: Gives other samples, batch orders and dropout under the same secret. What clients are
            told of it follows from the secret, so that they cannot find it. Draw your model with
            another number, or from your system's entropy: this one is small enough to be guessed.
        workers: Client processes, one thread each. Results do not depend on it.
        out: Run folder for ``metrics.jsonl`` and checkpoints; None writes nothing. One run at a
            time works in it, and nothing in it is written over or removed that no run wrote.
        keep_messages: Keep exactly the bytes each client received and returned, under ``out``; with
            "proxies" only what it received, which is enough for an audit.
        checkpoints: Of how many rounds checkpoints are kept under ``out``. Each takes 4 bytes per
            parameter that is trained.
        limits: How much one reply may be, for clients that return more than updates of what they
            were sent; unless told, what an honest reply can be at most. What is more is not read.
        observer: Hears of every event.
        copy: Whether to take a copy of the model, which never leaves the server. False reads the
            model itself, which must then stay as it is: a full copy less in memory, and one that is
            mapped from its files (``from_pretrained``, :func:`fedveil.shards.load_into`) takes none
            of its own at all.

    Attributes:
        config_file: The file that describes the federation, if one does: ``run.json`` names it, so
            that the run can be audited from its folder alone.
        likeness: How far the public model is from the owner's; None without one.

    Does NOT protect what the scheme does not protect: read the docstring of the scheme. In process,
    clients share a machine with the owner; separation between companies takes an engine that runs
    over a network.

    Raises:
        DataError: If a client's data or the test set cannot be used; the error names the client.
        ConfigurationError: If a setting is impossible.
        UnknownArchitectureError: If no rule says which units the model has.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Mapping[str, Rows] | Sequence[Rows] | Remote,
        *,
        task: Task,
        scheme: Scheme | None = None,
        public: nn.Module | None = None,
        owner: Rows | None = None,
        tuning: Tuning | None = None,
        fresh: Sequence[str] = (),
        training: Training | None = None,
        test: Rows | None = None,
        evaluation: Evaluation | None = None,
        clients_per_round: int | None = None,
        releases: int | None = None,
        exposure_limit: float | None = None,
        bounds: Bounds | None = None,
        secret: Secret | None = None,
        seed: int = 0,
        workers: int = 1,
        out: str | Path | None = None,
        keep_messages: bool | Literal["proxies"] = False,
        checkpoints: int = KEPT,
        limits: Limits | None = None,
        observer: Observer | None = None,
        copy: bool = True,
    ) -> None:
        self.scheme = scheme or FedQSN.default(of_public=public is not None)
        self.training = training or Training()
        named = {} if isinstance(clients, Remote) else name_clients(clients)
        self._names = check_names(clients.names if isinstance(clients, Remote) else tuple(named))
        check_count("clients_per_round", clients_per_round, len(self._names))
        check_count("releases", releases, None)
        check_count("workers", workers, None)
        check_count("checkpoints", checkpoints, None)
        check_limit(exposure_limit)
        check_keeping(keep_messages, out)
        # A secret that nobody keeps cannot be used to resume.
        self._secret_is_kept = secret is not None
        self._secret = secret or Secret.generate()
        for one in (model, public):
            if one is not None:
                check_supported(one, self.scheme.tensors)
        # Never changed: whatever changes is made from it.
        self._model = copy_of(model) if copy else model
        self._seed, self._workers = seed, workers
        self._clients_per_round, self._releases = clients_per_round, releases
        self._exposure_limit, self._checkpoints = exposure_limit, checkpoints
        self._bounds = check_declared(bounds or Bounds(), self._names)
        self._limits = limits
        self.config_file: Path | None = None
        self._evaluation = evaluation or Evaluation()
        self._out, self._keep_messages = (Path(out) if out is not None else None), keep_messages
        self._observer = observer or Observer()
        self._task = task
        self._test = None if test is None else prepared("the test set", task, test)
        self._trainers = {
            name: trainer_of(name, task, data, self.training) for name, data in named.items()
        }
        self._public, self._owner, self._fresh = None, None, tuple(fresh)
        self._tuning: Trainer | None = None
        if public is not None or owner is not None or fresh or tuning is not None:
            self._public, self._owner = self._read_public(model, public, owner, copy=copy)
        if tuning is not None:
            rows = prepared("the rows of the owner's tuning", task, tuning.rows)
            self._tuning = Trainer(task, rows, tuning.training)
            self._tuning.trainable(self._architecture())  # says now what it cannot train
        check_stated(model, task, {**named, "the test set": test, "the owner's data": owner})
        check_read(task, {name: trainer.data for name, trainer in self._trainers.items()})
        at_hand = (self._test, self._owner, *(one.data for one in self._trainers.values()))
        self.scheme.check(self.released, run_on(task, at_hand))
        self._server()  # says now what it cannot work with
        self.likeness = self._read_likeness()
        self._is_own, self._fingerprint = copy, fingerprint(self._model)

    def run(
        self,
        rounds: int = 1,
        *,
        resume: bool = False,
        from_round: int | None = None,
        overwrite: bool = False,
        crew: Crew | None = None,
    ) -> Result:
        """Run until round ``rounds`` is finished.

        Args:
            rounds: Number of rounds in all.
            resume: Continue from the newest checkpoint in ``out``, if there is one, to the same
                result as an uninterrupted run. One that is damaged is passed over, with a warning,
                for the one before.
            from_round: With ``resume``, go back to this round and run those after it anew, as when
                a client has done harm. From there on clients may be left out, and the bounds be
                others. Kept messages of the rounds that are given up are written over; the
                exposure ledger goes on counting what they showed.
            overwrite: Remove an earlier run from ``out`` first.
            crew: Who does the clients' part, if they are on other machines (:mod:`fedveil.flower`);
                None works with the data at hand, on this one.

        Before anything is released, one round in small is tried on a few rows of the owner's (in a
        simulation without any, of a client's), whose proxy is thrown away: what would fail at every
        client fails then. Without rows only names and types are looked at, and the observer hears.

        Raises:
            ConfigurationError: If the rounds need more releases than clients may be sent, or the
                model, used without a copy, is not what it was, or cannot be trained as it is told.
            TrainingError: If a step of training fails with the owner's rows.
            CheckpointError: If ``out`` already holds a run and neither of the two is set, another
                run is at work there, or something else is in the way; or its checkpoint belongs to
                another configuration or is damaged, or its exposure ledger is not what it was.
            FedveilError: If no client gave a usable reply in a round.
        """
        check_count("rounds", rounds, None)
        check_return(from_round, rounds, resume=resume)
        if crew is None and not self._trainers:
            raise ConfigurationError(
                "The clients' data are on other machines",
                expected="an engine that reaches them",
                found="none",
                fix="Run it with a crew that reaches them: see fedveil.flower.",
            )
        if resume and not self._secret_is_kept:
            raise ConfigurationError(
                "A run can only be resumed with the secret it was begun with",
                fix="Pass secret=Secret.from_file(...), to both runs.",
            )
        configuration = self.configuration()
        self._try_first(here=crew is None)
        server = self._server()
        # What measures takes memory only if there is something to measure it on.
        measured = self._architecture(None if self._test is not None else "meta")
        own = self.scheme.tensors(self._model)
        manifest = Manifest.of(own, server.groups, configuration, self.config_file, self._facts())
        engine = Rounds(
            server=server,
            crew=self._in_process if crew is None else lambda _: nullcontext(crew),
            clients=self._names,
            # Clients elsewhere keep what they keep on their own machines.
            remembers=crew is None and self.scheme.client().remembers,
            task=self._task,
            test=self._test,
            model=measured,
            device=self.training.device,
            configuration=configuration,
            secret=self._secret,
            seed=self._seed,
            clients_per_round=self._clients_per_round,
            releases=self._releases,
            bounds=self._bounds,
            manifest=manifest,
            exposure_limit=self._exposure_limit,
            evaluation=self._evaluation,
            folder=self._out,
            keep_messages=self._keep_messages,
            observer=self._observer,
            checkpoints=self._checkpoints,
            base=read_state(self._model),
            limits=self._limits,
            beside=self.scheme.beside(self.released),
        )
        engine.check_budget(rounds)
        with self._alone_in_folder(overwrite=overwrite and not resume):
            records = engine.run(rounds, resume=resume, from_round=from_round)
        base, doubt = engine.reached_by_base, engine.doubt
        final = server.final()
        del engine, measured, server  # the result needs room
        model = with_state(self._model, final)
        return Result(model, records, base, _fp32_bytes(own), doubt)

    def _try_first(self, *, here: bool) -> None:
        """One round in small, before anything is written or released."""
        several = here and self._workers > 1
        untried = Preflight(
            self.scheme, self.released, self.workplace(), self.training, self._rows_to_try(),
            here, several,
        ).run()  # fmt: skip
        if untried:
            self._observer.untried(untried)

    def _rows_to_try(self) -> Prepared | None:
        """The owner's rows; in a simulation a client's, if there are no others."""
        tuned = None if self._tuning is None else self._tuning.data
        clients = [self._trainers[name].data for name in sorted(self._trainers)]
        return next((rows for rows in (self._owner, self._test, tuned, *clients) if rows), None)

    @contextmanager
    def _alone_in_folder(self, *, overwrite: bool) -> Iterator[None]:
        if self._out is None:
            yield
            return
        with RunFolder(self._out).held() as folder:
            folder.prepare(["messages"] if self._keep_messages else [], overwrite=overwrite)
            yield

    @property
    def model(self) -> nn.Module:
        """The base: what the federation begins with. Not to be changed."""
        return self._model

    @property
    def released(self) -> nn.Module:
        """What proxies are of: the public model if there is one, else the base. Likewise."""
        return self._model if self._public is None else self._public

    @property
    def task(self) -> Task:
        """What the model is trained for."""
        return self._task

    def stage(self, public: nn.Module | None = None) -> Stage:
        """What an audit of the run in ``out`` measures with; see :func:`fedveil.audit.audit`.

        Args:
            public: A model of the same architecture that anybody can get, from which attackers may
                begin: what the owner itself began with, if that is public. None if there is none
                but what the federation releases in the model's place.

        Raises:
            AuditError: There is no finished round, no folder, or no test set.
            CheckpointError: The run is of another configuration.
        """
        if self._out is None or self._test is None:
            raise AuditError(
                "An audit needs the folder of a run, and a test set",
                found="no test set" if self._test is None else "no folder",
                fix="Make the federation with out=... and test=..., as it was run.",
            )
        checkpoint = CheckpointFolder(self._out / "checkpoints").load(self.configuration())
        if checkpoint is None:
            raise AuditError(
                "The run has no finished round", where=str(self._out), fix="Run the federation."
            )
        server = self._server()
        server.restore(checkpoint.state)
        known = public if public is not None else self._public
        models = {"base": read_state(self._model)}
        if "server_model" in server.views:
            models["server_model"] = server.view("server_model")
        return Stage(
            self._architecture(),
            self._task,
            self._test,
            self.training,
            {name: trainer.data for name, trainer in self._trainers.items()},
            {**models, "global": server.final()},
            None if known is None else read_state(known),
            self._seed,
            self.scheme,
        )

    def configuration(self) -> dict[str, Any]:
        """What decides the result, as plain values; the secret appears as its fingerprint.

        Raises:
            ConfigurationError: If the model, used without a copy, is not what it was.
        """
        if not self._is_own and fingerprint(self._model) != self._fingerprint:
            raise ConfigurationError(
                "The model has changed since the federation was made with it",
                fix="Make a new Federation, or let it keep a copy with copy=True.",
            )
        return {
            "scheme": {"name": self.scheme.name, **asdict(self.scheme)},  # type: ignore[call-overload]
            "training": asdict(self.training),
            # Of clients on other machines nobody here knows how much they have.
            "clients": {
                name: self._trainers[name].examples if name in self._trainers else None
                for name in sorted(self._names)
            },
            "clients_per_round": self._clients_per_round,
            "releases": self._releases,
            "bounds": asdict(self._bounds),
            "seed": self._seed,
            "secret": self._secret.fingerprint(),
            "model": self._fingerprint,
            # Only where it is set: earlier versions did not know it.
            **({} if self._exposure_limit is None else {"exposure_limit": self._exposure_limit}),
            **self._transferred(),
        }

    def _facts(self) -> Facts:
        """What an audit may take for granted of the releases."""
        facts = self.scheme.facts()
        return facts if self._public is None else replace(facts, of_owner=False)

    def _transferred(self) -> dict[str, Any]:
        if self._public is None or self._owner is None:
            return {}
        # Only where they are set: earlier versions did not know them.
        fresh = {"fresh": [*self._fresh]} if self._fresh else {}
        tuning = {}
        if self._tuning is not None:
            tuning = {"tuning": asdict(self._tuning.training), "tuned": self._tuning.examples}
        return {"public": fingerprint(self._public), "owner": len(self._owner), **fresh, **tuning}

    def _read_public(
        self, model: nn.Module, public: nn.Module | None, owner: Rows | None, *, copy: bool
    ) -> tuple[nn.Module, Prepared]:
        if public is None or owner is None:
            raise ConfigurationError(
                "A public model to be released and the owner's data belong together",
                expected="public=... and owner=..., or neither",
                found="no public model" if public is None else "no data of the owner",
                fix="Some dozens of the owner's rows say how much the owner's model is to learn.",
            )
        if public is model:
            raise ConfigurationError(
                "The public model is the owner's own, which would be released as it is",
                expected="what it was fine-tuned from, or a random initialization",
                found="the same object",
            )
        check_public(self.scheme, public, self._model)
        rows: Prepared = prepared("the owner's data", self._task, owner)
        return copy_of(public) if copy else public, rows

    def _read_likeness(self) -> Likeness | None:
        """How far the public model is from the owner's, if these are two."""
        if self._public is None or self._owner is None:
            return None
        own = self.scheme.tensors(self._model)
        left = () if self._tuning is None else self._tuning.training.frozen
        likeness = likeness_of(self._public, self._model, own.keys(), left)
        judge = Judge(self._architecture, self._task, self._owner, self.training.device)
        check_likeness(likeness, self._public, own, judge)
        return likeness

    def _server(self) -> ServerSide:
        if self._public is None or self._owner is None:
            return self.scheme.server(self._model, self._secret)
        make = self._architecture
        judge = Judge(make, self._task, self._owner, self.training.device)
        tune = None if self._tuning is None else Tuner(make, self._tuning, self._seed)
        return Transfer(
            self.scheme, self._public, self._model, self._secret, judge, self._fresh, tune
        )

    def _in_process(self, memories: ClientFiles | None) -> AbstractContextManager[Crew]:
        return workers(replace(self.workplace(), memories=memories), self._workers)

    def _architecture(self, device: str | None = None) -> nn.Module:
        """What measures: the model without the values of what the scheme releases."""
        released = self.released
        return architecture_of(released, device, zero=self.scheme.tensors(released))

    def workplace(self) -> Workplace:
        """What clients have, for who does their part: no weights, no secret."""
        side = self.scheme.client()
        return Workplace(
            bare_architecture(self.scheme, self.released),
            side,
            self._task,
            self._trainers,
            self._test,
            device=self.training.device,
        )


def _fp32_bytes(state: Mapping[str, Tensor]) -> int:
    return 4 * sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
