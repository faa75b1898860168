"""What an attack has to say and to yield, and that the audit needs no more of it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_samples import CLIENTS, Recorded, net

import toys
from fedveil.audit import Evidence, audit
from fedveil.audit.attacks import (
    Coalition,
    Simulated,
    Stolen,
    attack_names,
    attacks,
    impute,
    pool,
    registry,
)
from fedveil.audit.attacks.dropout_rescaling import rescale
from fedveil.audit.attacks.registry import Beginning
from fedveil.audit.words import title
from fedveil.errors import ConfigurationError
from fedveil.federation.stage import Stage
from fedveil.schemes import FedAvg, FedQSN
from fedveil.tasks import ImageClassification

EXACT: dict[str, Any] = {"units": "neurons", "server_mask": 0.2, "client_mask": 0.5, "bits": None}
DOCS = Path(__file__).parents[2] / "docs" / "audit.md"
LINKS = {
    r"arXiv (\d+\.\d+)": r"arXiv [\1](https://arxiv.org/abs/\1)",
    r"doi ([^ ;]+)": r"doi [\1](https://doi.org/\1)",
}
WORDS: dict[str, Any] = {
    "title": "told", "does": "does something", "source": "ours", "begins": "messages",
}  # fmt: skip


def linked(source):
    """Where an attack is from, in Markdown."""
    for pattern, link in LINKS.items():
        source = re.sub(pattern, link, source)
    return source


@pytest.fixture
def known(monkeypatch):
    """The registry, which is afterwards what it was."""
    monkeypatch.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))
    return registry._ATTACKS


class TestTheRegistry:
    def test_knows_what_the_literature_has(self):
        assert set(attack_names()) >= {
            "averaging", "consistent reconstruction", "distillation", "dropout rescaling",
            "fine-tuning", "one-shot federation", "pooling", "restricted softmax",
            "task arithmetic", "update inference", "view simulation", "weight extrapolation",
            "weight interpolation",
        }  # fmt: skip

    def test_every_file_of_an_attack_registers_it_by_the_files_name(self):
        files = {one.run.__module__.rpartition(".")[2] for one in registry._ATTACKS.values()}
        steps = {"coalition", "imputation", "partial_model", "registry", "__init__"}
        folder = Path(registry.__file__).parent
        assert files == {path.stem for path in folder.glob("*.py")} - steps
        for one in registry._ATTACKS.values():
            assert re.sub("[ -]", "_", one.name) == one.run.__name__
            assert one.run.__module__.endswith(f".{one.run.__name__}")

    def test_a_quick_audit_tries_few(self):
        cases: list[tuple[Beginning, list[str]]] = [
            ("messages", ["pooling"]),
            ("model", ["fine-tuning"]),
        ]
        for begins, quick in cases:
            assert [one.name for one in attacks(begins, full=False)] == quick
            assert [one.name for one in attacks(begins)][: len(quick)] == quick

    @pytest.mark.parametrize("field", ["title", "does", "source"])
    def test_an_attack_says_what_it_is(self, field):
        with pytest.raises(ConfigurationError, match="does not say what it is") as found:
            registry.register_attack("mine", **{**WORDS, field: " "})
        assert field in found.value.expected
        assert "'mine'" in found.value.where

    def test_an_unknown_beginning(self):
        with pytest.raises(ConfigurationError, match="begins with what there is not") as found:
            registry.register_attack("mine", **{**WORDS, "begins": "anything"})
        assert found.value.found == "'anything'"

    def test_a_name_is_taken_once(self, known):
        with pytest.raises(ConfigurationError, match="Two attacks have one name") as found:
            registry.register_attack("pooling", **WORDS)(lambda coalition: iter(()))
        assert "attacks.pooling and test_audit" in found.value.where
        for _ in range(2):  # a file that is run again
            registry.register_attack("mine", **WORDS)(lambda coalition: iter(()))
        assert "mine" in known


class TestASeam:
    def run(self, folder, scheme=None):
        scheme = scheme or FedQSN(units="neurons")
        run = toys.federation(
            toys.mlp(), scheme=scheme, out=folder, keep_messages=True, test=toys.rows(20)
        )
        run.run(1)
        return run

    def test_an_attack_is_tried_as_soon_as_it_is_registered(self, tmp_path, known):
        run, given = self.run(tmp_path), []

        @registry.register_attack("mine", **WORDS, quick=True)
        def mine(coalition: Coalition):
            given.append(coalition)
            yield Stolen(coalition.stage.models["global"], "nothing is missing")

        @registry.register_attack("and back", **{**WORDS, "begins": "model"}, quick=True)
        def and_back(coalition: Coalition):
            yield Stolen(coalition.start)

        found = audit(Evidence(tmp_path), run.stage(toys.mlp(7)), coalitions=[2])
        (one,) = [a for a in found.attacks if a.attack == "mine" and not a.polish]
        assert one.measures == found.models["global"]
        assert (one.holes, one.error_released) == ("nothing is missing", None)
        # What is best is what attacks on a model begin with.
        (other,) = [a for a in found.attacks if a.polish == "and back"]
        assert (other.attack, other.holes, other.measures) == ("mine", one.holes, one.measures)
        assert "told" in title(one)
        assert given[0].clients == one.clients
        assert {kept.client for kept in given[0].sent} == set(one.clients)

    def test_what_is_found_is_what_was_said(self, tmp_path, known):
        run = self.run(tmp_path)

        @registry.register_attack("mine", **WORDS)
        def mine(coalition: Coalition):
            yield Simulated()

        with pytest.raises(ConfigurationError, match="finds what nobody looks for") as found:
            audit(Evidence(tmp_path), run.stage(), full=True, coalitions=[1])
        assert (found.value.found, found.value.where) == ("Simulated", "the attack 'mine'")
        assert found.value.expected.startswith("Stolen")

    def test_a_name_that_is_not_known_here_is_shown_as_it_is(self, tmp_path):
        run = self.run(tmp_path, FedAvg())
        (attack, *_) = audit(Evidence(tmp_path), run.stage(), coalitions=[1]).attacks
        assert title(attack).startswith("own data alone, from nothing")

    def test_the_docs_list_every_attack_in_its_own_words(self):
        lines = DOCS.read_text(encoding="utf-8").splitlines()
        rows = {tuple(line.strip("| ").split(" | ")) for line in lines}
        for one in registry._ATTACKS.values():
            assert (one.name, one.does, linked(one.source)) in rows


class TestACoalition:
    TASK = ImageClassification(num_labels=3)

    def coalition(self, folder, **changes):
        evidence = Recorded(folder, FedQSN(**EXACT)).play(1)
        rows = self.TASK.prepare(toys.rows(6))
        stage = Stage(
            net(), self.TASK, rows, toys.FAST, {"a": rows}, {}, public=toys.weights(net(5))
        )
        return Coalition(("a",), evidence.proxies(["a"]), evidence, stage, **changes)

    def test_makes_once_what_several_attacks_need_of_one_start(self, tmp_path):
        numbers = iter(range(9))
        coalition = self.coalition(tmp_path)
        assert [coalition.once("it", lambda: next(numbers)) for _ in range(2)] == [0, 0]
        another = replace(coalition, start=toys.weights(net()))
        assert another.once("it", lambda: next(numbers)) == 1

    def test_fills_holes_in_every_way_that_it_has(self, tmp_path):
        coalition = self.coalition(tmp_path, ways=("zeros", "public"))
        manifest = coalition.evidence.manifest
        known = pool(coalition.evidence, coalition.sent)
        zeros, public = coalition.completed(known)
        assert (zeros.holes, public.holes) == ("zeros", "public")
        assert toys.same(zeros.state, impute(known, manifest))
        assert toys.same(public.state, impute(known, manifest, coalition.stage.public))
        for seen in known.known.values():
            seen.fill_(True)
        assert [stolen.holes for stolen in coalition.completed(known)] == ["zeros"]


class TestDropoutRescaling:
    def test_is_exact_where_the_missing_units_are_like_the_others(self, tmp_path):
        def alike(number, tensors):
            tensors["1.weight"][:] = tensors["1.weight"][0].clone()
            tensors["1.bias"][:] = 0.5
            tensors["3.weight"][:] = tensors["3.weight"][:, :1].clone()

        recorder = Recorded(tmp_path, FedQSN(**EXACT), move=alike)
        evidence = recorder.play(1)
        images = torch.rand(5, 1, 4, 4)
        wanted = self.answers(recorder.truth[1], images)
        known = pool(evidence, evidence.proxies(CLIENTS[:1]))
        plain = self.answers(impute(known, evidence.manifest), images)
        assert rescale(known, evidence.manifest.groups)
        torch.testing.assert_close(
            self.answers(impute(known, evidence.manifest), images), wanted, rtol=1e-4, atol=1e-4
        )
        assert (plain - wanted).abs().max() > 0.1

    def test_changes_what_is_read_of_units_alone(self, tmp_path):
        evidence = Recorded(tmp_path, FedQSN(**EXACT)).play(1)
        one, other = (pool(evidence, evidence.proxies(["a"])) for _ in range(2))
        rescale(other, evidence.manifest.groups)
        ratio = 256 / int(one.known["1.bias"].sum())
        for name, value in one.values.items():
            torch.testing.assert_close(
                other.values[name], value * (ratio if name == "3.weight" else 1)
            )

    def test_does_nothing_where_nothing_is_missing_or_nothing_known(self, tmp_path):
        whole = FedQSN(units="neurons", server_mask=0.0, client_mask=0.0, bits=None)
        evidence = Recorded(tmp_path, whole).play(1)
        known = pool(evidence, evidence.proxies(["a"]))
        assert not rescale(known, evidence.manifest.groups)
        assert not rescale(pool(evidence, []), evidence.manifest.groups)
        assert known.share() == 1

    @staticmethod
    def answers(state, images):
        model = net()
        model.load_state_dict(state)
        with torch.no_grad():
            return model(images)
