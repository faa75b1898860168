"""Planted weaknesses: for each there is a check that raises the alarm, and for nothing else."""

import dataclasses
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from audit_samples import (
    CLIENTS,
    Recorded,
    across_units,
    changed,
    guessable,
    leaks_a_bias,
    net,
    stochastic,
)

import toys
from fedveil.audit import Evidence, check, guessing
from fedveil.audit.chance import chance_to_miss
from fedveil.errors import CheckpointError, ConfigurationError
from fedveil.quantization import quantize
from fedveil.run import Manifest
from fedveil.schemes import EXACT, Facts, FedAvg, FedLPP, FedQSN
from fedveil.wire import Dense, Message, UnitIndex

ALWAYS_MADE = {"only proxies", "same values for all"}
SCHEME = FedQSN(units="neurons", policy="fresh", server_mask=0.2, client_mask=0.3)


@pytest.fixture(autouse=True)
def few_seeds(monkeypatch):
    """As many guesses as the planted weakness needs: all of them take seconds."""
    monkeypatch.setattr(guessing, "SEEDS", 150)


def raised(evidence):
    return {one.check: one.found for one in check(evidence) if one.raised}


def answers(evidence):
    return {one.check: (one.outcome, one.found) for one in check(evidence)}


def recorded(folder, scheme=SCHEME, spoil=None, rounds=3, clients=CLIENTS, **more):
    return Recorded(folder, scheme, spoil=spoil, **more).play(rounds, clients)


@pytest.mark.parametrize("policy", ["fresh", "sticky", "grouped"])
@pytest.mark.parametrize("draw", ["exact", "bernoulli"])
def test_a_sound_scheme_raises_none(tmp_path, policy, draw):
    scheme = FedQSN(units="neurons", policy=policy, draw=draw, server_mask=0.2, client_mask=0.3)
    checked = check(recorded(tmp_path, scheme))
    assert [one.check for one in checked if one.raised] == []
    assert all(one.found for one in checked)
    sound = {one.check for one in checked if one.outcome == "sound"}
    assert sound >= ALWAYS_MADE | {"withheld units", "few bits", "unguessable masks"}


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
    assert set(found) == {"few bits", "same values for all"}
    assert "to b in round 2 has 1.weight in full precision; the scheme says 4" in found["few bits"]


def test_a_scheme_that_never_quantizes_what_it_says_it_does(tmp_path):
    facts = replace(SCHEME.facts(), bits=4)
    found = raised(recorded(tmp_path, replace(SCHEME, bits=None), facts=facts))
    assert list(found) == ["few bits"]
    assert "1.weight in full precision; the scheme says 4 bits" in found["few bits"]


def test_more_bits_than_stated(tmp_path):
    facts = replace(SCHEME.facts(), bits=4)
    found = raised(recorded(tmp_path, replace(SCHEME, bits=8), facts=facts))
    assert list(found) == ["few bits"]
    assert "1.weight in 8 bits; the scheme says 4 bits" in found["few bits"]


def test_a_group_that_no_message_cuts_was_sent_whole(tmp_path):
    model = net()

    def spoil(message):
        return Message("proxy", message.scheme, message.round, message.client, {
            name: Dense(tensor) for name, tensor in toys.weights(model).items()
        }, {})  # fmt: skip

    facts = replace(SCHEME.facts(), bits=EXACT)
    found = raised(recorded(tmp_path, spoil=spoil, model=model, facts=facts))
    assert list(found) == ["server mask"]
    assert "256 of the 256 units" in found["server mask"]


def test_a_server_mask_where_no_unit_can_be_cut(tmp_path):
    facts = Facts(server_mask=0.2, client_mask=0.0, draw="exact")
    found = raised(recorded(tmp_path, FedAvg(), facts=facts))
    assert "no unit that it could cut" in found["server mask"]


def test_a_message_that_the_ledger_does_not_list(tmp_path):
    toys.federation(toys.gpt2(), scheme=FedQSN(), out=tmp_path, keep_messages=True).run(2)
    sent = Evidence(tmp_path).proxies()[-1]
    told = sent.read()
    other = Message("proxy", told.scheme, told.round, "stranger", told.sections, {})
    (sent.path.parent / "stranger.proxy.safetensors").write_bytes(other.to_bytes())
    found = raised(Evidence(tmp_path))
    assert list(found) == ["exposure ledger"]
    assert "to stranger in round 2 is not in the exposure ledger" in found["exposure ledger"]


def test_checks_need_no_secret_and_change_nothing(tmp_path):
    evidence = recorded(tmp_path)
    before = toys.files(tmp_path)
    check(evidence)
    assert toys.files(tmp_path) == before
    assert Manifest.read(tmp_path).groups


class TestWhatWasNotLookedAtIsNotSound:
    def test_of_a_scheme_that_states_nothing(self, tmp_path):
        found = answers(recorded(tmp_path, facts=Facts()))
        for name in ("server mask", "few bits", "unguessable masks"):
            outcome, why = found[name]
            assert outcome == "not applicable"
            assert "The scheme does not say" in why
        assert found["withheld units"][0] == "sound", "which needs no statement"

    @pytest.mark.parametrize(
        ("unsaid", "check"),
        [
            ("server_mask", "server mask"),
            ("client_mask", "server mask"),
            ("draw", "server mask"),
            ("bits", "few bits"),
            ("server_mask", "unguessable masks"),
            ("client_mask", "unguessable masks"),
        ],
    )
    def test_nor_of_one_that_leaves_out_what_a_check_needs(self, tmp_path, unsaid, check):
        nothing: dict[str, Any] = {unsaid: None}
        facts = replace(SCHEME.facts(), **nothing)
        outcome, why = answers(recorded(tmp_path, facts=facts))[check]
        assert outcome == "not applicable"
        assert "does not say" in why

    @pytest.mark.parametrize("scheme", [FedAvg(), FedQSN(server_mask=0, client_mask=0, bits=None)])
    def test_of_a_scheme_without_masks_and_bits(self, tmp_path, scheme):
        found = answers(recorded(tmp_path, scheme))
        for name in ("withheld units", "server mask", "few bits", "unguessable masks"):
            assert found[name][0] == "not applicable", name
        assert "withholds a unit" in found["withheld units"][1]

    def test_the_values_of_a_client_that_was_alone_in_each_round(self, tmp_path):
        outcome, why = answers(recorded(tmp_path, clients=("a",)))["same values for all"]
        assert outcome == "not applicable"
        assert "In no round were two clients" in why

    def test_and_where_some_rounds_have_one_client_it_is_said_how_many(self, tmp_path):
        evidence = recorded(tmp_path)
        for kept in evidence.proxies(["b", "c"]):
            if kept.round == 2:
                kept.path.unlink()
        outcome, found = answers(Evidence(tmp_path))["same values for all"]
        assert outcome == "sound"
        assert "in 2 of 3 rounds" in found

    def test_the_last_of_many_clients_is_compared_as_well(self, tmp_path):
        clients = [f"c{number}" for number in range(6)]
        last = clients[-1]

        def spoil(message):
            bias = message.sections["3.bias"].tensor
            return changed(message, {"3.bias": Dense(bias + (message.client == last))})

        found = raised(recorded(tmp_path, spoil=spoil, clients=clients, rounds=1))
        assert list(found) == ["same values for all"]
        assert f"c0 and {last}" in found["same values for all"]

    def test_units_that_the_first_client_lacks_are_compared_between_the_others(self, tmp_path):
        model = net()
        units = {"a": torch.arange(0, 100), "b": torch.arange(100, 256), "c": torch.arange(60, 256)}

        def spoil(message):
            mine = units[message.client]
            weight, bias = model[1].weight.detach()[mine], model[1].bias.detach()[mine].clone()
            bias[-1] += message.client == "c"
            return Message("proxy", message.scheme, message.round, message.client, {
                "units/1": UnitIndex(256, mine),
                "1.weight": quantize(weight), "1.bias": Dense(bias),
                "3.weight": Dense(model[3].weight.detach()[:, mine].contiguous()),
                "3.bias": message.sections["3.bias"],
            }, {})  # fmt: skip

        found = raised(recorded(tmp_path, spoil=spoil, model=model, rounds=1))
        assert "b and c" in found["same values for all"]

    @pytest.mark.parametrize("odd", [float("nan"), float("inf")])
    def test_a_value_that_is_no_number_for_one_client_alone(self, tmp_path, odd):
        def spoil(message):
            bias = message.sections["3.bias"].tensor.clone()
            if message.client == "b":
                bias[0] = odd
            return changed(message, {"3.bias": Dense(bias)})

        assert "3.bias" in raised(recorded(tmp_path, spoil=spoil))["same values for all"]

    def test_a_difference_that_float32_would_lose(self, tmp_path):
        def spoil(message):
            bias = message.sections["3.bias"].tensor.double()
            return changed(message, {"3.bias": Dense(bias + (message.client == "b") * 1e-12)})

        assert "3.bias" in raised(recorded(tmp_path, spoil=spoil))["same values for all"]

    def test_messages_that_nobody_could_open(self, tmp_path):
        evidence = recorded(tmp_path, spoil=lambda m: changed(m, {"hint": Dense(torch.zeros(2))}))
        found = answers(evidence)
        assert found["withheld units"][0] == "alarm"
        for name in ("server mask", "same values for all", "unguessable masks"):
            assert found[name] == (
                "not applicable",
                "No message could be opened: each has more in it than its units.",
            )

    def test_one_that_could_not_be_opened_is_counted(self, tmp_path):
        def spoil(message):
            extra = {"hint": Dense(torch.zeros(2))} if message.client == "b" else {}
            return changed(message, extra)

        found = answers(recorded(tmp_path, spoil=spoil, rounds=1))
        assert "1 message with more than their units" in found["same values for all"][1]

    def test_masks_too_few_to_tell_whether_there_is_a_server_mask(self, tmp_path):
        # One mask of 30 % leaves no more units than a server mask of 20 % does, applied or not.
        outcome, why = answers(recorded(tmp_path, clients=("a",), rounds=1))["server mask"]
        assert outcome == "not applicable"
        assert "too few different masks" in why

    def test_without_a_client_mask_one_message_is_enough(self, tmp_path):
        scheme = replace(SCHEME, client_mask=0.0)
        outcome, found = answers(recorded(tmp_path, scheme, clients=("a",), rounds=1))[
            "server mask"
        ]
        assert outcome == "sound"
        assert "of 1 of 1 unit groups" in found

    @pytest.mark.parametrize("rate", [0.001, 0.1])
    def test_masks_of_too_few_units_to_be_guessed(self, tmp_path, rate):
        scheme = replace(SCHEME, server_mask=0.0, client_mask=rate)
        outcome, why = answers(recorded(tmp_path, scheme))["unguessable masks"]
        assert outcome == "not applicable"
        assert "40 units" in why

    def test_one_of_two_masks_that_is_too_small_is_said(self, tmp_path):
        scheme = replace(SCHEME, server_mask=0.1)
        outcome, found = answers(recorded(tmp_path, scheme))["unguessable masks"]
        assert outcome == "sound"
        assert "At a rate of 10% too few units" in found

    def test_messages_that_were_sent_and_not_kept(self, tmp_path):
        toys.federation(toys.gpt2(), scheme=FedQSN(), out=tmp_path, keep_messages=True).run(2)
        evidence = Evidence(tmp_path)
        count = len(evidence.proxies())
        evidence.proxies()[0].path.unlink()
        sound = [one for one in check(Evidence(tmp_path)) if one.outcome == "sound"]
        assert sound
        for one in sound:
            assert f"1 of {count} messages that were sent were not kept" in one.found

    def test_a_run_without_a_ledger_of_what_was_sent(self, tmp_path):
        checked = check(recorded(tmp_path))
        assert {o.check: o.outcome for o in checked}["exposure ledger"] == "not applicable"
        for one in checked:
            assert ("no exposure ledger" in one.found) == (
                one.outcome == "sound" or one.check == "exposure ledger"
            )

    def test_files_that_are_not_read(self, tmp_path):
        evidence = recorded(tmp_path)
        (tmp_path / "messages" / "round-000001" / "a.Evaluate.bin").write_bytes(b"weights")
        assert "not read: a.Evaluate.bin" in answers(evidence)["only proxies"][1]

    def test_how_much_travels_exactly_is_said(self, tmp_path):
        found = answers(recorded(tmp_path))["few bits"][1]
        # Per message: 256 neurons with 16 weights in few bits; biases and 3 weights each are exact.
        assert "Of all numbers 20.1% are others" in found or "Of all numbers 20." in found

    def test_no_matrix_that_is_large_enough(self, tmp_path):
        facts = replace(SCHEME.facts(), exact_below=10**6)
        outcome, why = answers(recorded(tmp_path, replace(SCHEME, bits=None), facts=facts))[
            "few bits"
        ]
        assert outcome == "not applicable"
        assert "sends values exactly" in why


class TestFacts:
    @pytest.mark.parametrize(
        "scheme",
        [FedAvg(), FedLPP(bits=2), FedQSN(), FedQSN.paper(bits=None), FedQSN(adapter_bits=8)],
    )
    def test_our_schemes_state_all_that_checks_need(self, scheme):
        facts = scheme.facts()
        said = {name for name, value in vars(facts).items() if value is not None}
        assert said >= {"server_mask", "client_mask", "bits", "adapter_bits"}
        assert (facts.draw is not None) == bool(facts.server_mask)
        assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts

    def test_a_run_states_them_in_its_folder(self, tmp_path):
        scheme = FedQSN(units="neurons", server_mask=0.2, bits=3)
        toys.federation(toys.mlp(), scheme=scheme, out=tmp_path).run(1)
        assert Manifest.read(tmp_path).facts == scheme.facts()

    @pytest.mark.parametrize("scheme", [FedAvg(), FedLPP(bits=2), SCHEME])
    def test_of_an_older_run_they_are_read_from_our_own_schemes_settings(self, tmp_path, scheme):
        assert older(tmp_path, scheme).facts == scheme.facts()

    @pytest.mark.parametrize("lost", ["server_mask", "client_mask", "draw", "policy", "bits"])
    def test_but_not_if_one_is_missing(self, tmp_path, lost):
        assert older(tmp_path, SCHEME, without=lost).facts == Facts()

    def test_nor_of_a_scheme_that_is_not_ours(self, tmp_path):
        assert older(tmp_path, SCHEME, name="mine").facts == Facts()

    def test_an_older_run_of_a_public_model_is_one_still(self, tmp_path):
        assert older(tmp_path, FedAvg(), public="digest").is_of_public
        assert not older(tmp_path, FedAvg()).is_of_public

    def test_nothing_is_public_that_the_run_does_not_say_is(self, tmp_path):
        manifest = Manifest({"public": "digest", "scheme": {}}, {}, facts=Facts())
        manifest.write(tmp_path)
        assert not Manifest.read(tmp_path).is_of_public

    @pytest.mark.parametrize(
        "wrong",
        [
            {"server_mask": 1.0}, {"client_mask": -0.1}, {"server_mask": True}, {"bits": 0},
            {"bits": "few"}, {"adapter_bits": 65}, {"draw": "often"}, {"policy": "mine"},
            {"exact_below": -1}, {"exact_below": 1.5}, {"of_owner": "no"}, {"bits": True},
        ],
        ids=str,
    )  # fmt: skip
    def test_impossible_ones_are_refused_by_scheme_and_folder(self, tmp_path, wrong):
        with pytest.raises(ConfigurationError, match="states what is impossible"):
            Facts(**wrong)
        Manifest({}, {}).write(tmp_path)
        path = tmp_path / "run.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "facts": wrong}))
        with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
            Manifest.read(tmp_path)


def older(folder, scheme, without=None, name=None, **configuration):
    """The manifest of a run that was written before schemes stated facts."""
    settings = {"name": name or scheme.name, **dataclasses.asdict(scheme)}
    settings.pop(without, None)
    Manifest({"scheme": settings, **configuration}, {}).write(folder)
    values = json.loads((folder / "run.json").read_text())
    del values["facts"]
    (folder / "run.json").write_text(json.dumps(values))
    return Manifest.read(folder)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("rate", "masks"), [(0.3, 1), (0.3, 2), (0.3, 3), (0.1, 2), (0.0, 1)])
def test_the_chance_to_miss_a_server_mask_is_what_drawing_says(exact, rate, masks):
    size, most, dice = 100, 88, np.random.default_rng(0)
    missed, tries = 0, 4000
    for _ in range(tries):
        seen = np.zeros(size, bool)
        for _ in range(masks):
            order = dice.random(size)
            seen |= order.argsort().argsort() >= round(rate * size) if exact else order >= rate
        missed += seen.sum() <= most
    told = chance_to_miss(size, rate, masks, most, exact=exact)
    assert told == pytest.approx(missed / tries, abs=0.03)
