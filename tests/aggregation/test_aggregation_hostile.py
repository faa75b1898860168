"""Grams that are wrong are refused by name and leave no trace; extreme ones do no harm."""

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil import FedAvg, FedQSN, FedveilError, ProtocolError, RegMean
from fedveil.engine.crew import Answer
from fedveil.engine.in_process import InTurn
from fedveil.quantization import quantize
from fedveil.wire import Dense, Message, Statistics, UnitIndex
from toys import SECRET, Nudge, bare, federation, mlp, reply_of, same, snapshot, weights

LOW_RANK = RegMean(form="low-rank", size=48)
SCHEMES = {
    "blocks": FedAvg(aggregation=RegMean()),
    "exact": FedAvg(aggregation=RegMean(bits=None, size=32)),
    "low-rank": FedAvg(aggregation=LOW_RANK),
    "masked": FedQSN(client_mask=0.25, units="neurons", aggregation=RegMean()),
    "own masks": FedQSN(units="neurons", policy="sticky", aggregation=LOW_RANK),
}


@dataclass(frozen=True)
class Watched(Nudge):
    """A nudge whose model may be watched on a few images."""

    def replay(self, model, examples):
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(2):
            images = torch.randn(4, 1, 4, 4, generator=generator)
            yield {"images": images}
            with torch.no_grad():
                model(images)


class Server:
    """A server with round 1 open, that has absorbed "a" and awaits "b"."""

    def __init__(self, scheme):
        self.side = scheme.server(mlp(), SECRET)
        self.side.begin_round(1)
        self.replies = {
            name: reply_of(scheme, self.side.release(name), bare(mlp()), Watched(seed=ord(name)))
            for name in "abc"
        }
        self.honest = self.replies["b"]
        self.side.absorb("a", self.replies["a"], 3.0)

    def finish(self):
        self.side.absorb("b", self.honest, 4.0)
        self.side.absorb("c", self.replies["c"], 2.0)
        self.side.end_round()
        return self.side.final()


@pytest.fixture(scope="module", params=sorted(SCHEMES))
def scheme(request):
    return SCHEMES[request.param]


@pytest.fixture(scope="module")
def undisturbed(scheme):
    return Server(scheme).finish()


def refused(server, hostile, word, label):
    """It must be refused without a trace, and the error must say where."""
    before = snapshot(server.side.state().tensors)
    print(label)  # shown if it is taken
    with pytest.raises(FedveilError, match=re.escape(word)):
        server.side.absorb("b", hostile, 4.0)
    assert same(server.side.state().tensors, before)


def put(reply, sections=None, scalars=None, drop=()):
    kept = {n: s for n, s in reply.sections.items() if n not in drop}
    return replace(
        reply,
        sections={**kept, **(sections or {})},
        scalars={**reply.scalars, **(scalars or {})},
    )


NAMES = ("1.weight", "3.weight", "5.weight")


def parts_of(reply, name):
    """The names and tensors of a Gram's two sections."""
    found = {n: s for n, s in reply.sections.items() if n.startswith(f"gram/{name}/")}
    assert len(found) == 2
    plain = {n: s.tensor if isinstance(s, Statistics) else s.dequantize() for n, s in found.items()}
    diagonal = f"gram/{name}/diagonal"
    (rest,) = found.keys() - {diagonal}
    return diagonal, plain[diagonal], rest, plain[rest]


def with_first(tensor, value):
    changed = tensor.clone()
    changed.view(-1)[0] = value
    return changed


def wrong_values(reply, name):
    diagonal, squares, rest, correlations = parts_of(reply, name)
    for value in (float("nan"), float("inf"), -float("inf"), -1e-9, -1.0, 1.01e8, 1e30):
        yield f"diagonal {value}", {diagonal: Statistics(with_first(squares, value))}, name
    coded = not isinstance(reply.sections[rest], Statistics)
    for value in (1.1, -1.1, 3.0, 1e30):
        bad = with_first(correlations, value)
        section = quantize(bad, bits=reply.sections[rest].bits) if coded else Statistics(bad)
        yield f"correlation {value}", {rest: section}, name
    for value in (float("nan"), float("inf")):
        if not coded:
            yield f"correlation {value}", {rest: Statistics(with_first(correlations, value))}, name


def wrong_shapes(reply, name):
    diagonal, squares, rest, correlations = parts_of(reply, name)
    wrong = [squares[1:], squares[None], squares[:, None], torch.ones(0), torch.tensor(1.0)]
    for tensor in [*wrong, torch.cat([squares, squares[:1]])]:
        yield f"diagonal {list(tensor.shape)}", {diagonal: Statistics(tensor)}, diagonal
    like = lambda t: (  # noqa: E731
        Statistics(t)
        if isinstance(reply.sections[rest], Statistics)
        else quantize(t, bits=reply.sections[rest].bits)
    )
    wider = torch.cat([correlations, correlations[:, :1]], dim=1)
    for tensor in (correlations.t(), correlations.flatten(), correlations[None], wider):
        if tensor.shape != correlations.shape:
            yield f"rest {list(tensor.shape)}", {rest: like(tensor)}, rest


def wrong_types(reply, name):
    diagonal, squares, rest, correlations = parts_of(reply, name)
    for section, tensor in ((diagonal, squares), (rest, correlations)):
        plain = isinstance(reply.sections[section], Statistics)
        for dtype in (torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool):
            yield f"{dtype}", {section: Statistics(tensor.to(dtype))}, section
        yield "dense", {section: Dense(tensor)}, section
        yield "index", {section: UnitIndex(9, torch.arange(9))}, section
        yield (
            "plain" if not plain else "coded",
            {section: quantize(tensor) if plain else Statistics(tensor)},
            section,
        )
        for bits in (2, 3, 4, 8):
            if plain or reply.sections[section].bits != bits:
                yield f"{bits} bits", {section: quantize(tensor, bits=bits)}, section


def wrong_names(reply, name):
    """Sections and scalars to add, sections to drop, and the word that the error must hold."""
    diagonal, squares, rest, _ = parts_of(reply, name)
    both = {diagonal: reply.sections[diagonal], rest: reply.sections[rest]}
    for gone in (diagonal, rest):
        yield f"no {gone}", {}, {}, {gone}, gone
    yield "neither", {}, {}, {diagonal, rest}, diagonal
    other = "factor" if rest.endswith("pairs") else "pairs"
    extra = [
        f"gram/{name}/{other}",
        f"gram/{name}",
        "gram/9.weight/diagonal",
        "gram/",
        "gram/x/y/z",
    ]
    for key in extra:
        yield f"extra {key}", {key: Statistics(squares)}, {}, set(), key
    renamed = {key.replace(name, "other"): section for key, section in both.items()}
    yield "renamed", renamed, {}, set(both), diagonal
    for layer in ("1.bias", "5.bias", "9.weight", "", "3"):
        key = f"gram/{layer}"
        yield f"for {layer}", {}, {key: name}, set(), layer if layer else "linear"
    for value in ("nowhere", "", "5", name + "x", "1.bias"):
        yield f"named {value!r}", {}, {f"gram/{name}": value}, set(), f"gram/{value}/diagonal"
    for value in (5, True, 1.5, 0):
        also = {key.replace(name, str(value)): section for key, section in both.items()}
        yield f"named {value!r}", also, {f"gram/{name}": value}, set(both), name
    stranger = next(n for n in NAMES if n != name)
    yield "of another layer", {}, {f"gram/{name}": stranger}, set(), "gram/"


@pytest.mark.parametrize("name", NAMES)
def test_every_wrong_gram_is_refused_by_name_and_without_a_trace(scheme, undisturbed, name):
    server = Server(scheme)
    honest, count = server.honest, 0
    for kind in (wrong_values, wrong_shapes, wrong_types):
        for label, sections, word in kind(honest, name):
            hostile = put(honest, sections)
            refused(server, Message.from_bytes(hostile.to_bytes()), word, label)
            count += 1
    for label, sections, scalars, drop, word in wrong_names(honest, name):
        refused(server, put(honest, sections, scalars, drop), word, label)
        count += 1
    assert count > 40
    assert same(server.finish(), undisturbed)


def test_honest_grams_do_count(scheme, undisturbed):
    server = Server(scheme)
    bare_ = {k: v for k, v in server.honest.scalars.items() if not k.startswith("gram/")}
    grams = {n for n in server.honest.sections if n.startswith("gram/")}
    assert len(grams) == 6
    sections = {n: s for n, s in server.honest.sections.items() if n not in grams}
    server.honest = replace(server.honest, sections=sections, scalars=bare_)
    assert not same(server.finish(), undisturbed)


@pytest.mark.parametrize("mean", [FedAvg(), FedQSN(units="neurons")], ids=lambda s: s.name)
def test_a_gram_for_a_mean_is_refused(mean):
    asked = replace(mean, aggregation="regmean")
    server = mean.server(mlp(), SECRET)
    server.begin_round(1)
    reply = reply_of(asked, server.release("b"), bare(mlp()), Watched())
    before = snapshot(server.state().tensors)
    with pytest.raises(ProtocolError, match="gram/"):
        server.absorb("b", reply, 4.0)
    assert same(server.state().tensors, before)
    honest = reply_of(mean, server.release("b"), bare(mlp()), Watched())
    server.absorb("b", honest, 4.0)
    server.end_round()
    assert not same(server.final(), weights(mlp()))


def test_a_reply_without_grams_is_averaged_where_nobody_has_any():
    finals = []
    for aggregation in ("mean", "regmean"):
        scheme = FedAvg(aggregation=aggregation)
        server = scheme.server(mlp(), SECRET)
        server.begin_round(1)
        for number, name in enumerate("abc"):
            reply = reply_of(scheme, server.release(name), bare(mlp()), Nudge(seed=number))
            server.absorb(name, reply, 1.0 + number)
        server.end_round()
        finals.append(server.final())
    for name in finals[0]:
        torch.testing.assert_close(finals[1][name], finals[0][name])


@pytest.mark.parametrize("square", [0.0, 1e-38, 1e-20, 1e8])
@pytest.mark.parametrize("weight", [1e-9, 1e20])
def test_extreme_but_legal_grams_leave_finite_weights(scheme, square, weight):
    server = Server(scheme)
    sections: dict[str, Any] = {}
    for name in NAMES:
        diagonal, squares, rest, correlations = parts_of(server.honest, name)
        sections[diagonal] = Statistics(torch.full_like(squares, square))
        bad = torch.ones_like(correlations)
        coded = not isinstance(server.honest.sections[rest], Statistics)
        sections[rest] = quantize(bad, bits=8) if coded else Statistics(bad)
        update = server.honest.sections[name].tensor
        sections[name] = Dense(torch.full_like(update, 1e6))
    server.side.absorb("b", put(server.honest, sections), weight)
    server.side.absorb("c", server.replies["c"], 1.0)
    server.side.end_round()
    assert all(bool(torch.isfinite(t).all()) for t in server.side.final().values())
    server.side.begin_round(2)
    server.side.release("b").to_bytes()


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(SCHEMES)),
    st.sampled_from(NAMES),
    st.floats(width=32) | st.sampled_from([0.0, 1e8, -1.0, 1.0]),
    st.floats(width=32) | st.sampled_from([1.0, -1.0, 0.99, 1.02]),
    st.floats(1e-9, 1e20),
)
def test_whatever_is_taken_leaves_finite_weights(scheme, name, square, correlation, weight):
    server = Server(SCHEMES[scheme])
    diagonal, squares, rest, correlations = parts_of(server.honest, name)
    try:
        bad = torch.full_like(correlations, correlation)
        coded = not isinstance(server.honest.sections[rest], Statistics)
        sections = {
            diagonal: Statistics(torch.full_like(squares, square)),
            rest: quantize(bad, bits=8) if coded else Statistics(bad),
        }
        server.side.absorb("b", put(server.honest, sections), weight)
    except FedveilError:
        assert same(server.finish(), Server(SCHEMES[scheme]).finish())
    else:
        assert 0 <= square <= 1e8
        assert abs(correlation) < 1.03
        server.side.end_round()
        assert all(bool(torch.isfinite(t).all()) for t in server.side.final().values())


def test_correlations_a_little_beyond_1_are_taken_for_rounding():
    server = Server(SCHEMES["exact"])
    _, _, rest, pairs = parts_of(server.honest, "3.weight")
    reply = put(server.honest, {rest: Statistics(torch.full_like(pairs, 1.015))})
    _, statistics = server.side._sums.read(reply, server.side._everything)
    assert float(statistics["3.weight"].pairs.max()) == 1.0


def test_a_factor_cannot_stand_for_impossible_correlations():
    # Entries between -1 and 1, rows that are far too long: off-diagonals of 48 to a diagonal of 1.
    server = Server(SCHEMES["low-rank"])
    diagonal, squares, rest, factor = parts_of(server.honest, "5.weight")
    sections = {
        diagonal: Statistics(torch.ones_like(squares)),
        rest: Statistics(torch.ones_like(factor)),
    }
    _, statistics = server.side._sums.read(put(server.honest, sections), server.side._everything)
    (block,) = statistics["5.weight"].dense(1.0, 0.0)
    assert float(block.abs().max()) < 1.001


def test_through_the_engine_a_wrong_gram_costs_its_sender_the_round(monkeypatch):
    answers = InTurn.answers

    def spoiled(crew, jobs):
        for answer in answers(crew, jobs):
            if answer.client == "partner-1":
                assert answer.reply is not None
                reply = Message.from_bytes(answer.reply)
                wrong = put(reply, {"gram/1.weight/diagonal": Statistics(torch.full((16,), -1.0))})
                yield Answer(answer.client, wrong.to_bytes())
            else:
                yield answer

    monkeypatch.setattr(InTurn, "answers", spoiled)
    record = federation(mlp(), scheme=FedQSN(aggregation="regmean")).run(1).rounds[0]
    assert set(record.failed) == {"partner-1"}
    assert "1.weight" in record.failed["partner-1"]
    assert set(record.bytes_up) == {"partner-0", "partner-2"}
