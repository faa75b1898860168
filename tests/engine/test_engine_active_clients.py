"""What one hostile client of ten reads and breaks: with the default bounds, and without any."""

from dataclasses import replace

import pytest
import torch
from active_samples import (
    ATTACKER,
    DAMAGES,
    MOST,
    Liar,
    changed,
    norm_of,
    read_digits,
    read_images,
    run,
    toy,
    updates_of,
)

from fedveil import FedAvg, FedQSN, Training
from fedveil.state import read_state
from fedveil.wire import Message

SCHEMES = {"fedavg": FedAvg(), "regmean": FedAvg(aggregation="regmean"), "fedqsn": FedQSN()}


@pytest.fixture(scope="module")
def scene():
    return toy(0)


class TestDigits:
    """A client that claims all examples subtracts what it was sent, and is sent the rest."""

    def test_without_bounds_it_reads_released_weights_to_a_millionth(self, scene):
        read = read_digits(scene, bounded=False)
        assert read.honest > 0.08
        assert read.best < 2e-6
        assert all(new < 0.2 * old for old, new in zip(read.errors, read.errors[1:], strict=False))

    def test_with_bounds_it_reads_what_anybody_reads(self, scene):
        read = read_digits(scene, bounded=True)
        assert read.best >= read.honest > 0.08

    def test_the_record_says_what_was_cut_of_it(self, scene):
        cut = read_digits(scene, bounded=True, rounds=2).cut
        assert len(cut) == 2
        assert all("claim" in one and "update" in one for one in cut)
        assert read_digits(scene, bounded=False, rounds=2).cut == []


class TestImages:
    """It puts a trap in the model's place, and reads what the others' images did to it."""

    def test_without_bounds_it_reads_others_images(self, scene):
        read = read_images(scene, bounded=False, passes=1)
        assert len(read.similarities) == 18
        assert read.found >= 9
        # It has put the model back, and the owner sees nothing of it.
        assert read.accuracy == pytest.approx(read.base, abs=10)

    def test_with_bounds_it_reads_none_and_comes_near_none(self, scene):
        read = read_images(scene, bounded=True, passes=1)
        assert read.found == 0
        # Pixels of noise between 0 and 1: grey everywhere is about 10.8 dB from any of them.
        assert max(read.similarities) < 13


class TestDamage:
    def moved(self, scene, scheme, bounded, attackers):
        """How far one round moves the model."""
        settings = {"test": None, "evaluation": None}
        result = run(scene.federation(scheme, bounded, **settings), attackers, 1)
        begun = read_state(scene.model)
        state = read_state(result.global_model)
        return norm_of({name: tensor - begun[name] for name, tensor in state.items()})

    @pytest.mark.parametrize("how", DAMAGES)
    def test_no_client_moves_the_model_much_further_than_all_do(self, scene, how):
        twist, scheme = DAMAGES[how]
        honest = self.moved(scene, scheme, True, {})
        hostile = self.moved(scene, scheme, True, {ATTACKER: Liar(twist)})
        assert hostile < 3 * honest

    # A million everywhere is seen for what it is, and left out, with bounds and without.
    @pytest.mark.parametrize(
        "how", [name for name in DAMAGES if "noise" not in name and "million" not in name]
    )
    def test_without_bounds_it_moves_the_model_as_it_likes(self, scene, how):
        twist, scheme = DAMAGES[how]
        honest = self.moved(scene, scheme, False, {})
        hostile = self.moved(scene, scheme, False, {ATTACKER: Liar(twist)})
        assert hostile > 5 * honest

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_one_tensor_gets_no_more_of_it_than_all_together(self, scene, scheme):
        """All of an update's length in the last bias, however small that is."""

        def twist(received, honest):
            updates = {n: torch.zeros_like(t) for n, t in updates_of(honest).items()}
            updates["3.bias"] += 1e5
            return changed(received, honest, updates, examples=MOST)

        honest = self.moved(scene, SCHEMES[scheme], True, {})
        assert self.moved(scene, SCHEMES[scheme], True, {ATTACKER: Liar(twist)}) < 5 * honest

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2e6])
    def test_what_is_no_update_costs_its_client_the_round(self, scene, value):
        def twist(received, honest):
            updates = updates_of(honest)
            updates["3.bias"] = torch.full_like(updates["3.bias"], value)
            return changed(received, honest, updates)

        result = run(scene.federation(FedAvg(), True), {ATTACKER: Liar(twist)}, 1)
        assert [*result.rounds[0].failed] == [ATTACKER]
        assert len(result.rounds[0].bytes_up) == 9

    @pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30])
    def test_a_client_that_changes_nothing_holds_back_nobody(self, scene, value):
        def twist(received, honest):
            return changed(
                received,
                honest,
                {n: torch.full_like(t, value) for n, t in updates_of(honest).items()},
            )

        result = run(scene.federation(FedAvg(), True), {ATTACKER: Liar(twist)}, 1)
        assert result.rounds[0].bounded == {}

    @pytest.mark.parametrize("claim", [0, -1])
    def test_an_impossible_claim_costs_its_client_the_round(self, scene, claim):
        class Claims:
            def answer(self, received):
                return received.nothing(examples=claim)

        result = run(scene.federation(FedAvg(), True), {ATTACKER: Claims()}, 1)
        assert [*result.rounds[0].failed] == [ATTACKER]


class TestTwoClients:
    """What is NOT protected: of two clients each reads the other's share of a step."""

    def test_each_reads_the_others_head_update_exactly_and_its_classes(self, tmp_path):
        scene = toy(3)
        sgd = Training(steps=1, learning_rate=0.1, optimizer="sgd", schedule="constant")
        clients = {name: scene.clients[name] for name in ("client-00", "client-01")}
        pair = replace(scene, clients=clients, training=sgd)
        federation = pair.federation(FedQSN(), True, out=tmp_path, keep_messages=True)
        federation.run(2)

        def message(number, client, kind):
            path = tmp_path / "messages" / f"round-{number:06d}" / f"{client}.{kind}.safetensors"
            return Message.from_bytes(bytearray(path.read_bytes()))

        # All that client-00 has: two proxies, and its own update.
        first, second = (message(n, "client-00", "proxy").sections["3.bias"].tensor for n in (1, 2))
        own = updates_of(message(1, "client-00", "update"))["3.bias"]
        read = 2 * (second - first) - own
        others = updates_of(message(1, "client-01", "update"))["3.bias"]
        torch.testing.assert_close(read, others, rtol=1e-4, atol=1e-7)
        labels = {int(row["label"]) for row in clients["client-01"].rows}
        assert {number for number, step in enumerate(read.tolist()) if step > 0} == labels
