"""Planted weaknesses: for each there is a check that raises the alarm, and for nothing else."""

from dataclasses import replace

import pytest
import torch
from audit_samples import (
    Recorded,
    across_units,
    changed,
    guessable,
    leaks_a_bias,
    net,
    stochastic,
)

import toys
from fedveil.audit import Evidence, Manifest, check
from fedveil.schemes import FedAvg, FedQSN
from fedveil.wire import Dense

SCHEME = FedQSN(units="neurons", policy="fresh", server_mask=0.2, client_mask=0.3)


def raised(evidence):
    return {alarm.check: alarm.found for alarm in check(evidence) if alarm.raised}


def recorded(folder, scheme=SCHEME, spoil=None, **more):
    return Recorded(folder, scheme, spoil=spoil, **more).play()


@pytest.mark.parametrize("policy", ["fresh", "sticky", "grouped"])
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_a_sound_scheme_raises_none(tmp_path, policy, draw):
    scheme = FedQSN(units="neurons", policy=policy, draw=draw, server_mask=0.2, client_mask=0.3)
    alarms = check(recorded(tmp_path, scheme))
    assert [alarm.check for alarm in alarms if alarm.raised] == []
    assert len(alarms) == 5
    assert all(alarm.found for alarm in alarms)


@pytest.mark.parametrize("scheme", [FedAvg(), FedQSN.paper(), FedQSN(bits=None), FedQSN()])
def test_nor_do_real_runs(tmp_path, scheme):
    toys.federation(toys.gpt2(), scheme=scheme, out=tmp_path, keep_messages=True).run(2)
    assert raised(Evidence(tmp_path)) == {}


def test_one_withheld_bias(tmp_path):
    model = net()
    found = raised(recorded(tmp_path, spoil=leaks_a_bias(model), model=model))
    assert list(found) == ["withheld units"]
    assert "1.bias" in found["withheld units"]


def test_a_section_that_is_none_of_the_models(tmp_path):
    extra = {"hint": Dense(torch.zeros(2))}
    found = raised(recorded(tmp_path, spoil=lambda message: changed(message, extra)))
    assert "hint" in found["withheld units"]


def test_a_scalar_that_tells_something(tmp_path):
    found = raised(recorded(tmp_path, spoil=lambda m: changed(m, scalars={"withheld_norm": 1.5})))
    assert "withheld_norm" in found["withheld units"]


def test_blocks_across_units(tmp_path):
    scheme = replace(SCHEME, bits=None)
    found = raised(recorded(tmp_path, scheme, across_units))
    assert list(found) == ["same values for all"]
    assert "1.weight" in found["same values for all"]


def test_stochastic_rounding(tmp_path):
    scheme = FedQSN(units="neurons", policy="sticky", client_mask=0.0, bits=None)
    found = raised(recorded(tmp_path, scheme, stochastic))
    assert list(found) == ["same values for all"]


def test_tensors_that_are_cut_along_two_axes_are_such_a_weakness_of_our_own(tmp_path):
    toys.federation(toys.mlp(), scheme=SCHEME, out=tmp_path, keep_messages=True).run(1)
    assert list(raised(Evidence(tmp_path))) == ["same values for all"]


def test_masks_with_a_guessable_seed(tmp_path):
    model = net()
    scheme = FedQSN(units="neurons", policy="fresh", server_mask=0.0, client_mask=0.3)
    found = raised(recorded(tmp_path, scheme, guessable(scheme, model), model=model))
    assert list(found) == ["unguessable masks"]
    assert "torch.randperm with seed 100" in found["unguessable masks"]


def test_a_server_mask_that_is_drawn_anew(tmp_path):
    # Three clients with masks of their own, and no unit that all of them lack.
    scheme = FedQSN(units="neurons", policy="fresh", server_mask=0.0, client_mask=0.3)
    evidence = recorded(tmp_path, scheme)
    text = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(text.replace('"server_mask": 0.0', '"server_mask": 0.3'))
    evidence = Evidence(tmp_path)
    found = raised(evidence)
    assert list(found) == ["server mask"]
    assert "of the 256 units" in found["server mask"]


def test_evaluation_that_sends_the_global_model(tmp_path):
    recorder = Recorded(tmp_path, SCHEME)
    evidence = recorder.play()
    sections = {name: Dense(tensor) for name, tensor in toys.weights(recorder.model).items()}
    sent = evidence.proxies()[0]
    message = changed(sent.read(), sections, kind="evaluate")
    (sent.path.parent / "a.evaluate.safetensors").write_bytes(message.to_bytes())
    found = raised(Evidence(tmp_path))
    assert "'evaluate'" in found["only proxies"]
    assert "only proxies may go to clients" in found["only proxies"]


def test_a_proxy_of_full_precision(tmp_path):
    model = net()

    def spoil(message):
        if (message.round, message.client) != (2, "b"):
            return message
        units = message.sections["units/1"].released
        return changed(message, {"1.weight": Dense(model[1].weight.detach()[units])})

    found = raised(recorded(tmp_path, spoil=spoil, model=model))
    assert "1.weight in full precision" in found["only proxies"]


def test_checks_need_no_secret_and_change_nothing(tmp_path):
    evidence = recorded(tmp_path)
    before = toys.files(tmp_path)
    check(evidence)
    assert toys.files(tmp_path) == before
    assert Manifest.read(tmp_path).groups
