"""Rounds over Flower: the same results, and nothing that clients do stops them."""

import copy

import pytest
import torch
from flower_samples import app_of, federation, grid_of
from flwr.app import ArrayRecord, ConfigRecord, Error, RecordDict

import toys
from fedveil import ConfigurationError, FedAvg, ProtocolError
from fedveil.flower import ByAnswer, ByKey, FlowerCrew, Patience
from fedveil.flower.payload import pack, unpack
from fedveil.wire import Message as Wire
from grids import LocalGrid, Node

QUICK = Patience(deadline=0.05, give_up=1.0, poll=0.01)


class Keys:
    """Clients by their keys, which here are their names."""

    def find(self, grid):
        return {node.public_key.decode(): node.node_id for node in grid.get_nodes()}


def run(grid, rounds=2, patience=QUICK, directory=None, **changes):
    crew = FlowerCrew(grid, directory or Keys(), patience)
    return federation(**changes).run(rounds, crew=crew)


def changed(**facts):
    """A reply with other values in its wire message."""

    def behave(reply):
        data, _ = unpack(reply.content)
        assert data is not None
        message = Wire.from_bytes(data)
        words = {name: getattr(message, name) for name in
                 ("kind", "scheme", "round", "client", "sections", "scalars")}  # fmt: skip
        return replaced(reply, Wire(**{**words, **facts}).to_bytes())

    return behave


def replaced(reply, data):
    reply.content = pack(data)
    return reply


def raw(reply):
    """A reply of another application."""
    reply.content = RecordDict({"w": ArrayRecord([torch.zeros(2).numpy()]), "c": ConfigRecord()})
    return reply


class TestResults:
    def test_are_those_of_the_in_process_engine_bit_for_bit(self):
        expected = federation().run(2)
        found = run(grid_of(federation()))
        assert toys.same(toys.weights(found.global_model), toys.weights(expected.global_model))
        for one, other in zip(found.rounds, expected.rounds, strict=True):
            assert one.bytes_down == other.bytes_down
            assert one.bytes_up == other.bytes_up
            assert one.loss_last == other.loss_last

    def test_nodes_may_be_known_by_what_they_answer(self):
        expected = federation().run(2)
        found = run(grid_of(federation()), directory=ByAnswer())
        assert toys.same(toys.weights(found.global_model), toys.weights(expected.global_model))

    def test_a_resumed_run_ends_as_one_that_was_never_stopped(self, tmp_path):
        expected = run(grid_of(federation()), rounds=3)
        run(grid_of(federation()), rounds=1, out=tmp_path)
        crew = FlowerCrew(grid_of(federation()), Keys(), QUICK)
        found = federation(out=tmp_path).run(3, resume=True, crew=crew)
        assert toys.same(toys.weights(found.global_model), toys.weights(expected.global_model))

    def test_every_client_is_sent_its_own_proxy_and_a_seed_alone(self):
        grid = grid_of(federation())
        run(grid)
        by_node = {number: node.key.decode() for number, node in grid.nodes.items()}
        assert len(grid.sent) == 6
        for message in grid.sent:
            data, facts = unpack(message.content)
            assert data is not None
            proxy = Wire.from_bytes(data)
            assert (proxy.kind, proxy.client) == ("proxy", by_node[message.metadata.dst_node_id])
            assert set(facts) == {"seed"}
            assert set(message.content) == {"fedveil.facts", "fedveil.message"}


FAULTS = {
    "its node went away": lambda reply: Error(code=5, reason="secret of the client"),
    "its program died": lambda reply: Error(code=8, reason="secret of the client"),
    "no answer": lambda reply: None,
    "rubbish": lambda reply: replaced(reply, b"rubbish"),
    "nothing": lambda reply: replaced(reply, None),
    "records of another application": raw,
    "an update for another round": changed(round=7),
    "another's update": changed(client="partner-2"),
    "a proxy": changed(kind="proxy"),
    "no examples": changed(scalars={}),
}


class TestFaults:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_fault_costs_that_clients_update_and_nothing_else(self, fault):
        found = run(grid_of(federation(), partner_1=FAULTS[fault]))
        for record in found.rounds:
            assert set(record.failed) == {"partner-1"}
            assert set(record.bytes_up) == {"partner-0", "partner-2"}
            assert "secret" not in record.failed["partner-1"]
        # As if it had never answered.
        silent = run(grid_of(federation(), partner_1=lambda reply: None))
        assert toys.same(toys.weights(found.global_model), toys.weights(silent.global_model))

    def test_who_answers_twice_has_answered_once(self):
        def twice(reply):
            return [reply, replaced(copy.copy(reply), b"and another thing")]

        found = run(grid_of(federation(), partner_1=twice))
        expected = run(grid_of(federation()))
        assert toys.same(toys.weights(found.global_model), toys.weights(expected.global_model))
        nobody = {"partner_0": lambda reply: None, "partner_2": lambda reply: None}
        with pytest.raises(ProtocolError, match="found 1"):  # not two
            run(grid_of(federation(), partner_1=twice, **nobody))

    def test_what_an_error_said_stays_with_the_client(self, caplog):
        bad = federation(clients={"a": toys.rows(4), "b": toys.rows(4, seed=1)})
        grid = grid_of(bad)

        def broken(context):
            raise ValueError("patient 4711 has no age")

        from fedveil.flower import client_app

        grid.nodes[10].app = client_app(broken)
        crew = FlowerCrew(grid, Keys(), QUICK)
        record = bad.run(1, crew=crew).rounds[0]
        assert "4711" not in record.failed["a"]
        assert "its own log" in record.failed["a"].lower()
        assert "4711" in caplog.text

    def test_a_proxy_for_another_client_is_not_trained(self):
        first = federation()
        grid = grid_of(first)
        grid.nodes[10].app = app_of(first, "partner-2")
        record = run(grid, rounds=1).rounds[0]
        assert "ProtocolError" in record.failed["partner-0"]

    def test_a_client_that_comes_back_takes_part_again(self):
        grid = grid_of(federation())
        away = grid.nodes.pop(11)

        class Back(Keys):
            def find(self, grid):
                if len(grid.sent) == 2:  # round 1 is under way without it
                    grid.nodes[99] = away  # under another number
                return super().find(grid)

        found = run(grid, directory=Back(), patience=Patience(0.02, 2, 1.0, 0.01))
        assert "partner-1" not in found.rounds[0].bytes_down
        assert "partner-1" in found.rounds[1].bytes_up

    def test_nothing_waits_for_ever(self):
        grid = grid_of(federation(), partner_1=lambda r: None, partner_0=lambda r: None)
        with pytest.raises(ProtocolError, match=r"Too few clients have answered.*at least 2"):
            run(grid)
        with pytest.raises(ProtocolError, match=r"Too few clients are connected.*found none"):
            run(LocalGrid({}))

    def test_a_quorum_of_the_owners_choice(self):
        grid = grid_of(federation(), partner_1=lambda r: None, partner_0=lambda r: None)
        found = run(grid, patience=Patience(0.05, 1, 1.0, 0.01))
        assert set(found.rounds[1].bytes_up) == {"partner-2"}


class TestKeys:
    KEY = (
        "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBDLBOlaz7cVJQ1Q6m9"
        "Q7fTn0N9Cv4V8q0o0v7jJr8z"
    )

    def pair(self):
        from cryptography.hazmat.primitives import serialization as s
        from cryptography.hazmat.primitives.asymmetric import ec

        public = ec.generate_private_key(ec.SECP384R1()).public_key()
        ssh = public.public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH).decode()
        pem = public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        return ssh, pem

    def test_nodes_are_the_clients_whose_keys_they_have(self):
        (one, one_pem), (other, _), (_, strange_pem) = self.pair(), self.pair(), self.pair()
        grid = LocalGrid({5: Node(None, one_pem), 6: Node(None, strange_pem), 7: Node(None)})
        assert ByKey({"a": one + " comment", "b": other}).find(grid) == {"a": 5}

    @pytest.mark.parametrize("key", ["", "rubbish", "ssh-rsa AAAA", KEY])
    def test_what_is_no_key_is_refused(self, key):
        with pytest.raises(ConfigurationError, match=r"key cannot be read.*clinic-1"):
            ByKey({"clinic-1": key})

    def test_two_clients_may_not_share_a_key(self):
        key = self.pair()[0]
        with pytest.raises(ConfigurationError, match="a and b"):
            ByKey({"a": key, "b": key})


@pytest.mark.parametrize(
    "words", [{"deadline": 0}, {"give_up": -1}, {"poll": float("nan")}, {"quorum": 0},
              {"quorum": 1.5}, {"deadline": "1"}, {"deadline": True}],
)  # fmt: skip
def test_impossible_patience_is_refused(words):
    with pytest.raises(ConfigurationError, match=next(iter(words))):
        Patience(**words)


def test_schemes_without_masks_run_as_well():
    changes = {"scheme": FedAvg()}
    expected = toys.federation(toys.mlp(), **changes).run(1)
    place = toys.federation(toys.mlp(), **changes)
    crew = FlowerCrew(grid_of(place), Keys(), QUICK)
    found = place.run(1, crew=crew)
    assert toys.same(toys.weights(found.global_model), toys.weights(expected.global_model))


def test_a_message_is_one_raw_array():
    content = pack(b"12345", {"seed": 3})
    assert unpack(content) == (b"12345", {"seed": 3})
    (array,) = content.array_records["fedveil.message"].values()
    assert (array.dtype, array.shape, array.data) == ("uint8", (5,), b"12345")
