"""Messages that a run has kept, and what may be wrong with them."""

import json
import shutil

import pytest
import torch

import toys
from fedveil.audit import Evidence
from fedveil.errors import AuditError, CheckpointError
from fedveil.run import Manifest
from fedveil.schemes import FedAvg, FedQSN
from fedveil.wire import Message

SCHEME = FedQSN(policy="fresh", units="neurons")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    toys.federation(toys.gpt2(), scheme=SCHEME, out=folder, keep_messages=True).run(2)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def first(folder):
    return Evidence(folder).proxies()[0].path


def test_everything_that_was_sent_is_there_in_order(run):
    evidence = Evidence(run)
    assert evidence.clients == ["partner-0", "partner-1", "partner-2"]
    assert evidence.rounds == [1, 2]
    assert [(k.round, k.client) for k in evidence.proxies(["partner-1"])] == [
        (1, "partner-1"), (2, "partner-1"),
    ]  # fmt: skip
    assert len(evidence.updates()) == len(evidence.proxies()) == 6
    assert all(kept.read().kind == "update" for kept in evidence.updates())


def test_a_proxy_shows_the_models_values_where_units_are_released(tmp_path):
    # Without quantizing, what is shown is exact.
    model = toys.gpt2()
    scheme = FedQSN(policy="fresh", bits=None, unbiased=True)
    toys.federation(model, scheme=scheme, out=tmp_path, keep_messages=True).run(1)
    evidence, own = Evidence(tmp_path), toys.weights(model)
    for kept in evidence.proxies():
        proxy = evidence.open(kept)
        for name in proxy.tensors:
            assert torch.allclose(proxy.part(name), proxy.selection.gather(name, own[name]))
            assert proxy.bits(name) == 32


def test_bits_are_those_on_the_wire(run):
    evidence = Evidence(run)
    proxy = evidence.open(evidence.proxies()[0])
    assert {proxy.bits(name) for name in proxy.tensors} == {4, 32}
    assert proxy.bits("transformer.wte.weight") == 4
    assert proxy.bits("transformer.ln_f.weight") == 32


def test_the_manifest_is_that_of_the_model(run):
    manifest, model = Manifest.read(run), toys.gpt2()
    server = SCHEME.server(model, toys.SECRET)
    assert manifest.groups == server.groups
    assert manifest.parameters == sum(t.numel() for t in toys.weights(model).values())
    text = (run / "run.json").read_text()
    assert json.loads(text)["configuration"]["scheme"]["policy"] == "fresh"
    assert toys.SECRET.fingerprint() in text


def test_the_secret_is_in_neither_file(run):
    for name in ("run.json", "exposure.jsonl"):
        data = (run / name).read_bytes()
        assert bytes(range(32)).hex().encode() not in data
        assert bytes(range(32)) not in data


def test_fedavg_has_no_groups(tmp_path):
    toys.federation(toys.mlp(), scheme=FedAvg(), out=tmp_path, keep_messages=True).run(1)
    evidence = Evidence(tmp_path)
    assert evidence.manifest.groups == ()
    assert evidence.open(evidence.proxies()[0]).released == {}


class TestBadInput:
    def test_a_folder_of_no_run(self, tmp_path):
        with pytest.raises(CheckpointError, match="not the folder of a run"):
            Evidence(tmp_path)

    def test_a_run_without_messages(self, tmp_path):
        toys.federation(toys.mlp(), out=tmp_path).run(1)
        with pytest.raises(AuditError, match=r"kept no messages.*keep_messages"):
            Evidence(tmp_path)

    @pytest.mark.parametrize("place", [200, -1])
    def test_an_altered_message(self, copy, place):
        path = first(copy)
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(AuditError, match="damaged or was altered"):
            Evidence(copy).proxies()[0].read()

    def test_a_message_that_was_cut_short(self, copy):
        first(copy).write_bytes(first(copy).read_bytes()[:-7])
        with pytest.raises(AuditError, match="damaged or was altered"):
            Evidence(copy).proxies()[0].read()

    def test_a_message_under_another_name(self, copy):
        evidence = Evidence(copy)
        one, other = evidence.proxies()[:2]
        shutil.copy(other.path, one.path)
        with pytest.raises(AuditError, match=r"not the one that its name says.*partner-1"):
            one.read()

    def test_a_message_that_has_gone(self, copy):
        kept = Evidence(copy).proxies()[0]
        kept.path.unlink()
        with pytest.raises(AuditError, match="cannot be read"):
            kept.read()

    def test_messages_of_another_run(self, copy, tmp_path):
        toys.federation(toys.mlp(), scheme=SCHEME, out=tmp_path / "o", keep_messages=True).run(1)
        shutil.copy(first(tmp_path / "o"), first(copy))
        evidence = Evidence(copy)
        with pytest.raises(AuditError, match="of another architecture"):
            evidence.open(evidence.proxies()[0])

    def test_a_tensor_of_another_shape(self, copy):
        evidence = Evidence(copy)
        kept = evidence.proxies()[0]
        message = kept.read()
        sections = {**message.sections}
        name = "transformer.ln_f.weight"
        sections[name] = type(sections[name])(torch.zeros(3))  # type: ignore[arg-type, call-arg]
        other = Message("proxy", message.scheme, 1, message.client, sections, {})
        kept.path.write_bytes(other.to_bytes())
        with pytest.raises(AuditError, match=r"of another architecture.*ln_f.*found \[3\]"):
            evidence.open(kept)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("{", "cannot be read"),
            ("[]", "another version"),
            ('{"format": 99}', "another version"),
            ('{"format": 1}', "damaged"),
            ('{"format": 1, "tensors": {"a": 1}, "groups": []}', "damaged"),
        ],
    )
    def test_a_damaged_manifest(self, copy, text, problem):
        (copy / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=problem):
            Evidence(copy)
