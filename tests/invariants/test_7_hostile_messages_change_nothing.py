import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedveil
from fedveil import FedAvg, FedQSN, FedveilError, ProtocolError
from fedveil.engine.crew import Answer
from fedveil.engine.in_process import InTurn
from fedveil.quantization import quantize
from fedveil.wire import Dense, Message, Statistics, UnitIndex
from toys import SECRET, Nudge, bare, federation, mlp, reply_of, same, snapshot, weights

SCHEMES = {
    "fedavg": FedAvg(),
    "fedqsn": FedQSN(client_mask=0.25, units="neurons"),
    "quantized": FedQSN(client_mask=0.25, units="neurons", update_bits=4, average="participants"),
    # Wrong Grams: tests/aggregation/test_aggregation_hostile.py.
    "regmean": FedQSN(client_mask=0.25, units="neurons", aggregation="regmean"),
}


class Server:
    """A server with round 1 open, that has absorbed "a" and awaits "b"."""

    def __init__(self, scheme):
        self.side = scheme.server(mlp(), SECRET)
        self.side.begin_round(1)
        honest = {
            name: reply_of(scheme, self.side.release(name), bare(mlp()), Nudge(seed=ord(name)))
            for name in "abc"
        }
        self.honest, self.other = honest["b"], honest["c"]
        self.side.absorb("a", honest["a"], 3.0)

    def finish(self):
        self.side.absorb("b", self.honest, 4.0)
        self.side.absorb("c", self.other, 2.0)
        self.side.end_round()
        return self.side.final()


@pytest.fixture(scope="module", params=sorted(SCHEMES))
def scheme(request):
    return SCHEMES[request.param]


@pytest.fixture(scope="module")
def undisturbed(scheme):
    return Server(scheme).finish()


def refused(server, hostile, weight=4.0, client="b"):
    """Take a hostile message or bytes as an engine would; it must be refused without a trace."""
    before = snapshot(server.side.state().tensors)
    with pytest.raises(FedveilError) as caught:
        server.side.absorb(client, read(hostile), weight)
    assert str(caught.value)
    assert same(server.side.state().tensors, before)


def read(message):
    return Message.from_bytes(message) if isinstance(message, bytes | bytearray) else message


def with_section(message, name, section):
    return replace(message, sections={**message.sections, name: section})


def variants(honest, released):
    """Well-formed messages that are wrong, by what is wrong with them."""
    name = "1.bias"
    bias, wide = released[name], released["3.weight"]
    one = torch.ones(bias)
    for value in (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2e6):
        bad = one.clone()
        bad[0] = value
        yield f"value {value}", with_section(honest, name, Dense(bad))
    yield "wrong round", replace(honest, round=2)
    yield "round 0", replace(honest, round=0)
    yield "wrong client", replace(honest, client="c")
    yield "unknown client", replace(honest, client="nobody")
    yield "wrong scheme", replace(honest, scheme="fedsgd")
    yield "wrong kind", replace(honest, kind="proxy")
    yield "another shape", with_section(honest, name, Dense(torch.ones(bias[0] + 1)))
    yield "empty", with_section(honest, name, Dense(torch.ones(0)))
    yield "transposed", with_section(honest, "3.weight", Dense(torch.ones(wide[::-1])))
    yield "another axis more", with_section(honest, name, Dense(torch.ones(1, *bias)))
    yield "an extra tensor", with_section(honest, "9.weight", Dense(one))
    yield "a unit index", with_section(honest, "units/1", UnitIndex(96, torch.arange(96)))
    yield "an index for a tensor", with_section(honest, name, UnitIndex(96, torch.arange(96)))
    yield "statistics", with_section(honest, name, Statistics(one))
    for dtype in (torch.int64, torch.bool, torch.uint8, torch.float16, torch.bfloat16):
        yield f"of {dtype}", with_section(honest, name, Dense(one.to(dtype)))
    yield "quantized where dense", with_section(honest, name, quantize(one))
    huge = quantize(torch.full(wide, 1e30), bits=4)
    yield "quantized and huge", with_section(honest, "3.weight", huge)


def shapes_of(server):
    proxy = server.side.release("b")
    shape = lambda s: torch.Size(getattr(s, "shape", None) or s.tensor.shape)  # noqa: E731
    return {n: shape(s) for n, s in proxy.sections.items() if not isinstance(s, UnitIndex)}


def test_every_wrong_reply_is_refused_without_a_trace(scheme, undisturbed):
    server = Server(scheme)
    wrong = dict(variants(server.honest, shapes_of(server)))
    assert len(wrong) > 25
    for hostile in wrong.values():
        refused(server, hostile)
        refused(server, hostile.to_bytes())
    assert same(server.finish(), undisturbed)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e300, 1e-300])
def test_an_impossible_weight_is_refused(scheme, undisturbed, weight):
    server = Server(scheme)
    refused(server, server.honest, weight)
    assert same(server.finish(), undisturbed)


def test_a_second_answer_is_refused(scheme, undisturbed):
    server = Server(scheme)
    refused(server, replace(server.honest, client="a"), client="a")
    assert same(server.finish(), undisturbed)


def test_another_clients_answer_is_refused(scheme, undisturbed):
    server = Server(scheme)
    refused(server, server.other)
    refused(server, replace(server.honest, client="nobody"), client="nobody")
    assert same(server.finish(), undisturbed)


@settings(max_examples=60)
@given(st.data())
def test_altered_bytes_are_refused_without_a_trace(data):
    server = Server(SCHEMES[data.draw(st.sampled_from(sorted(SCHEMES)))])
    honest = server.honest.to_bytes()
    for _ in range(10):
        hostile = bytearray(honest)
        if data.draw(st.booleans()):
            hostile = hostile[: data.draw(st.integers(0, len(honest) - 1))]
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, len(hostile)))
            hostile[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
        if bytes(hostile) != honest:
            refused(server, bytes(hostile))
    expected = Server(server.side._scheme).finish()
    assert same(server.finish(), expected)


VALUES = st.floats(width=32) | st.sampled_from([0.0, 1e6, -1e6, 65504.0])


@settings(max_examples=60)
@given(
    st.sampled_from(["1.weight", "1.bias", "5.bias", "3.bias", "x"]),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int32]),
    st.lists(st.integers(0, 5), max_size=2),
    VALUES,
    st.floats() | st.just(1.0),
)
def test_whatever_is_taken_leaves_finite_weights(name, dtype, shape, value, weight):
    server = Server(SCHEMES["fedavg"])
    full = list(server.honest.sections[name].tensor.shape) if name != "x" else shape
    try:
        tensor = torch.full(full, value).to(dtype)
        server.side.absorb("b", with_section(server.honest, name, Dense(tensor)), weight)
    except FedveilError:
        assert same(server.finish(), Server(SCHEMES["fedavg"]).finish())
    else:
        server.side.end_round()
        assert all(torch.isfinite(t).all() for t in server.side.final().values())


class TestThroughTheEngine:
    """What arrives is bytes; a hostile client costs itself the round and nobody anything."""

    def run(self, monkeypatch, spoil):
        answers = InTurn.answers

        def spoiled(crew, jobs):
            for answer in answers(crew, jobs):
                yield spoil(answer) if answer.client == "partner-1" else answer

        monkeypatch.setattr(InTurn, "answers", spoiled)
        return federation(mlp(), scheme=SCHEMES["fedqsn"]).run(1)

    @pytest.mark.parametrize("reply", [b"", b"rubbish", b"\x80\x04K\x01.", bytes(1000), b"{}" * 99])
    def test_rubbish(self, monkeypatch, reply):
        result = self.run(monkeypatch, lambda a: Answer(a.client, reply))
        assert set(result.rounds[0].failed) == {"partner-1"}
        assert set(result.rounds[0].bytes_up) == {"partner-0", "partner-2"}

    @pytest.mark.parametrize("examples", [0, -1, 2.5, "many", True, None])
    def test_an_impossible_number_of_examples(self, monkeypatch, examples):
        def spoil(answer):
            message = Message.from_bytes(answer.reply)
            scalars = {k: v for k, v in message.scalars.items() if k != "examples"}
            scalars |= {"examples": examples} if examples is not None else {}
            return Answer(answer.client, replace(message, scalars=scalars).to_bytes())

        result = self.run(monkeypatch, spoil)
        assert "examples" in result.rounds[0].failed["partner-1"]

    @pytest.mark.parametrize("loss", ["low", True, None])
    def test_a_loss_that_is_no_number_is_not_recorded(self, monkeypatch, loss):
        def spoil(answer):
            message = Message.from_bytes(answer.reply)
            scalars = {k: v for k, v in message.scalars.items() if "loss" not in k}
            scalars |= {"loss_first": loss, "loss_last": loss} if loss is not None else {}
            return Answer(answer.client, replace(message, scalars=scalars).to_bytes())

        record = self.run(monkeypatch, spoil).rounds[0]
        assert record.failed == {}
        assert set(record.loss_last) == set(record.loss_first) == {"partner-0", "partner-2"}

    def test_if_all_are_hostile_the_first_reason_is_raised(self, monkeypatch):
        monkeypatch.setattr(
            InTurn,
            "answers",
            lambda crew, jobs: (Answer(job.client, bytearray(b"no")) for job in jobs),
        )
        with pytest.raises(FedveilError, match="cut off"):
            federation(mlp()).run(1)


UNSAFE_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
}
UNSAFE_CALLS = {"eval", "exec", "__import__", "compile"}


APPROVED = {
    ("config/code.py", "Approved._run", "compile"),
    ("config/code.py", "Approved._run", "exec"),
    ("engine/sending.py", "", "pickle"),
}
"""The one place that runs code from a file: bytes that this very user has read and approved for
this very folder, at a partner's. And what a program hands to worker processes that it started,
through a pipe of its own, as Python would. Nothing that comes in a message gets to either."""


def unsafe_in(source):
    """What unpickles or evaluates in a file: the function it is in, and what it is."""

    def look(node, inside):
        if isinstance(node, ast.Import):
            modules = {alias.name.split(".")[0] for alias in node.names}
            yield from ((inside, module) for module in modules & UNSAFE_MODULES)
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            yield from [(inside, module)] if module in UNSAFE_MODULES else []
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).removeprefix("builtins.")
            if called in UNSAFE_CALLS | {"torch.load", "torch.hub.load"}:
                yield inside, called
            for keyword in node.keywords:
                unsafe = {"weights_only": False, "allow_pickle": True}
                value = getattr(keyword.value, "value", None)
                if keyword.arg in unsafe and value == unsafe[keyword.arg]:
                    yield inside, keyword.arg
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inside = f"{inside}.{node.name}".lstrip(".")
        for child in ast.iter_child_nodes(node):
            yield from look(child, inside)

    return list(look(ast.parse(source), ""))


def test_no_source_file_unpickles_or_evaluates():
    package = Path(fedveil.__file__).parent
    paths = sorted(package.rglob("*.py"))
    assert len(paths) > 50
    found = [
        (path.relative_to(package).as_posix(), inside, what)
        for path in paths
        for inside, what in unsafe_in(path.read_text(encoding="utf-8"))
    ]
    # Each once: a second call in the same function is another thing to be run.
    assert sorted(found) == sorted(APPROVED)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", [("", "pickle")]),
        ("def f():\n    import dill.source", [("f", "dill")]),
        ("from joblib import load", [("", "joblib")]),
        ("class A:\n    def f(self):\n        exec(b'')", [("A.f", "exec")]),
        ("def f():\n    return [eval(one) for one in ()]", [("f", "eval")]),
        ("import builtins\nbuiltins.compile('', '', 'exec')", [("", "compile")]),
        ("torch.load(path)", [("", "torch.load")]),
        ("read(path, weights_only=False)", [("", "weights_only")]),
        ("numpy.load(path, allow_pickle=True)", [("", "allow_pickle")]),
        ("re.compile('a'); read(path, weights_only=True); model.eval()", []),
    ],
)
def test_what_unpickles_or_evaluates_is_found_wherever_it_stands(source, found):
    assert unsafe_in(source) == found


def test_a_second_round_cannot_be_answered_with_the_first(scheme):
    server = Server(scheme)
    stale = server.honest
    server.finish()
    server.side.begin_round(2)
    server.side.release("b")
    with pytest.raises(ProtocolError, match="round 2"):
        server.side.absorb("b", stale, 1.0)


def test_honest_replies_do_change_the_model(scheme, undisturbed):
    assert not same(undisturbed, weights(mlp()))
