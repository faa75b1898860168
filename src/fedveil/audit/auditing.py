"""The audit of a run: attacks are tried, checks made, and what was found is put in words."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedveil.audit.attacks import (
    FACTORS,
    SHARES,
    Loot,
    UpdateGuess,
    amplify,
    average,
    between,
    can_forge,
    distil,
    extrapolate,
    federate,
    fill,
    heal,
    infer_updates,
    intersect,
    lacks_classes,
    sparing,
    union,
)  # fmt: skip
from fedveil.audit.attacks.distillation import scores_of
from fedveil.audit.checks import check
from fedveil.audit.evidence import Evidence, Kept
from fedveil.audit.untrained import untrained
from fedveil.audit.words import NOT_PROTECTED, sentence
from fedveil.errors import AuditError, ConfigurationError
from fedveil.federation.stage import Stage, State
from fedveil.run.exposure import Exposure
from fedveil.run.findings import (
    BASE,
    NAMED,
    NOTHING,
    RELEASED,
    Attacked,
    Audit,
    ClientExposure,
)  # fmt: skip
from fedveil.schemes import Facts
from fedveil.state import fingerprint, load_state
from fedveil.tasks.guessing import no_better_than_chance
from fedveil.tasks.metrics import Metric, metric_of

__all__ = ["audit"]

QUICK, FULL = (1, 3), (1, 2, 3, 5, 10, 20, 50)
"""How many clients pool what they were sent: in a quick audit, and in a full one (also all)."""
EFFORT = {False: 2, True: 6}
"""An attacker trains as many times longer than in the federation, at most, in a full audit."""
Tell = Callable[[str], None]


def audit(
    evidence: Evidence,
    stage: Stage,
    *,
    full: bool = False,
    coalitions: Collection[int] | None = None,
    tell: Tell = lambda text: None,
) -> Audit:
    """Try what an attacker would, with exactly the bytes that clients received.

    Args:
        evidence: The run.
        stage: What the owner has.
        full: Try everything, for longer, and with more coalitions; else a quick set.
        coalitions: How many clients pool what they were sent, for each coalition that attacks; None
            for `QUICK`, or `FULL` and all clients. Those take part who saw most together. More
            clients than there are is all.
        tell: Hears of what is being done.

    Raises:
        AuditError: Messages are damaged, or of another run.
        ConfigurationError: A coalition of no client, or less; a task with a metric that models are
            not measured by.

    What it does NOT show: what a better attacker would reach. It is a floor under the leak, not a
    bound on it.
    """
    started, sizes = time.perf_counter(), _sizes(coalitions, full)
    attempt = _Attempt(evidence, stage, full, tell, metric_of(stage.task))
    checks = check(evidence, tell)
    tell("what each client was shown")
    attempt.measure_models()
    exposure, order = Exposure(evidence.manifest), list[str]()
    # Of messages that do not fit their units nobody can say what is known: the alarm says enough.
    if not any(one.raised for one in checks if one.check == "withheld units"):
        exposure = _exposure_of(evidence)
        order = _by_what_they_saw(exposure)
    for clients in _coalitions([name for name in order if name in stage.data], sizes):
        attempt.by(clients)
    found = Audit(
        sentence="",
        scheme=dict(evidence.manifest.configuration.get("scheme", {})),
        rounds=len(evidence.rounds),
        metric=attempt.metric.name,
        models=attempt.models,
        attacks=attempt.found,
        checks=checks,
        exposure=_exposed(evidence, exposure),
        coalitions={size: exposure.share(order[:size]) for size in range(1, len(order) + 1)},
        inferred=_inferred(evidence, order, tell),
        bytes_down=_bytes(evidence),
        full=full,
        seconds=time.perf_counter() - started,
        not_protected=list(NOT_PROTECTED),
        assumed=_assumed(evidence, stage),
        doubt=no_better_than_chance(attempt.models["base"], stage.task, stage.test, stage.model),
    )
    return replace(found, sentence=sentence(found))


def _assumed(evidence: Evidence, stage: Stage) -> str:
    """What was taken for public, beside what clients were sent."""
    if stage.public is None:
        return NOTHING
    base = stage.models["base"]
    if all(torch.equal(tensor, base[name]) for name, tensor in stage.public.items()):
        return BASE
    load_state(stage.model, stage.whole(stage.public))
    said = evidence.manifest.configuration.get("public")
    return RELEASED if said is not None and said == fingerprint(stage.model) else NAMED


@dataclass
class _Attempt:
    """Attacks on one run, and what has come of them so far."""

    evidence: Evidence
    stage: Stage
    full: bool
    tell: Tell
    metric: Metric
    models: dict[str, dict[str, float]] = field(default_factory=dict)
    own: dict[tuple[str, ...], dict[str, float]] = field(default_factory=dict)
    found: list[Attacked] = field(default_factory=list)

    def measure_models(self) -> None:
        """What the owner's models reach, and the public one."""
        public = {} if self.stage.public is None else {"public": self.stage.public}
        for name, state in {**self.stage.models, **public}.items():
            self.tell(f"measuring: {name}")
            self.models[name] = self.stage.measure(state)

    def by(self, clients: tuple[str, ...]) -> None:
        """Everything that one coalition tries."""
        sent = self.evidence.proxies(clients)
        self._own_work(clients, sent)
        loot = union(self.evidence, sent)
        start, holes = self._with_holes("union", clients, sent, loot)
        self._train("union", clients, sent, loot, start, holes)
        for last in self._shorter(sent) if self.full or len(clients) == 1 else ():
            short = [kept for kept in sent if kept.round <= last]
            self._fill("union", clients, short, union(self.evidence, short), holes)
        if self.full:
            for name, collect in (
                ("average", average), ("intersection", intersect), ("extrapolation", extrapolate),
            ):  # fmt: skip
                self._with_holes(name, clients, sent, collect(self.evidence, sent))
        if self._can_forge(sent):
            self._forge(clients)

    def _can_forge(self, sent: Sequence[Kept]) -> bool:
        """Whether these clients could have made all by themselves that they were sent."""
        stage = self.stage
        if stage.public is None or stage.scheme is None:
            return False
        load_state(stage.model, stage.whole(stage.public))
        return can_forge(stage.scheme, stage.model, sent)

    def _forge(self, clients: tuple[str, ...]) -> None:
        """What they reached is what they reach without a released byte."""
        mine = [n for n, a in enumerate(self.found) if a.clients == clients and a.released]
        for attack in [self.found[number] for number in mine]:
            self._note_own(clients, "forged", attack.polish, dict(attack.measures))
        for number in mine:
            attack = self.found[number]
            leak = self._share(attack.measures, self.own[clients])
            self.found[number] = replace(attack, leak=leak)

    def _own_work(self, clients: tuple[str, ...], sent: Sequence[Kept]) -> None:
        """What these clients reach without a released byte: the floor under every leak.

        A quick audit tries the public model alone, if there is one: from nothing they get less far.
        """
        public = self.stage.public
        if public is not None:
            self._learn_alone(clients, sent, public, "public")
        if public is None or self.full:
            self._learn_alone(clients, sent, self._untrained(), "nothing")

    def _learn_alone(
        self, clients: tuple[str, ...], sent: Sequence[Kept], start: State, origin: str
    ) -> None:
        stage, who = self.stage, _who(clients)
        healed = heal(
            stage.model, stage.task, stage.pooled(clients), stage.training, stage.whole(start),
            rounds=self._rounds(sent), seed=stage.seed,
            tell=lambda text: self.tell(f"{who}: own data alone, {text}"),
        )  # fmt: skip
        reached = self._better(stage.measure(start), stage.measure(healed.state))
        self._note_own(clients, origin, "healing", reached)
        if self.full:
            for polish, state in self._further(clients, sent, stage.whole(start), healed.state):
                self._note_own(clients, origin, polish, stage.measure(state))

    def _note_own(
        self, clients: tuple[str, ...], origin: str, polish: str, reached: dict[str, float]
    ) -> None:
        self.own[clients] = self._better(reached, self.own.get(clients, reached))
        self.found.append(
            Attacked(
                "own data alone", clients, 0, False, origin, polish, reached,
                leak=0.0, gain_shown=self._gain(reached),
            )
        )  # fmt: skip

    def _further(
        self, clients: tuple[str, ...], sent: Sequence[Kept], start: State, healed: State
    ) -> Iterator[tuple[str, State]]:
        """What else comes of training a model on: on the way back, and each attacker on his own."""
        stage, who = self.stage, _who(clients)
        for share in SHARES:
            yield "souping", between(start, healed, share)
        data = stage.pooled(clients)
        if lacks_classes(stage.task, data, stage.test):
            spared = heal(
                stage.model, stage.task, data, sparing(stage.training), start,
                rounds=self._rounds(sent), seed=stage.seed,
                tell=lambda text: self.tell(f"{who}: sparing, {text}"),
            )  # fmt: skip
            for share in (*SHARES, 1.0):
                yield "sparing", between(start, spared.state, share)
        if len(clients) > 1:
            yield "federating", federate(
                stage.model, stage.task, {name: stage.data[name] for name in clients},
                stage.training, start, rounds=len({kept.round for kept in sent}), seed=stage.seed,
                tell=lambda text: self.tell(f"{who}: federating, {text}"),
            )  # fmt: skip

    def _with_holes(
        self, name: str, clients: tuple[str, ...], sent: Sequence[Kept], loot: Loot
    ) -> tuple[State, str]:
        """Fill what is missing in every way that there is; the best, and how it was filled."""
        ways = ["zeros"] if self.stage.public is None or loot.share() == 1 else ["zeros", "public"]
        tried = [(*self._fill(name, clients, sent, loot, holes), holes) for holes in ways]
        # The best of what was measured: there is always one, as every measure is a number.
        _, stolen, holes = self.metric.best(tried, lambda one: one[0]) or tried[0]
        return stolen, holes

    def _fill(
        self, name: str, clients: tuple[str, ...], sent: Sequence[Kept], loot: Loot, holes: str
    ) -> tuple[dict[str, float], State]:
        """What comes of zeros, or of the public model, in the place of what is missing."""
        filling = self.stage.public if holes == "public" else None
        stolen = fill(loot, self.evidence.manifest, filling)
        return self._note(name, clients, sent, loot, stolen, holes, ""), stolen

    def _train(
        self,
        name: str,
        clients: tuple[str, ...],
        sent: Sequence[Kept],
        loot: Loot,
        start: State,
        holes: str,
    ) -> None:
        stage, who = self.stage, _who(clients)
        data, start = stage.pooled(clients), stage.whole(start)
        healed = heal(
            stage.model, stage.task, data, stage.training, start, rounds=self._rounds(sent),
            seed=stage.seed, tell=lambda text: self.tell(f"{who}: healing, {text}"),
        )  # fmt: skip
        self._note(name, clients, sent, loot, healed.state, holes, "healing")
        if self.full:
            for polish, state in self._further(clients, sent, start, healed.state):
                self._note(name, clients, sent, loot, state, holes, polish)
        if self.full and stage.public is not None:
            for factor in FACTORS:
                amplified = amplify(stage.public, start, factor)
                self._note(name, clients, sent, loot, amplified, holes, "amplification")
        if self.full and scores_of(stage.task) is not None:
            student = stage.public if stage.public is not None else self._untrained()
            taught = distil(
                stage.model, stage.task, data, stage.training, start, stage.whole(student),
                rounds=self._rounds(sent), seed=stage.seed,
                tell=lambda text: self.tell(f"{who}: distilling, {text}"),
            )  # fmt: skip
            self._note(name, clients, sent, loot, taught.state, holes, "distillation")

    def _note(
        self,
        name: str,
        clients: tuple[str, ...],
        sent: Sequence[Kept],
        loot: Loot,
        stolen: State,
        holes: str,
        polish: str,
    ) -> dict[str, float]:
        self.tell(f"{_who(clients)}: measuring {name}, holes: {holes}")
        measures = self.stage.measure(stolen)
        released, withheld = _errors(stolen, self.stage.models["global"], loot)
        leak = self._share(measures, self.own[clients])
        self.found.append(
            Attacked(
                name, clients, len({kept.round for kept in sent}), True, holes, polish, measures,
                leak, self._gain(measures), released, withheld,
            )
        )  # fmt: skip
        return measures

    def _gain(self, measures: Mapping[str, float]) -> float | None:
        return self._share(measures, self.models["base"])

    def _share(self, measures: Mapping[str, float], start: Mapping[str, float]) -> float | None:
        """How far on the way from a start to the owner's model."""
        name = self.metric.name
        return self.metric.share(measures[name], start[name], self.models["global"][name])

    def _better(self, one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
        """What reaches more; the first of two alike."""
        name = self.metric.name
        return other if self.metric.lead(other[name], one[name]) > 0 else one

    def _untrained(self) -> State:
        """What an attacker begins with who has no public model."""
        return untrained(self.stage.model, self.stage.models["global"], self.stage.seed)

    def _rounds(self, sent: Sequence[Kept]) -> int:
        """For how many rounds' work an attacker trains at most."""
        return EFFORT[self.full] * len({kept.round for kept in sent})

    def _shorter(self, sent: Sequence[Kept]) -> list[int]:
        """Rounds after which an attacker may have stopped listening, but for the last."""
        return sorted({kept.round for kept in sent})[:-1]


def _sizes(chosen: Collection[int] | None, full: bool) -> Collection[int]:
    if chosen is None:
        return (*FULL, sys.maxsize) if full else QUICK
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in chosen):
        raise ConfigurationError(
            "A coalition is of an impossible size",
            expected="1 client or more",
            found=", ".join(map(str, chosen)),
        )
    return chosen


def _coalitions(order: Sequence[str], sizes: Collection[int]) -> Iterator[tuple[str, ...]]:
    """Who attacks, the fewest first."""
    for size in sorted({min(size, len(order)) for size in sizes} - {0}):
        yield tuple(sorted(order[:size]))


def _exposure_of(evidence: Evidence) -> Exposure:
    """Counted anew, from the bytes themselves; of messages that were not kept, as written down.

    Raises:
        AuditError: A message is not the one that the run wrote down: it is of another run.
    """
    exposure, written = Exposure(evidence.manifest), Exposure(evidence.manifest, evidence.folder)
    for kept in evidence.proxies():
        exposure.record(kept.read())
    known = {(number, client): shown.to_json() for number, client, shown in written.releases()}
    for number, client, shown in exposure.releases():
        if known.get((number, client)) != shown.to_json():
            raise AuditError(
                "A kept message is not the one that the run released",
                expected="the units that exposure.jsonl lists",
                found="others" if (number, client) in known else "no such release there",
                where=f"round {number}, client {client}",
                fix="Audit a run with its own messages.",
            )
    for number, client, shown in written.releases():
        exposure.count(number, client, shown)
    return exposure


def _by_what_they_saw(exposure: Exposure) -> list[str]:
    """Clients so that each adds most to what those before hold; ties go to who was sent more."""
    sent = {name: [number for number, *_ in exposure.releases([name])] for name in exposure.clients}
    chosen: list[str] = []
    while len(chosen) < len(sent):
        rest = [name for name in sent if name not in chosen]
        chosen.append(
            max(
                rest,
                key=lambda name: (
                    exposure.share([*chosen, name]), sent[name][-1], len(sent[name]), name,
                ),
            )
        )  # fmt: skip
    return chosen


def _inferred(evidence: Evidence, order: Sequence[str], tell: Tell) -> list[UpdateGuess]:
    """What the client who saw most infers of the others; nothing if no updates were kept."""
    guesses = []
    for client in order[:1]:
        for guess in infer_updates(evidence, client):
            tell(f"{client}: inferring the others' updates of round {guess.round}")
            guesses.append(guess)
    return guesses


def _errors(stolen: State, truth: State, loot: Loot) -> tuple[float | None, float | None]:
    """Relative errors of weights where they are known, and where they are not."""
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for name, known in loot.known.items():
        if not truth[name].is_floating_point():
            continue
        wanted = truth[name].float()
        apart, size = (stolen[name].float() - wanted).square(), wanted.square()
        for side, where in ((True, known), (False, ~known)):
            sums[side][0] += float(apart[where].sum())
            sums[side][1] += float(size[where].sum())
    errors = [(a / b) ** 0.5 if b > 0 else None for a, b in (sums[True], sums[False])]
    return errors[0], errors[1]


def _exposed(evidence: Evidence, exposure: Exposure) -> dict[str, ClientExposure]:
    chance = _chance_of_more(evidence.manifest.facts)
    of_all, exposed = exposure.share(exposure.clients), {}
    for client in exposure.clients:
        share, bits = exposure.share([client]), exposure.mean_bits([client])
        added = None if chance is None else (of_all - share) * chance
        exposed[client] = ClientExposure(share, bits, exposure.history(client), added)
    return exposed


def _chance_of_more(facts: Facts) -> float | None:
    """How likely the next release shows a client a unit that others have; None if unknown."""
    if facts.client_mask == 0:
        return 0.0  # all are sent the same units
    if facts.client_mask is None or facts.policy is None:
        return None
    # A new mask shows each unit that it may show with the same chance; masks that stay, nothing.
    return 1 - facts.client_mask if facts.policy == "fresh" else 0.0


def _bytes(evidence: Evidence) -> dict[str, int]:
    sent = dict.fromkeys(evidence.clients, 0)
    for kept in evidence.proxies():
        sent[kept.client] += kept.path.stat().st_size
    return sent


def _who(clients: Sequence[str]) -> str:
    return clients[0] if len(clients) == 1 else f"{len(clients)} clients together"
