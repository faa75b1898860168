"""A new system is one file: this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedveil import Scheme
from fedveil.aggregation import WHOLE, Influence
from fedveil.audit import Evidence, audit, check
from fedveil.schemes import Facts, ServerState, register_scheme, scheme_class, scheme_names
from fedveil.schemes.global_model import GlobalModel
from fedveil.schemes.ledger import RoundLedger
from fedveil.state import load_state, read_state
from fedveil.wire import Dense, Message
from toys import federation, mlp, rows, weights


@dataclass(frozen=True)
class SignSGD(Scheme):
    """Clients return signs; the server steps by the majority. No unit, no mean, no update codec."""

    name: ClassVar[str] = "sign-sgd"
    step: float = 0.01

    def server(self, model, secret):
        return SignServer(self, model)

    def client(self):
        return SignClient()


class SignServer:
    def __init__(self, scheme, model):
        self._scheme, self._global = scheme, GlobalModel(scheme.tensors(model))
        self._ledger = RoundLedger[bool](scheme.name)
        self._votes = {}

    @property
    def groups(self):
        return ()

    def begin_round(self, number):
        self._ledger.begin(number)
        self._votes = {name: torch.zeros_like(t) for name, t in self._global.floating()}

    def release(self, client):
        self._ledger.record(client, True)
        sections = {name: Dense(tensor) for name, tensor in self._global.export().items()}
        return Message("proxy", self._scheme.name, self._ledger.round, client, sections, {})

    def inspect(self, client, reply):
        self._ledger.expect(client, reply)
        votes = [section.tensor for section in reply.sections.values()]
        return Influence(float(sum(vote.square().sum() for vote in votes)) ** 0.5)

    def absorb(self, client, reply, weight, scales=WHOLE):
        self._ledger.expect(client, reply, weight)
        for name, section in reply.sections.items():
            self._votes[name] += scales.update * section.tensor
        self._ledger.accept(client)

    def end_round(self):
        self._ledger.end()
        for name, tensor in self._global.floating():
            tensor += self._scheme.step * self._votes[name].sign()
        return {"clients": 3}

    def final(self):
        return self._global.export()

    @property
    def views(self):
        return ("global",)

    def view(self, name):
        return self._global.export()

    def state(self):
        return ServerState(dict(self._global.tensors), {"round": self._ledger.round})

    def restore(self, state):
        self._global.restore(state.tensors)
        self._ledger.round = state.values["round"]


class SignClient:
    remembers = False

    def load(self, message, model):
        load_state(model, {name: section.tensor for name, section in message.sections.items()})

    def fit(self, message, model, trainer):
        self.load(message, model)
        before = {name: tensor.clone() for name, tensor in read_state(model).items()}
        record = trainer(model)
        signs = {n: Dense((t - before[n]).sign()) for n, t in read_state(model).items()}
        scalars = {"examples": record.examples}
        return Message("update", "sign-sgd", message.round, message.client, signs, scalars)


def test_the_engine_runs_it_and_resumes_it(tmp_path):
    whole = federation(mlp(), scheme=SignSGD()).run(3)
    federation(mlp(), scheme=SignSGD(), out=tmp_path).run(2)
    resumed = federation(mlp(), scheme=SignSGD(), out=tmp_path).run(3, resume=True)
    moved = weights(whole.global_model)["1.weight"] - weights(mlp())["1.weight"]
    assert set(torch.round(moved / 0.01).unique().tolist()) <= {-3, -2, -1, 0, 1, 2, 3}
    assert moved.abs().sum() > 0
    assert whole.rounds[0].metrics == {"clients": 3}
    assert torch.equal(
        weights(whole.global_model)["1.weight"], weights(resumed.global_model)["1.weight"]
    )


def test_one_line_makes_it_known_by_name(monkeypatch):
    from fedveil.schemes import registry

    monkeypatch.setattr(registry, "_SCHEMES", dict(registry._SCHEMES))
    assert register_scheme(SignSGD) is SignSGD
    assert scheme_class("sign-sgd") is SignSGD
    assert "sign-sgd" in scheme_names()


def test_an_audit_calls_nothing_sound_that_it_does_not_state(tmp_path):
    assert SignSGD().facts() == Facts()
    settings = {"scheme": SignSGD(), "out": tmp_path, "keep_messages": True, "test": rows(20)}
    run = federation(mlp(), **settings)
    run.run(2)
    found = audit(Evidence(tmp_path), run.stage())
    answers = {one.check: one.outcome for one in found.checks}
    assert "alarm" not in answers.values()
    for name in ("withheld units", "server mask", "few bits", "unguessable masks"):
        assert answers[name] == "not applicable", name
    assert all(one.next is None for one in found.exposure.values()), "how masks are drawn is unsaid"
    assert "checks do not apply: withheld units, server mask" in found.sentence


def test_what_it_states_is_checked(tmp_path):
    @dataclass(frozen=True)
    class Boasting(SignSGD):
        """It states what it does not do."""

        def facts(self):
            return Facts(server_mask=0.1, client_mask=0.0, draw="exact", bits=4)

    federation(mlp(), scheme=Boasting(), out=tmp_path, keep_messages=True).run(1)
    raised = [one.check for one in check(Evidence(tmp_path)) if one.raised]
    assert raised == ["server mask", "few bits"]
