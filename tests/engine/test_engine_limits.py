"""How large a reply may be follows from what was sent: honest ones fit, and nothing much larger."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from fedveil import FedAvg, FedLPP, FedQSN, RegMean, WireError
from fedveil.engine.crew import Answer
from fedveil.engine.in_process import InTurn
from fedveil.schemes import Scheme
from fedveil.wire import Dense, Limits, Message, reply_limits


def adapted(model):
    """Everything is frozen but its last layer."""
    for parameter in [*model.parameters()][:-2]:
        parameter.requires_grad_(False)
    return model


MODELS = {
    "mlp": toys.mlp,
    "convnet": toys.convnet,
    "half": lambda: toys.mlp().to(torch.bfloat16),
    "double": lambda: toys.mlp().to(torch.float64),
}
BITS = st.sampled_from([None, 2, 3, 4, 8])
AGGREGATIONS = st.sampled_from(
    [
        "mean",
        RegMean(),
        RegMean(bits=None),
        RegMean(form="low-rank", size=4),
        RegMean(size=3, bits=2),
    ]
)


@st.composite
def schemes(draw):
    bits, how = draw(BITS), draw(AGGREGATIONS)
    common = {"update_bits": bits, "aggregation": how}
    if bits is not None:
        common["error_feedback"] = draw(st.booleans())
    if draw(st.booleans()):
        return FedAvg(**common)
    return FedQSN(
        units=draw(st.sampled_from(["neurons", "columns", "mlp"])),
        bits=draw(BITS),
        block=draw(st.sampled_from([1, 3, 64])),
        server_mask=draw(st.sampled_from([0.0, 0.3, 0.9])),
        client_mask=draw(st.sampled_from([0.0, 0.3, 0.9])),
        unbiased=draw(st.booleans()),
        policy="fresh",
        **common,
    )


def exchanges(scheme, model, rounds=2):
    """What one client is sent and returns, as bytes, with what it keeps; and the server."""
    server, side, memory = scheme.server(model, toys.SECRET), scheme.client(), {}
    for number in range(1, rounds + 1):
        server.begin_round(number)
        sent = server.release("a")
        shown = Message.from_bytes(sent.to_bytes())
        keeps = (memory,) if side.remembers else ()
        reply = side.fit(shown, toys.bare(model), toys.Nudge(number), *keeps)
        yield sent, reply.to_bytes()
        server.absorb("a", reply, 1.0)
        server.end_round()


@settings(max_examples=60, deadline=None)
@given(scheme=schemes(), name=st.sampled_from(sorted(MODELS)))
def test_every_honest_reply_fits(scheme, name):
    model = MODELS[name]()
    try:
        scheme.server(model, toys.SECRET)
    except ValueError:
        return  # a choice of units that the model has not
    for sent, reply in exchanges(scheme, model):
        Message.from_bytes(reply, limits=reply_limits(sent, scheme.beside(model)))


@pytest.mark.parametrize(
    "scheme", [FedLPP(update_bits=2, block=1), FedQSN(units="neurons", backbone="once")], ids=str
)
def test_of_adapters_too(scheme):
    result = toys.federation(adapted(toys.mlp()), scheme=scheme).run(2)
    assert [len(record.bytes_up) for record in result.rounds] == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_names_of_any_length_fit(dtype):
    names = ["x" * 256, "a", *(f"layer.{i}.{'y' * i}" for i in range(200))]
    tensors = {name: Dense(torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, dtype=dtype)) for name in names}
    sent = Message("proxy", "s", 1, "c" * 64, tensors)
    words: dict[str, Any] = {"examples": 2**62, "loss_first": -1.2345678901234567e-300}
    for scalars in (words, {**words, **{f"gram/{n}"[:256]: n for n in names}}):
        reply = Message("update", "s", 1, "c" * 64, tensors, scalars)
        Message.from_bytes(reply.to_bytes(), limits=reply_limits(sent, {}))


def test_what_is_withheld_makes_a_reply_smaller():
    few, all_of_it = (
        reply_limits(next(exchanges(FedQSN(units="neurons", server_mask=0, client_mask=mask),
                                    toys.mlp()))[0], {})
        for mask in (0.75, 0.0)
    )  # fmt: skip
    assert few.max_elements < 0.5 * all_of_it.max_elements


def test_limits_are_near_what_is_honest():
    ((sent, reply),) = exchanges(FedAvg(), toys.mlp(), rounds=1)
    assert len(reply) < reply_limits(sent, {}).max_bytes < 3 * len(reply) + 2**17


def flooding(size, touched):
    """A client that answers with bytes which nobody may read."""

    class Flood(bytearray):
        def __getitem__(self, index):
            touched.append(index)
            return super().__getitem__(index)

    def answers(crew, jobs):
        for job in jobs:
            if job.client == "partner-1":
                yield Answer(job.client, Flood(size))
            else:
                yield from honest(crew, [job])

    honest = InTurn.answers
    return answers


class TestARun:
    def test_refuses_by_its_length_what_nobody_asked_for(self, tmp_path, monkeypatch):
        read, touched = Message.from_bytes.__func__, []  # type: ignore[attr-defined]

        def reading(cls, data, *, limits=None):
            if limits is not None and len(data) <= limits.max_bytes:
                touched.append(len(data))
            return read(cls, data) if limits is None else read(cls, data, limits=limits)

        size = 50_000_000
        monkeypatch.setattr(InTurn, "answers", flooding(size, []))
        monkeypatch.setattr(Message, "from_bytes", classmethod(reading))
        result = toys.federation(toys.mlp(), out=tmp_path, keep_messages=True).run(1)
        (record,) = result.rounds
        assert set(record.failed) == {"partner-1"}
        assert f"found {size} bytes" in record.failed["partner-1"]
        assert touched
        assert max(touched) < 1_000_000
        kept = {path.name for path in tmp_path.rglob("*.update.safetensors")}
        assert kept == {"partner-0.update.safetensors", "partner-2.update.safetensors"}
        assert set(record.bytes_up) == {"partner-0", "partner-2"}

    def test_tells_crews_how_much_a_reply_may_be(self, monkeypatch):
        limits, answers = [], InTurn.answers

        def looked_at(crew, jobs):
            def seen():
                for job in jobs:
                    limits.append(job.limits.max_bytes)
                    yield job

            return answers(crew, seen())

        monkeypatch.setattr(InTurn, "answers", looked_at)
        toys.federation(toys.mlp()).run(1)
        assert len(limits) == 3
        assert max(limits) < 1_000_000

    def test_takes_other_limits_if_told(self):
        refused = toys.federation(toys.mlp(), limits=Limits(max_bytes=100))
        with pytest.raises(WireError, match=r"up to 100 bytes"):
            refused.run(1)

    def test_a_scheme_says_what_its_clients_send_beside_updates(self):
        class Chatty(FedAvg):
            name = "fedavg"
            told: ClassVar = {"essay": 200_000}

            def client(self):
                side = super().client()
                return Chat(side)

            def beside(self, model):
                return self.told

        class Chat:
            remembers = False

            def __init__(self, side):
                self.load, self._fit = side.load, side.fit

            def fit(self, *arguments):
                reply = self._fit(*arguments)
                sections = {**reply.sections, "essay": Dense(torch.zeros(200_000))}
                return replace(reply, sections=sections)

        def why(scheme):
            with pytest.raises(Exception) as caught:  # noqa: PT011  the kind is what is asked
                toys.federation(toys.mlp(), scheme=scheme).run(1)
            return str(caught.value)

        assert "was not sent" in why(Chatty())  # it was read, and is no update
        Chatty.told = {}
        assert "message too large" in why(Chatty())


def test_schemes_without_an_aggregation_ask_for_nothing_beside():
    class Plain(Scheme):
        def server(self, model, secret): ...

        def client(self): ...

    assert Plain().beside(toys.mlp()) == {}
    assert FedAvg().beside(toys.mlp()) == {}
    assert sum(FedAvg(aggregation="regmean").beside(toys.mlp()).values()) > 1000
