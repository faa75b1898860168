"""The audit of a run: attacks are tried, checks made, and what was found is put in words."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedveil.audit.attacks.coalition import Coalition, Simulated, Stolen
from fedveil.audit.attacks.imputation import PUBLIC_VALUES, ZEROS
from fedveil.audit.attacks.registry import (
    MESSAGES,
    MODEL,
    PUBLIC,
    UPDATES,
    Attack,
    Beginning,
    attacks,
)  # fmt: skip
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
    OWN_DATA,
    RELEASED,
    SIMULATED,
    Attacked,
    Audit,
    ClientExposure,
    UpdateGuess,
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
        inferred=attempt.inferred(order[0]) if order else [],
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


@dataclass(frozen=True)
class _Measured:
    """A model that an attack has made of messages, and what it reaches."""

    attack: str
    stolen: Stolen
    reached: dict[str, float]


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
        coalition = self.coalition(clients)
        self._own_work(coalition)
        begun = [self._collect(attack, coalition) for attack in attacks(MESSAGES, full=False)]
        best = self._best_of(one for one in begun if one is not None)
        if best is not None:
            self._go_on(coalition, best)
            self._after_each_round(coalition, best.stolen.holes)
        for attack in self._of(MESSAGES):
            if not attack.quick:
                self._collect(attack, coalition)
        if any(True for attack in self._of(PUBLIC) for _ in attack.on(coalition, Simulated)):
            self._count_as_own(coalition)

    def coalition(self, clients: tuple[str, ...]) -> Coalition:
        """Some clients that attack together, with all that they were sent."""
        sent = self.evidence.proxies(clients)
        who = _who(clients)
        return Coalition(
            clients, sent, self.evidence, self.stage,
            rounds=EFFORT[self.full] * _count_rounds(sent),
            ways=(ZEROS,) if self.stage.public is None else (ZEROS, PUBLIC_VALUES),
            untrained=self._untrained, tell=lambda text: self.tell(f"{who}: {text}"),
        )  # fmt: skip

    def inferred(self, client: str) -> list[UpdateGuess]:
        """What a client infers of the others' updates; nothing if no updates were kept."""
        coalition = self.coalition((client,))
        return [one for attack in self._of(UPDATES) for one in attack.on(coalition, UpdateGuess)]

    def _of(self, begins: Beginning) -> tuple[Attack, ...]:
        return attacks(begins, full=self.full)

    def _own_work(self, coalition: Coalition) -> None:
        """What these clients reach without a released byte: the floor under every leak.

        A quick audit tries the public model alone, if there is one: from nothing they get less far.
        """
        public = self.stage.public
        if public is not None:
            self._learn_alone(coalition, public, "public")
        if public is None or self.full:
            self._learn_alone(coalition, self._untrained(), NOTHING)

    def _learn_alone(self, coalition: Coalition, start: State, origin: str) -> None:
        stage, begun = self.stage, self.stage.measure(start)
        told, clients = coalition.tell, coalition.clients
        self.own[clients] = self._better(begun, self.own.get(clients, begun))
        coalition = replace(
            coalition, start=stage.whole(start), tell=lambda text: told(f"{OWN_DATA}, {text}")
        )
        for attack in self._of(MODEL):
            for stolen in attack.on(coalition, Stolen) if attack.alone else ():
                reached = stage.measure(stolen.state)
                if attack.quick:  # whoever finds training of no use leaves the start as it is
                    reached = self._better(begun, reached)
                self._note_own(clients, origin, attack.name, reached)

    def _note_own(
        self, clients: tuple[str, ...], origin: str, polish: str, reached: dict[str, float]
    ) -> None:
        self.own[clients] = self._better(reached, self.own.get(clients, reached))
        self.found.append(
            Attacked(
                OWN_DATA, clients, 0, False, origin, polish, reached,
                leak=0.0, gain_shown=self._gain(reached),
            )
        )  # fmt: skip

    def _count_as_own(self, coalition: Coalition) -> None:
        """What they reached is what they reach without a released byte."""
        clients = coalition.clients
        mine = [n for n, a in enumerate(self.found) if a.clients == clients and a.released]
        for attacked in [self.found[number] for number in mine]:
            self._note_own(clients, SIMULATED, attacked.polish, dict(attacked.measures))
        for number in mine:
            attacked = self.found[number]
            leak = self._share(attacked.measures, self.own[clients])
            self.found[number] = replace(attacked, leak=leak)

    def _collect(self, attack: Attack, coalition: Coalition) -> _Measured | None:
        """The best that an attack makes of messages; None if it makes nothing."""
        return self._best_of(
            self._note(coalition, attack.name, stolen) for stolen in attack.on(coalition, Stolen)
        )

    def _best_of(self, tried: Iterable[_Measured]) -> _Measured | None:
        name, best = self.metric.name, None
        for one in tried:
            if best is None or self.metric.lead(one.reached[name], best.reached[name]) > 0:
                best = one
        return best

    def _go_on(self, coalition: Coalition, begun: _Measured) -> None:
        """Everything that begins with a model."""
        coalition = replace(coalition, start=self.stage.whole(begun.stolen.state))
        for attack in self._of(MODEL):
            for stolen in attack.on(coalition, Stolen):
                whole = replace(stolen, holes=begun.stolen.holes, known=begun.stolen.known)
                self._note(coalition, begun.attack, whole, attack.name)

    def _after_each_round(self, coalition: Coalition, holes: str) -> None:
        """As if attackers had stopped listening earlier; in quick audits for one client alone."""
        if not self.full and len(coalition.clients) > 1:
            return
        for last in sorted({kept.round for kept in coalition.sent})[:-1]:
            sent = [kept for kept in coalition.sent if kept.round <= last]
            for attack in attacks(MESSAGES, full=False):
                self._collect(attack, replace(coalition, sent=sent, ways=(holes,)))

    def _note(
        self, coalition: Coalition, attack: str, stolen: Stolen, polish: str = ""
    ) -> _Measured:
        coalition.tell(f"measuring {polish or attack}, holes: {stolen.holes}")
        measures = self.stage.measure(stolen.state)
        released, withheld = _errors(stolen, self.stage.models["global"])
        self.found.append(
            Attacked(
                attack, coalition.clients, _count_rounds(coalition.sent), True, stolen.holes,
                polish, measures, self._share(measures, self.own[coalition.clients]),
                self._gain(measures), released, withheld,
            )
        )  # fmt: skip
        return _Measured(attack, stolen, measures)

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
        """What an attacker begins with that has no public model."""
        return untrained(self.stage.model, self.stage.models["global"], self.stage.seed)


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


def _errors(stolen: Stolen, truth: State) -> tuple[float | None, float | None]:
    """Relative errors of weights where they are known, and where they are not."""
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for name, known in ({} if stolen.known is None else stolen.known.known).items():
        if not truth[name].is_floating_point():
            continue
        wanted = truth[name].float()
        apart, size = (stolen.state[name].float() - wanted).square(), wanted.square()
        for side, where in ((True, known), (False, ~known)):
            sums[side][0] += float(apart[where].sum())
            sums[side][1] += float(size[where].sum())
    errors = [(a / b) ** 0.5 if b > 0 else None for a, b in (sums[True], sums[False])]
    return errors[0], errors[1]


def _count_rounds(sent: Iterable[Kept]) -> int:
    return len({kept.round for kept in sent})


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
