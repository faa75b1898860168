"""Schemes around Flower's strategies: nodes get proxies, strategies get whole models."""

import math
from typing import Any

import pytest
import torch
from flower_samples import grid_of
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
)
from test_flower_crew import Keys, changed

import fedveil
import toys
from fedveil import Bounds, ConfigurationError, FedQSN, ProtocolError
from fedveil.flower import ByNode, ModelPrivacy, Patience, proxy_mod
from fedveil.flower.payload import pack, unpack
from fedveil.run import Exposure, Manifest
from fedveil.updates import SMALL
from fedveil.wire import Dense
from fedveil.wire import Message as Wire
from grids import LocalGrid, Node, bytes_of

SCHEME = FedQSN(units="neurons", average="participants")
EVERYONE: dict[str, Any] = {"min_train_nodes": 3, "min_available_nodes": 3, "min_evaluate_nodes": 3}


def strategy(inner=None, scheme=SCHEME, **words):
    words = {"model": toys.mlp(), "secret": toys.SECRET, "directory": Keys(), "seed": 3, **words}
    return ModelPrivacy(scheme, inner=inner or FedAvg(**EVERYONE), **words)


def start(grid, shield=None, rounds=2, **words):
    shield = shield or strategy()
    arrays = ArrayRecord(toys.mlp().state_dict())
    return shield.start(grid, arrays, num_rounds=rounds, **words).arrays.to_torch_state_dict()


def nearly(found, expected):
    return all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


def grid(**behaviours):
    return grid_of(toys.federation(toys.mlp(), scheme=SCHEME), **behaviours)


@pytest.mark.parametrize("scheme", [SCHEME, fedveil.FedAvg(), FedQSN.paper(units="neurons")])
def test_with_flowers_mean_the_model_is_that_of_the_scheme(scheme):
    run = toys.federation(toys.mlp(), scheme=scheme)
    expected = toys.weights(run.run(2).global_model)
    assert nearly(start(grid_of(run), strategy(scheme=scheme)), expected)


class TestWhatLeaves:
    def test_is_a_proxy_of_its_own_for_each_node_and_a_seed(self):
        nodes = grid()
        start(nodes, train_config=ConfigRecord({"lr": 0.1}))
        assert len(nodes.sent) == 6  # no evaluation, though FedAvg wants one
        for message in nodes.sent:
            data, facts = unpack(message.content)
            assert data is not None
            proxy = Wire.from_bytes(data)
            client = nodes.nodes[message.metadata.dst_node_id].key.decode()
            assert (proxy.kind, proxy.client) == ("proxy", client)
            assert set(facts) == {"seed"}
            assert len(message.content.array_records) == 1
            assert dict(message.content["config"]) == {"lr": 0.1, "server-round": proxy.round}

    def test_never_is_a_row_of_a_model(self):
        nodes, shield = grid(), strategy()
        states = [toys.weights(toys.mlp()), start(nodes, shield, 1)]
        states.append(shield.final())
        leaving = b"".join(bytes_of(message) for message in nodes.sent)
        for state in states:
            # What is smaller than this is sent exactly.
            rows = [row for t in state.values() if t.numel() >= SMALL for row in t]
            assert len(rows) > 10
            assert not any(row.numpy().tobytes() in leaving for row in rows)

    def test_messages_share_nothing_that_one_of_them_could_change(self):
        messages = strategy().configure_train(
            1, ArrayRecord(toys.mlp().state_dict()), ConfigRecord({"a": 1}), grid()
        )
        one, other, _ = (message.content for message in messages)
        assert one["config"] is not other["config"]
        assert isinstance(messages, list)  # Flower goes through it twice


class TestInnerStrategies:
    INNER = (
        Krum(num_malicious_nodes=0, **EVERYONE),
        FedMedian(**EVERYONE),
        FedTrimmedAvg(beta=0.4, **EVERYONE),
        Bulyan(num_malicious_nodes=0, **EVERYONE),
        FedAdam(eta=0.01, **EVERYONE),
        DifferentialPrivacyServerSideFixedClipping(FedAvg(**EVERYONE), 0.0, 0.01, 3),
    )

    @pytest.mark.parametrize("inner", INNER, ids=lambda inner: type(inner).__name__)
    def test_get_whole_models_and_decide(self, inner):
        base = toys.weights(toys.mlp())
        after = start(grid(), strategy(inner))
        assert set(after) == set(base)
        assert not toys.same(after, base)
        assert all(torch.isfinite(tensor).all() for tensor in after.values())

    def test_a_median_is_not_moved_by_one_who_lies(self):
        def lie(reply):
            data, _ = unpack(reply.content)
            assert data is not None
            update = Wire.from_bytes(data).sections
            huge = {n: Dense(s.tensor * 0 + 100.0) for n, s in update.items()}
            return changed(sections=huge)(reply)

        def moved(inner, bounds=None):
            nodes = grid(partner_1=lie)
            after, base = start(nodes, strategy(inner, bounds=bounds)), toys.weights(toys.mlp())
            return max(float((after[n] - base[n]).abs().max()) for n in base)

        assert moved(FedAvg(**EVERYONE), Bounds.none()) > 10
        assert moved(FedMedian(**EVERYONE), Bounds.none()) < 1
        assert moved(FedAvg(**EVERYONE)) < 1  # nor is a mean, as updates are bounded

    def test_nobody_weighs_what_it_claims(self):
        def lie(reply):
            data, _ = unpack(reply.content)
            assert data is not None
            scalars = {**Wire.from_bytes(data).scalars, "examples": 2**63 - 1}
            return changed(scalars=scalars)(reply)

        told = []

        class Spy(FedAvg):
            def aggregate_train(self, server_round, replies):
                replies = list(replies)
                told.extend(r.content["metrics"]["num-examples"] for r in replies)
                return super().aggregate_train(server_round, replies)

        start(grid(partner_1=lie), strategy(Spy(**EVERYONE)), rounds=1)
        honest = sorted(told)[:2]
        assert sorted(told)[2] <= 5 * honest[1]

    def test_withheld_units_count_as_unchanged(self):
        seen = []

        class Spy(FedAvg):
            def aggregate_train(self, server_round, replies):
                seen.extend(replies)
                return super().aggregate_train(server_round, seen)

        nodes = grid()
        start(nodes, strategy(Spy(**EVERYONE)), rounds=1)
        base = toys.weights(toys.mlp())
        for reply, sent in zip(seen, nodes.sent, strict=True):
            data, _ = unpack(sent.content)
            assert data is not None
            proxy = Wire.from_bytes(data)
            group = next(n for n in proxy.sections if n.startswith("units/"))
            units = set(proxy.sections[group].released.tolist())
            whole = reply.content["arrays"].to_torch_state_dict()["1.weight"]
            withheld = [row for row in range(len(whole)) if row not in units]
            assert withheld
            assert torch.equal(whole[withheld], base["1.weight"][withheld])
            assert reply.metadata.src_node_id == sent.metadata.dst_node_id


FAULTS = {
    "error": lambda reply: Error(code=2, reason="secret of the client"),
    "no answer": lambda reply: None,
    "rubbish": lambda reply: with_content(reply, pack(b"rubbish")),
    "nothing": lambda reply: with_content(reply, pack(None, {"failure": "other"})),
    "not ours": lambda reply: with_content(reply, RecordDict({"c": ConfigRecord()})),
    "another round": changed(round=7),
    "another's": changed(client="partner-2"),
    "no examples": changed(scalars={}),
    "an impossible number": changed(scalars={"examples": -1}),
}


def with_content(reply, content):
    reply.content = content
    return reply


class TestFaults:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_fault_costs_that_clients_update_and_nothing_else(self, fault):
        silent = start(grid(partner_1=lambda reply: None))
        assert nearly(start(grid(partner_1=FAULTS[fault])), silent)

    def test_metrics_of_one_alone_cost_nothing(self):
        def chatty(reply):
            reply.content["more"] = MetricRecord({"accuracy": math.nan, "num-examples": 10**9})
            return reply

        assert nearly(start(grid(partner_1=chatty)), start(grid()))

    @pytest.mark.parametrize("loss", [1e9, 1e150, 1e300])
    def test_no_number_that_a_client_adds_decides(self, loss):
        from flwr.serverapp.strategy import QFedAvg

        def lie(reply):
            data, _ = unpack(reply.content)
            assert data is not None
            scalars = {**Wire.from_bytes(data).scalars, "loss_last": loss}
            return changed(scalars=scalars)(reply)

        def moved(**behaviours):
            inner = QFedAvg(
                client_learning_rate=0.1, train_loss_key="loss_last", fraction_evaluate=0.0,
                **{k: v for k, v in EVERYONE.items() if "evaluate" not in k},
            )  # fmt: skip
            after = start(grid(**behaviours), strategy(inner), rounds=1)
            base = toys.weights(toys.mlp())
            return math.sqrt(sum(float((after[n] - base[n]).square().sum()) for n in base))

        assert moved(partner_1=lie) < 3 * moved()

    def test_who_lacks_a_number_that_the_others_add_is_left_out(self):
        def mute(reply):
            data, _ = unpack(reply.content)
            assert data is not None
            scalars = dict(Wire.from_bytes(data).scalars)
            del scalars["loss_last"]
            return changed(scalars=scalars)(reply)

        absent = {"partner_1": lambda reply: None}
        two: dict[str, Any] = {
            "min_train_nodes": 2,
            "min_available_nodes": 3,
            "fraction_evaluate": 0.0,
        }
        without = start(grid(**absent), strategy(FedAvg(**two)), rounds=1)
        assert nearly(start(grid(partner_1=mute), strategy(FedAvg(**two)), rounds=1), without)

    def test_a_round_without_any_answer_changes_nothing(self):
        nobody = {f"partner_{number}": lambda reply: None for number in range(3)}
        shield = strategy()
        result = shield.start(grid(**nobody), ArrayRecord(toys.mlp().state_dict()), num_rounds=2)
        assert not result.arrays
        assert toys.same(shield.final(), toys.weights(toys.mlp()))

    def test_nobody_waits_for_ever_for_nodes(self, monkeypatch):
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        with pytest.raises(ProtocolError, match=r"Too few clients.*found none"):
            start(LocalGrid({}), strategy(patience=Patience(give_up=0.01)))

    def test_strangers_are_sent_nothing(self):
        class Two(Keys):
            def find(self, grid):
                return {n: node for n, node in super().find(grid).items() if n != "partner-1"}

        nodes = grid()
        start(nodes, strategy(FedAvg(), directory=Two()))
        assert {message.metadata.dst_node_id for message in nodes.sent} == {10, 12}

    def test_strategies_that_choose_nodes_without_asking_get_none_but_clients(self):
        class Fixed(FedAvg):
            def configure_train(self, server_round, arrays, config, grid):
                return self._construct_messages(RecordDict({"a": arrays}), [10, 99], "train")

        nodes = grid()
        nodes.nodes[99] = Node(None, key=b"")
        nodes.get_nodes = lambda: [n for n in LocalGrid.get_nodes(nodes) if n.node_id != 99]
        start(nodes, strategy(Fixed()), rounds=1)
        assert [message.metadata.dst_node_id for message in nodes.sent] == [10]

    def test_arrays_of_another_model_are_refused(self):
        with pytest.raises(ConfigurationError, match=r"not those of the model.*1\.bias"):
            strategy().start(grid(), ArrayRecord({"1.weight": torch.zeros(2)}))

    def test_two_ways_of_combining_are_refused(self):
        with pytest.raises(ConfigurationError, match="in two ways"):
            strategy(scheme=FedQSN(units="neurons", aggregation="regmean"))


class TestExposure:
    def test_is_written_down_before_it_leaves(self, tmp_path):
        nodes = grid()
        start(nodes, strategy(out=tmp_path))
        exposure = Exposure(Manifest.read(tmp_path), tmp_path)
        assert exposure.clients == ["partner-0", "partner-1", "partner-2"]
        assert [number for number, *_ in exposure.releases(["partner-0"])] == [1, 2]
        assert 0 < exposure.share(["partner-0"]) < 1

    def test_clients_keep_their_masks_when_the_server_begins_anew(self, tmp_path):
        start(grid(), strategy(out=tmp_path), rounds=1)
        shares = Exposure(Manifest.read(tmp_path), tmp_path).share(["partner-0"])
        nodes = grid()
        nodes.nodes = dict(reversed(nodes.nodes.items()))
        for _ in range(3):
            start(nodes, strategy(out=tmp_path), rounds=1)
        assert Exposure(Manifest.read(tmp_path), tmp_path).share(["partner-0"]) == shares

    def test_nodes_are_named_by_their_keys_or_else_by_their_numbers(self):
        nodes = LocalGrid({5: Node(None, b"a key\n"), 6: Node(None)})
        names = ByNode().find(nodes)
        again = ByNode().find(LocalGrid({8: Node(None, b"a key")}))
        assert set(again) < set(names)
        assert names["node-6"] == 6


def ordinary_app(*mods):
    """A ClientApp as Flower's tutorials have them: it knows nothing of proxies."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context) -> Message:
        model = toys.mlp()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        rows = toys.rows(8, seed=context.node_config["partition-id"])
        images = torch.stack([row["image"] for row in rows])
        labels = torch.tensor([row["label"] for row in rows])
        rate: Any = message.content["config"]["lr"]
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for _ in range(5):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(rows), "train_loss": float(loss.detach())})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content=content, reply_to=message)

    return app


def ordinary_grid(app):
    return LocalGrid({10 + n: Node(app, config={"partition-id": n}) for n in range(3)})


class TestOrdinaryApps:
    def run(self, shield, app):
        arrays = ArrayRecord(toys.mlp().state_dict())
        config = ConfigRecord({"lr": 0.5})
        return shield.start(ordinary_grid(app), arrays, num_rounds=3, train_config=config)

    def test_behind_a_scheme_that_hides_nothing_nothing_changes(self):
        scheme = fedveil.FedAvg()
        found = self.run(
            strategy(scheme=scheme, directory=ByNode()), ordinary_app(proxy_mod(scheme, toys.mlp))
        )
        plain = self.run(FedAvg(fraction_evaluate=0.0, **EVERYONE), ordinary_app())
        assert nearly(found.arrays.to_torch_state_dict(), plain.arrays.to_torch_state_dict())
        for number, metrics in plain.train_metrics_clientapp.items():
            ours = found.train_metrics_clientapp[number]
            assert ours["train_loss"] == pytest.approx(metrics["train_loss"], abs=1e-5)

    def test_learn_from_proxies(self):
        app = ordinary_app(proxy_mod(SCHEME, toys.mlp))
        found = self.run(strategy(directory=ByNode()), app)
        losses = [m["train_loss"] for m in found.train_metrics_clientapp.values()]
        assert losses == sorted(losses, reverse=True)

    def test_what_they_raise_stays_with_the_client(self, caplog):
        def train(message, context):
            raise ValueError("patient 4711")

        app = ClientApp(mods=[proxy_mod(SCHEME, toys.mlp)])
        app.train()(train)
        grid = ordinary_grid(app)
        arrived = []
        for node in grid.nodes.values():
            node.behaviour = lambda reply: arrived.append(reply) or reply  # type: ignore[func-returns-value]
        start(grid, strategy(directory=ByNode()), rounds=1)
        assert [unpack(reply.content) for reply in arrived] == [(None, {"failure": "other"})] * 3
        assert "4711" in caplog.text

    @pytest.mark.parametrize(
        "content",
        [RecordDict(), RecordDict({"arrays": ArrayRecord(toys.mlp().state_dict())}),
         RecordDict({"arrays": ArrayRecord(toys.mlp().state_dict()),
                     "metrics": MetricRecord({"num-examples": 1.5})})],
    )  # fmt: skip
    def test_what_they_must_return(self, content):
        app = ClientApp(mods=[proxy_mod(SCHEME, toys.mlp)])
        app.train()(lambda message, context: Message(content=content, reply_to=message))
        shield = strategy(directory=ByNode())
        start(ordinary_grid(app), shield, rounds=1)
        assert toys.same(shield.final(), toys.weights(toys.mlp()))

    def test_other_messages_pass_through(self):
        app = ClientApp(mods=[proxy_mod(SCHEME, toys.mlp)])
        app.query()(lambda message, context: Message(content=RecordDict(), reply_to=message))
        grid = ordinary_grid(app)
        question = Message(content=RecordDict(), dst_node_id=10, message_type="query")
        assert len(list(grid.send_and_receive([question]))) == 1

    def test_schemes_that_need_more_than_updates_are_refused(self):
        with pytest.raises(ConfigurationError, match="in two ways"):
            proxy_mod(FedQSN(aggregation="regmean"), toys.mlp)

    @pytest.mark.parametrize(
        "words", [{"update_bits": 4, "error_feedback": True}, {"backbone": "once"}]
    )
    def test_schemes_whose_clients_keep_something_are_refused(self, words):
        with pytest.raises(ConfigurationError, match="keeps nothing"):
            proxy_mod(FedQSN(**words), toys.mlp)
