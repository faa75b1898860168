"""Whole audits of small runs."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from audit_samples import changed, names, net
from torch import nn

import fedveil
import toys
from fedveil.audit import Evidence, audit
from fedveil.audit.attacks import can_simulate, interpolate
from fedveil.audit.words import sentence, title
from fedveil.errors import AuditError, ConfigurationError
from fedveil.run import Attacked, Audit, Checked, Exposure, Manifest
from fedveil.schemes import FedAvg, FedQSN
from fedveil.state import load_state, read_state
from fedveil.tasks import ImageClassification
from fedveil.training import Training
from fedveil.wire import Dense

CLASSES = 4
RULE = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(1))


def examples(count, seed, classes=range(CLASSES)):
    """Images [1, 4, 4] and which row of a matrix they agree with most."""
    generator, found = torch.Generator().manual_seed(seed), []
    while len(found) < count:
        image = torch.randn(1, 4, 4, generator=generator)
        label = int((RULE @ image.flatten()).argmax())
        if label in classes:
            found.append({"image": image, "label": label})
    return found


def wide(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def federation(out, scheme, model=None, **changes):
    clients = {f"c{i}": examples(60, i, (i, (i + 1) % CLASSES)) for i in range(CLASSES)}
    settings = {
        "task": ImageClassification(num_labels=CLASSES), "scheme": scheme, "out": out,
        "training": Training(steps=15, batch_size=16, learning_rate=0.01),
        "test": examples(400, 99), "secret": toys.SECRET, "keep_messages": True, **changes,
    }  # fmt: skip
    return fedveil.Federation(model or wide(), clients, **settings)


def audited(out, scheme, rounds=4, full=False, **changes):
    run = federation(out, scheme, **changes)
    run.run(rounds)
    return audit(Evidence(out), run.stage(wide(seed=7)), full=full)


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The paper's recipe: fresh masks."""
    return audited(tmp_path_factory.mktemp("paper"), FedQSN.paper(units="neurons"), 6, full=True)


def best(found, clients, **more):
    tried = [a for a in found.attacks if a.released and len(a.clients) == clients]
    tried = [a for a in tried if all(getattr(a, k) == v for k, v in more.items())]
    return max(attack.measures["accuracy"] for attack in tried)


class TestAFractionOfTheWayToTheOwnersModel:
    """An owner that releases a model between the public one and its own."""

    def test_is_all_of_it(self, tmp_path):
        public, rows = wide(seed=7), {"o": examples(400, 5)}
        tuning = Training(steps=60, batch_size=16, learning_rate=0.01)
        task, secret = ImageClassification(num_labels=CLASSES), toys.SECRET
        owner = fedveil.Federation(
            public, rows, task=task, training=tuning, scheme=FedAvg(), secret=secret
        )
        own = owner.run(1).global_model
        shown = copy.deepcopy(public)
        load_state(shown, interpolate(read_state(public), read_state(own), 0.1))
        scheme = FedQSN.once(server_mask=0.0, bits=None)
        run = federation(tmp_path, scheme, model=shown)
        run.run(1)
        stage = run.stage(public)
        models = {**stage.models, "base": read_state(own), "global": read_state(own)}
        stage = replace(stage, models=models)
        found = audit(Evidence(tmp_path), stage, full=True, coalitions=(1,))
        further = best(found, 1, polish="task arithmetic")
        assert further == pytest.approx(found.models["global"]["accuracy"], abs=0.5)
        assert best(found, 1, polish="") < further - 10
        assert found.strongest is not None
        assert found.strongest.leak is not None
        assert found.strongest.leak > 0.9


class TestAPublicModelReleased:
    """What anybody can make is nothing of the owner's, however good it is."""

    def audited(self, out, rounds=1, public=None, scheme=None):
        scheme = scheme or FedQSN.once(server_mask=0.0)
        run = federation(out, scheme, model=wide(3), public=wide(7), owner=examples(40, 8))
        run.run(rounds)
        return audit(Evidence(out), run.stage(public), coalitions=(1, 3))

    def test_once_leaks_nothing_and_the_audit_shows_why(self, tmp_path):
        found = self.audited(tmp_path)
        stolen = [a for a in found.attacks if a.released]
        simulated = [a for a in found.attacks if a.holes == "simulated"]
        assert [a.measures for a in simulated] == [a.measures for a in stolen]
        assert not any(a.released for a in simulated)
        assert all(a.leak is None or a.leak <= 0 for a in stolen)
        assert "byte for byte" in found.sentence
        assert "themselves" in title(simulated[0])

    @pytest.mark.parametrize(
        "changes",
        [
            {"rounds": 2},  # the second proxy shows what clients taught
            {"public": wide(5)},  # another model than was released
            {"scheme": FedQSN.once(server_mask=0.5)},  # the mask is the secret's
        ],
        ids=["rounds", "public", "mask"],
    )
    def test_nothing_else_can_be_simulated(self, tmp_path, changes):
        found = self.audited(tmp_path, **changes)
        assert not any(a.holes == "simulated" for a in found.attacks)
        assert "byte for byte" not in found.sentence

    def test_one_changed_byte_is_seen(self, tmp_path):
        run = federation(tmp_path, FedAvg(), model=wide(3), public=wide(7), owner=examples(40, 8))
        run.run(1)
        sent = Evidence(tmp_path).proxies(["c0", "c1"])
        assert can_simulate(FedAvg(), wide(7), sent)
        assert not can_simulate(FedAvg(), wide(6), sent)
        assert not can_simulate(FedQSN(), wide(7), sent)
        assert not can_simulate(FedAvg(), nn.Sequential(nn.Flatten()), sent)
        assert not can_simulate(FedAvg(), wide(7), [])
        content = bytearray(sent[1].path.read_bytes())
        content[-1] ^= 1
        sent[1].path.write_bytes(content)
        assert not can_simulate(FedAvg(), wide(7), sent)


class TestThePapersRecipe:
    def test_pooling_over_rounds_reaches_the_server_model(self, paper):
        server = paper.models["server_model"]["accuracy"]
        assert best(paper, 1, attack="pooling", rounds=6) > server - 5
        assert best(paper, 1, attack="pooling", rounds=1) < server - 10

    def test_more_clients_and_more_rounds_know_more(self, paper):
        errors = {
            (len(a.clients), a.rounds): a.error_released
            for a in paper.attacks
            if (a.attack, a.holes, a.polish) == ("pooling", "zeros", "")
        }
        assert errors[1, 6] < errors[1, 1]
        assert {size for size, _ in errors} == {1, 2, 3, 4}

    def test_withheld_units_are_unknown_and_released_ones_are_known(self, paper):
        plain = [a for a in paper.attacks if (a.holes, a.polish) == ("zeros", "") and a.rounds == 6]
        assert plain
        for attack in plain:
            assert attack.error_withheld == pytest.approx(1)
            assert attack.error_released < 0.6

    def test_everything_was_tried(self, paper):
        assert {a.attack for a in paper.attacks} == {"own data alone", *names("messages")}
        assert {attack.polish for attack in paper.attacks} == {"", *names("model")}
        assert {a.holes for a in paper.attacks if a.released} == {"zeros", "public"}
        assert {a.holes for a in paper.attacks if not a.released} == {"nothing", "public"}
        assert all(title(attack) for attack in paper.attacks)

    def test_leaks_are_what_they_are_said_to_be(self, paper):
        top = paper.models["global"]["accuracy"]
        base = paper.models["base"]["accuracy"]
        for attack in paper.attacks:
            own = max(
                a.measures["accuracy"]
                for a in paper.attacks
                if not a.released and a.clients == attack.clients
            )
            reached = attack.measures["accuracy"]
            if attack.released and attack.leak is not None:
                assert attack.leak == pytest.approx((reached - own) / (top - own))
            assert attack.gain_shown == pytest.approx((reached - base) / (top - base))

    def test_the_sentence_tells_the_worst(self, paper):
        assert f"reaches {paper.models['global']['accuracy']:.1f} %" in paper.sentence
        assert f"{best(paper, 1):.1f} %" in paper.sentence
        assert "alarm" not in paper.sentence

    def test_the_others_updates_are_inferred_after_every_round_but_the_last(self, paper):
        assert [guess.round for guess in paper.inferred] == [1, 2, 3, 4, 5]
        assert all(guess.cosine > 0.2 for guess in paper.inferred)

    def test_exposure_grows_with_rounds(self, paper):
        for one in paper.exposure.values():
            shares = list(one.after.values())
            assert shares == sorted(shares)
            assert shares[-1] == one.share > shares[0]
            assert list(one.after) == [1, 2, 3, 4, 5, 6]
            assert 0 <= one.next < 0.1
        sizes = list(paper.coalitions.values())
        assert sizes == sorted(sizes)
        assert list(paper.coalitions) == [1, 2, 3, 4]

    def test_it_survives_being_written(self, paper, tmp_path):
        paper.write(tmp_path)
        assert Audit.read(tmp_path) == paper
        json.loads((tmp_path / "audit.json").read_text())


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory):
    """A run that hides nothing."""
    return audited(tmp_path_factory.mktemp("fedavg"), FedAvg())


def test_fedavg_leaks_everything(fedavg):
    found, strongest = fedavg, fedavg.strongest
    assert strongest.measures["accuracy"] > found.models["global"]["accuracy"] - 6
    assert all(one.share == 1 for one in found.exposure.values())


def test_what_fedavg_has_none_of_is_not_called_sound(fedavg):
    answers = {one.check: one.outcome for one in fedavg.checks}
    for name in ("withheld units", "server mask", "few bits", "unguessable masks"):
        assert answers[name] == "not applicable"
    assert "4 of 7 checks do not apply: withheld units, server mask, few bits" in fedavg.sentence


def test_one_release_shows_nothing_of_the_gain(tmp_path):
    scheme = FedQSN(units="neurons", client_mask=0.0, aggregation="regmean")
    found = audited(tmp_path, scheme, rounds=1, releases=1)
    plain = [a for a in found.attacks if a.released and not a.polish]
    base, top = (found.models[name]["accuracy"] for name in ("base", "global"))
    assert top > base + 20
    # The base is what was released; untrained, it is worth as much as chance.
    assert all(attack.measures["accuracy"] < base + 10 for attack in plain)


def test_it_repeats_itself_and_changes_nothing(tmp_path):
    run = federation(tmp_path, FedQSN(units="neurons"))
    run.run(2)
    before = toys.files(tmp_path)
    one, other = (
        replace(audit(Evidence(tmp_path), run.stage(wide(7))), seconds=0) for _ in range(2)
    )
    assert one == other
    assert toys.files(tmp_path) == before


def test_without_a_public_model_attackers_begin_at_nothing(tmp_path):
    run = federation(tmp_path, FedQSN(units="neurons"))
    run.run(2)
    found = audit(Evidence(tmp_path), run.stage())
    assert "public" not in found.models
    assert "Nothing was taken for public" in found.sentence
    assert {attack.holes for attack in found.attacks if attack.released} == {"zeros"}
    assert {attack.holes for attack in found.attacks if not attack.released} == {"nothing"}


def test_messages_that_show_too_much_are_an_alarm_and_no_crash(tmp_path):
    run = federation(tmp_path, FedQSN(units="neurons"))
    run.run(1)
    kept = Evidence(tmp_path).proxies()[0]
    message = changed(kept.read(), {"hint": Dense(torch.zeros(3))})
    kept.path.write_bytes(message.to_bytes())
    found = audit(Evidence(tmp_path), run.stage())
    assert found.attacks == []
    assert "withheld units" in found.sentence
    assert found.strongest is None


def test_what_was_sent_and_not_kept_was_shown_all_the_same(tmp_path):
    run = federation(tmp_path, FedQSN(units="neurons", policy="fresh"))
    run.run(3)
    for kept in Evidence(tmp_path).proxies(["c0"])[1:]:
        kept.path.unlink()
    found = audit(Evidence(tmp_path), run.stage())
    ledger = Exposure(Manifest.read(tmp_path), tmp_path)
    assert found.exposure["c0"].share == ledger.share(["c0"])
    assert list(found.exposure["c0"].after) == [1, 2, 3]


def test_the_owner_chooses_how_many_collude(tmp_path):
    run = federation(tmp_path, FedQSN(units="neurons"), keep_messages="proxies")
    run.run(1)
    found = audit(Evidence(tmp_path), run.stage(), coalitions=[2, 99])
    assert {len(attack.clients) for attack in found.attacks} == {2, 4}
    assert "client gets" not in found.sentence
    assert not found.inferred, "no update was kept"


class TestTheSentence:
    def found(self, reached, own, base):
        """An audit in which one client attacked a model of 90 %."""
        alone = Attacked("own data alone", ("a",), 0, False, "public", "", {"accuracy": own})
        stolen = Attacked(
            "pooling", ("a",), 1, True, "zeros", "", {"accuracy": reached},
            (reached - own) / (90 - own), (reached - base) / (90 - base),
        )  # fmt: skip
        return Audit(
            sentence="", scheme={}, rounds=1, metric="accuracy",
            models={"global": {"accuracy": 90.0}, "base": {"accuracy": base}},
            attacks=[alone, stolen], checks=[], exposure={},
        )  # fmt: skip

    def test_base_and_gain_are_told_apart(self):
        text = sentence(self.found(65.0, 40.0, 65.0))
        assert "reaches 90.0 %, your base 65.0 %" in text
        assert "gets to 65.0 %, and to 40.0 % without a released byte" in text
        assert "50 % of what your model is ahead of that has leaked, and none of what" in text

    def test_some_of_the_gain(self):
        assert "has leaked, and 50 % of what" in sentence(self.found(75.0, 40.0, 60.0))

    def test_no_lead_that_could_leak(self):
        found = self.found(91.0, 89.5, 50.0)
        lost = replace(found.attacks[1], leak=None)
        text = sentence(replace(found, attacks=[found.attacks[0], lost]))
        assert "91.0 %, and to 89.5 % without a released byte: your model is not ahead of" in text

    def test_without_an_attack_nothing_is_known(self):
        text = sentence(replace(self.found(60.0, 70.0, 50.0), attacks=[]))
        assert (
            "No attack was tried: what clients can make of what they were sent is not known" in text
        )
        assert "No attack" not in sentence(self.found(60.0, 70.0, 50.0))

    def test_what_one_of_two_coalitions_can_simulate_is_not_what_both_can(self):
        found = self.found(60.0, 70.0, 50.0)
        simulated = replace(found.attacks[0], holes="simulated")
        assert "byte for byte" in sentence(replace(found, attacks=[*found.attacks, simulated]))
        other = replace(found.attacks[1], clients=("b",))
        attacks = [*found.attacks, simulated, other]
        assert "byte for byte" not in sentence(replace(found, attacks=attacks))

    def test_how_many_checks_do_not_apply(self):
        checks = [
            Checked("one", "alarm", "."), Checked("two", "sound", "."),
            Checked("three", "not applicable", "."),
        ]  # fmt: skip
        text = sentence(replace(self.found(60.0, 70.0, 50.0), checks=checks))
        assert "1 of 3 checks raise an alarm: one. 1 of 3 checks do not apply: three." in text
        assert "two" not in text

    def test_nothing_leaked(self):
        text = sentence(self.found(60.0, 70.0, 50.0))
        assert "60.0 %, no further than without a released byte (70.0 %)." in text
        assert "leaked" not in text


class TestBadInput:
    @pytest.mark.parametrize("size", [0, -1, 1.5, True, "1"])
    def test_impossible_coalitions(self, tmp_path, size):
        run = federation(tmp_path, FedQSN(units="neurons"))
        run.run(1)
        with pytest.raises(ConfigurationError, match="impossible size"):
            audit(Evidence(tmp_path), run.stage(), coalitions=[size])

    def test_messages_of_another_run(self, tmp_path):
        runs = []
        for name, secret in (("one", toys.SECRET), ("other", fedveil.Secret(bytes(32)))):
            run = federation(tmp_path / name, FedQSN(units="neurons"), secret=secret)
            run.run(1)
            runs.append(run)
        for kept in Evidence(tmp_path / "other").proxies():
            target = tmp_path / "one" / kept.path.relative_to(tmp_path / "other")
            target.write_bytes(kept.path.read_bytes())
        with pytest.raises(AuditError, match="not the one that the run released"):
            audit(Evidence(tmp_path / "one"), runs[0].stage())

    def test_no_finished_round(self, tmp_path):
        with pytest.raises(AuditError, match="no finished round"):
            federation(tmp_path, FedQSN(units="neurons")).stage()

    def test_no_test_set(self, tmp_path):
        with pytest.raises(AuditError, match="test set"):
            federation(tmp_path, FedQSN(units="neurons"), test=None).stage()

    def test_no_folder(self):
        run = federation(None, FedQSN(units="neurons"), keep_messages=False)
        with pytest.raises(AuditError, match="no folder"):
            run.stage()

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("{", "cannot be read"),
            ("{}", "another version"),
            ('{"format": 1, "alarms": []}', "another version"),
            ('{"format": 2, "attacks": []}', "another version"),
            ('{"format": 3}', "damaged"),
        ],
    )
    def test_a_damaged_audit(self, tmp_path, text, problem):
        (tmp_path / "audit.json").write_text(text)
        with pytest.raises(AuditError, match=problem) as found:
            Audit.read(tmp_path)
        assert f"fedveil audit {tmp_path}" in found.value.fix

    def test_an_answer_that_no_check_gives(self, fedavg, tmp_path):
        path = fedavg.write(tmp_path)
        path.write_text(path.read_text().replace('"not applicable"', '"fine"'))
        with pytest.raises(AuditError, match="damaged"):
            Audit.read(tmp_path)

    def test_no_audit(self, tmp_path):
        with pytest.raises(AuditError, match="fedveil audit"):
            Audit.read(tmp_path)


def test_the_toy_net_has_no_tensor_that_is_cut_twice():
    # Otherwise its own quantizing would raise an alarm.
    groups = FedQSN(units="neurons").server(net(), toys.SECRET).groups
    axes = {}
    for part in (part for group in groups for part in group.slices):
        axes.setdefault(part.tensor, set()).add(part.axis)
    assert all(len(found) == 1 for found in axes.values())
