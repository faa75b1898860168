"""Whole audits of runs that taught language models: by loss, of which less is better."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import language_samples as samples
import pytest
import torch
from audit_samples import names
from torch import nn

import toys
from fedveil import ConfigurationError, Federation, FedLPP, FedQSN
from fedveil.audit import Evidence, audit
from fedveil.audit.attacks import distil, impute, pool
from fedveil.audit.untrained import untrained
from fedveil.audit.words import sentence
from fedveil.federation import Result, Stage
from fedveil.run import Attacked, Audit
from fedveil.schemes import Scheme
from fedveil.state import load_state, read_state
from fedveil.tasks.metrics import metric_in, metric_named
from fedveil.training import Training, evaluate

# PEFT asks transformers in a way that will go.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

RUNS = {
    "whole": (samples.base, FedQSN(units="neurons", client_mask=0.15)),
    "adapter": (samples.adapted, FedLPP(bits=2)),
}
ROUNDS = 2


class Run(NamedTuple):
    model: Callable[[], nn.Module]
    scheme: Scheme
    federation: Federation
    result: Result
    found: Audit
    out: Path


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """What was run, what came of it, and what its audit found without a public model."""
    model, scheme = RUNS[request.param]
    out = tmp_path_factory.mktemp(request.param)
    federation = samples.federation(model(), scheme, out)
    result = federation.run(ROUNDS)
    found = audit(Evidence(out), federation.stage(), coalitions=[1, 2])
    return Run(model, scheme, federation, result, found, out)


def loss(model):
    return evaluate(model, samples.TASK, samples.TEST)["loss"]


def backbone(state):
    return {name: tensor for name, tensor in state.items() if "lora_" not in name}


def plain(found, rounds):
    """The attacks that took what one client was sent as it is."""
    return [
        attack
        for attack in found.attacks
        if (len(attack.clients), attack.rounds, attack.holes, attack.polish)
        == (1, rounds, "zeros", "")
    ]


def shares_checked(found):
    """Check every leak and gain by hand; in how many attacks something could leak."""
    top, base = (found.models[name]["loss"] for name in ("global", "base"))
    known = 0
    for attack in found.attacks:
        reached = attack.measures["loss"]
        alone = min(
            one.measures["loss"]
            for one in found.attacks
            if not one.released and one.clients == attack.clients
        )
        assert found.own_of(attack.clients)["loss"] == alone
        if attack.released and alone - top >= 0.03:
            known += 1
            assert attack.leak == pytest.approx((alone - reached) / (alone - top))
        elif attack.released:
            assert attack.leak is None
        assert attack.gain_shown == pytest.approx((base - reached) / (base - top))
    return known


class TestAnAudit:
    def test_is_by_loss(self, run):
        found = run.found
        assert found.metric == "loss"
        for attack in found.attacks:
            assert attack.measures["perplexity"] == pytest.approx(math.exp(attack.measures["loss"]))

    def test_measures_the_owners_models(self, run):
        found = run.found
        assert found.models["global"]["loss"] == pytest.approx(loss(run.result.global_model))
        assert found.models["base"]["loss"] == pytest.approx(loss(run.model()))
        assert found.models["global"]["loss"] < found.models["base"]["loss"] - 0.3

    @pytest.mark.parametrize("rounds", range(1, ROUNDS + 1))
    def test_steals_what_the_client_was_sent(self, run, rounds):
        """Masks stay, so all proxies together are the last one: as the client itself loads it."""
        (attack,) = plain(run.found, rounds)
        kept = Evidence(run.out).proxies(attack.clients)[rounds - 1]
        received = run.model()
        for tensor in run.scheme.tensors(received).values():
            tensor.zero_()
        run.scheme.client().load(kept.read(), received)
        assert attack.measures["loss"] == pytest.approx(loss(received), rel=1e-4)

    def test_takes_the_lowest_loss_for_the_strongest(self, run):
        found = run.found
        stolen = [attack.measures["loss"] for attack in found.attacks if attack.released]
        assert found.strongest.measures["loss"] == min(stolen) < max(stolen)

    def test_reckons_leaks_from_what_was_ahead(self, run):
        assert shares_checked(run.found)

    def test_survives_being_written(self, run, tmp_path):
        run.found.write(tmp_path)
        assert Audit.read(tmp_path) == run.found

    def test_says_so(self, run):
        found = run.found
        top = found.models["global"]["loss"]
        assert f"reaches {top:.2f} nats per token (perplexity" in found.sentence
        assert "lower is better" in found.sentence
        assert not found.answering("alarm")


def test_everything_is_tried_on_an_adapter(tmp_path):
    federation = samples.federation(
        samples.adapted(), FedLPP(bits=2), tmp_path, training=samples.SHORT, count=1
    )
    federation.run(ROUNDS)
    # A public model of another backbone is worth as much as that is.
    public = samples.adapted(samples.untaught(seed=5))
    stage = federation.stage(public)
    found = audit(Evidence(tmp_path), stage, full=True, coalitions=[1])
    collected = {"own data alone", *names("messages")} - {"dropout rescaling"}  # no unit is missing
    assert {one.attack for one in found.attacks} == collected
    # One client's language model: it has no classes, and nobody to federate with.
    polished = {"", *names("model")} - {"restricted softmax", "one-shot federation"}
    assert {attack.polish for attack in found.attacks} == polished
    assert {attack.holes for attack in found.attacks if not attack.released} == {
        "nothing",
        "public",
    }
    assert found.models["public"]["loss"] == pytest.approx(loss(public))
    alone = {a.holes: a.measures["loss"] for a in found.attacks if not a.released}
    assert alone["nothing"] < alone["public"] < loss(public)
    shares_checked(found)
    # Whatever was trained in between, what was sent is measured on the backbone it belongs to.
    (attack,) = (one for one in plain(found, ROUNDS) if one.attack == "pooling")
    evidence = Evidence(tmp_path)
    stolen = impute(pool(evidence, evidence.proxies(attack.clients)), evidence.manifest)
    assert not stolen.keys() & backbone(stage.models["base"]).keys()
    federation.model.load_state_dict(stolen, strict=False)
    assert attack.measures["loss"] == pytest.approx(loss(federation.model))


class TestTheSentence:
    def found(self, reached, own, top=2.0, base=3.0):
        metric = metric_named("loss")
        measures = {
            name: {"loss": value, "perplexity": math.exp(value), "accuracy": 0.0}
            for name, value in (("own", own), ("reached", reached), ("global", top), ("base", base))
        }
        alone = Attacked("own data alone", ("a",), 0, False, "public", "", measures["own"])
        stolen = Attacked(
            "pooling", ("a",), 1, True, "zeros", "", measures["reached"],
            metric.share(reached, own, top), metric.share(reached, base, top),
        )  # fmt: skip
        return Audit(
            sentence="", scheme={}, rounds=1, metric="loss", models=measures,
            attacks=[alone, stolen], checks=[], exposure={},
        )  # fmt: skip

    def test_tells_losses(self):
        assert sentence(self.found(2.31, 2.62)) == (
            "Your model reaches 2.00 nats per token (perplexity 7.4), your base 3.00 nats "
            "(perplexity 20); lower is better. With what it was sent the best-informed client gets "
            "to 2.31 nats (perplexity 10), and to 2.62 nats (perplexity 14) without a released "
            "byte: 50 % of what your model is ahead of that has leaked, and 69 % of what the "
            "federation added to your base."
        )

    def test_a_higher_loss_is_nothing_leaked(self):
        assert "no further than without a released byte" in sentence(self.found(2.7, 2.62))

    def test_a_lower_loss_of_ones_own_is_no_lead(self):
        assert "your model is not ahead of that" in sentence(self.found(1.9, 1.95))

    def test_noise_is_no_lead(self):
        """Losses of 0.03 nats apart are alike; the same model trained anew differs as much."""
        assert self.found(2.01, 2.02).attacks[1].leak is None
        assert self.found(2.02, 2.04).attacks[1].leak == pytest.approx(0.5)


class TestAnUntrainedModel:
    def test_has_nothing_of_the_owners(self):
        """GPT-2's own layers do not know how to begin anew."""
        one, other = samples.base(), samples.untaught(seed=5)
        first = untrained(one, read_state(one), 0)
        assert toys.same(first, untrained(other, read_state(other), 0))
        assert all(tensor.isfinite().all() for tensor in first.values())
        assert loss(one) < 2 * math.log(samples.MODULUS)

    def test_has_what_everybody_holds_under_an_adapter_that_does_nothing(self):
        model = samples.adapted()
        adapter = FedLPP().tensors(model)
        with torch.no_grad():
            for tensor in adapter.values():
                tensor.fill_(7.0)
        begun = untrained(model, adapter, 0)
        assert loss(model) == pytest.approx(loss(samples.base()))
        assert toys.same(backbone(begun), backbone(toys.weights(samples.adapted())))
        assert any(tensor.std() > 0 for name, tensor in begun.items() if "lora_A" in name)


class TestDistillation:
    def test_of_answers_teaches_what_the_teacher_knows(self):
        """A teacher who answers otherwise than the labels is believed."""
        teacher, student = samples.base(), samples.untaught(seed=5)
        rows = samples.rows(40, 3, samples.KNOWN)
        wrong = [{**row, "completion": "0 0 0"} for row in rows]
        data = samples.TASK.prepare(wrong)
        model = copy.deepcopy(student)
        load_state(model, teach(model, data, teacher, student))
        known = samples.TASK.prepare(rows)
        before = evaluate(student, samples.TASK, known)["loss"]
        assert evaluate(model, samples.TASK, known)["loss"] < before
        assert evaluate(model, samples.TASK, data)["loss"] > before / 2

    def test_counts_answer_tokens_when_steps_are_in_pieces(self):
        teacher, student = samples.base(), samples.untaught(seed=5)
        rows = samples.rows(8, 3)
        rows = [r | {"completion": r["completion"][: 2 + 3 * (n % 2)]} for n, r in enumerate(rows)]
        data = samples.TASK.prepare(rows)
        one, other = (
            teach(
                copy.deepcopy(student), data, teacher, student, gradient_accumulation_steps=pieces
            )
            for pieces in (1, 2)
        )
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-4)


def teach(model, data, teacher, student, **settings):
    training = Training(
        steps=6, batch_size=8, learning_rate=0.3, optimizer="sgd", schedule="constant", **settings
    )
    return distil(
        model, samples.TASK, data, training, read_state(teacher), read_state(student), rounds=2
    ).state


class Unheard(type(samples.TASK)):  # type: ignore[misc]
    metric = "wit"


class TestBadInput:
    def test_a_metric_that_nobody_knows(self, run):
        stage = replace(run.federation.stage(), task=Unheard(samples.WORDS))
        with pytest.raises(ConfigurationError, match=r"metric is unknown.*'accuracy'.*'wit'"):
            audit(Evidence(run.out), stage)

    def test_models_that_cannot_teach_each_other(self):
        model = samples.base()
        state = read_state(model)
        with pytest.raises(ConfigurationError, match=r"teach each other.*NextToken"):
            distil(
                model,
                toys.NextToken(),
                samples.TASK.prepare(samples.TEST),
                samples.SHORT,
                state,
                state,
            )

    def test_a_stolen_model_without_a_number_in_it_is_the_worst(self):
        model = samples.base()
        state = {name: torch.full_like(t, torch.nan) for name, t in read_state(model).items()}
        test = samples.TASK.prepare(samples.TEST)
        models = {"base": state, "global": state}
        found = Stage(model, samples.TASK, test, samples.SHORT, {}, models).measure(state)
        assert found["loss"] == 700
        json.dumps(found, allow_nan=False)


class TestMetrics:
    def test_which_way_is_better(self):
        losses = [{"loss": 3.0}, {"loss": 1.0}, {"loss": 2.0}, {}, {"loss": math.nan}]
        assert metric_named("loss").best(losses, lambda one: one) == {"loss": 1.0}
        points = [{"accuracy": value["loss"]} for value in losses[:3]]
        assert metric_named("accuracy").best(points, lambda one: one) == {"accuracy": 3.0}
        assert metric_named("loss").best([{}], lambda one: one) is None

    def test_how_they_are_written(self):
        accuracy, loss = metric_named("accuracy"), metric_named("loss")
        assert (accuracy.text(88.04), accuracy.figure(88.04)) == ("88.0 %", "88.0")
        assert (loss.text(2.3104), loss.figure(2.3104)) == ("2.310 nats", "2.310")
        assert loss.words({"loss": 3.466}, at_length=True) == "3.47 nats per token (perplexity 32)"
        said = [loss.words({"loss": value}).split("perplexity ")[1] for value in (0.0, 9.0, 700.0)]
        assert said == ["1.0)", "8,103)", "above 1,000,000)"]

    def test_only_language_models_have_a_perplexity(self):
        assert metric_in({"accuracy": 50.0, "loss": 1.0, "f1": 40.0}).name == "accuracy"
        assert metric_in({}, {"loss": 1.0, "perplexity": 2.7}).name == "loss"
        assert metric_in().name == "accuracy"
