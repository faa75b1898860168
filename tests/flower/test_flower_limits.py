"""Over Flower, too, a reply is refused by its length: before it is written down, copied or read."""

from pathlib import Path

import pytest
from flower_samples import federation, grid_of
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from test_flower_crew import QUICK, Keys, run

import toys
from fedveil import FedQSN
from fedveil.flower import ModelPrivacy, proxy_mod
from fedveil.flower.payload import pack
from fedveil.wire import Limits
from grids import LocalGrid, Node

FLOOD = 30_000_000
SCHEME = FedQSN(units="neurons")


def flooding(reply):
    reply.content = pack(bytes(FLOOD))
    return reply


@pytest.fixture
def longest(monkeypatch):
    """Bytes of the longest file that was written, and of the longest message that was parsed."""
    seen = {"written": 0, "parsed": 0}
    from fedveil import files
    from fedveil.wire import message

    write, opened = files.write_whole, message.open_container  # type: ignore[attr-defined]

    def writing(path, content, *rest, **words):
        seen["written"] = max(seen["written"], len(content))
        write(path, content, *rest, **words)

    def parsing(data, limits):
        if len(data) <= limits.max_bytes:
            seen["parsed"] = max(seen["parsed"], len(data))
        return opened(data, limits)

    monkeypatch.setattr("fedveil.flower.crew.write_whole", writing)
    monkeypatch.setattr(message, "open_container", parsing)
    return seen


def test_a_flood_costs_its_client_the_round_and_nobody_anything_else(longest):
    result = run(grid_of(federation(), partner_1=flooding), rounds=1)
    (record,) = result.rounds
    assert set(record.failed) == {"partner-1"}
    assert f"found {FLOOD} bytes" in record.failed["partner-1"]
    assert set(record.bytes_up) == {"partner-0", "partner-2"}
    assert 0 < longest["written"] < 1_000_000
    assert 0 < longest["parsed"] < 1_000_000


def test_answers_wait_where_nobody_else_can_read_them(monkeypatch):
    modes, answers = set(), []
    from fedveil.flower import crew

    take = crew._Inbox.take

    def looking(inbox, client, number):
        path = inbox._folder / number
        modes.add((path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777))
        answers.append(client)
        return take(inbox, client, number)

    monkeypatch.setattr(crew._Inbox, "take", looking)
    run(grid_of(federation()), rounds=1)
    assert len(answers) == 3
    assert modes == {(0o700, 0o600)}


class TestAStrategysNodes:
    def start(self, grid, **words):
        strategy = ModelPrivacy(
            SCHEME, model=toys.mlp(), secret=toys.SECRET, directory=Keys(), patience=QUICK,
            inner=FedAvg(min_train_nodes=3, min_available_nodes=3, fraction_evaluate=0.0), **words,
        )  # fmt: skip
        result = strategy.start(grid, ArrayRecord(toys.mlp().state_dict()), num_rounds=1)
        return strategy, result

    def test_that_flood_are_left_out(self, longest, caplog):
        grid = grid_of(toys.federation(toys.mlp(), scheme=SCHEME), partner_1=flooding)
        self.start(grid)
        assert "partner-1's answer cannot be used: message too large" in caplog.text
        assert 0 < longest["parsed"] < 1_000_000

    def test_that_are_apps_behind_a_mod_fit(self, caplog):
        app = ClientApp(mods=[proxy_mod(SCHEME, toys.mlp)])

        @app.train()
        def train(message, context):
            from flwr.app import Message as FlowerMessage
            from flwr.app import MetricRecord, RecordDict

            state = message.content["arrays"].to_torch_state_dict()
            moved = {name: value + 0.01 for name, value in state.items()}
            content = RecordDict(
                {"arrays": ArrayRecord(moved), "m": MetricRecord({"num-examples": 3, "loss": 0.5})}
            )
            return FlowerMessage(content=content, reply_to=message)

        names = [f"partner-{number}" for number in range(3)]
        grid = LocalGrid({n: Node(app, key=name.encode()) for n, name in enumerate(names, 10)})
        strategy, _ = self.start(grid)
        assert "cannot be used" not in caplog.text
        assert not toys.same(strategy.final(), toys.weights(toys.mlp()))

    def test_are_bounded_otherwise_if_told(self, caplog):
        grid = grid_of(toys.federation(toys.mlp(), scheme=SCHEME))
        self.start(grid, limits=Limits(max_bytes=10))
        assert caplog.text.count("message too large") == 3


class TestAStrategysFolder:
    start = TestAStrategysNodes.start

    def test_is_not_anothers(self, tmp_path):
        (tmp_path / "run.json").write_text("mine")
        with pytest.raises(Exception, match=r"in the way.*run\.json"):
            self.start(LocalGrid({}), out=tmp_path)  # type: ignore[misc]
        assert [p.name for p in Path(tmp_path).iterdir()] == ["run.json"]

    def test_is_held_while_it_runs(self, tmp_path):
        caught = []

        def second(reply):
            import threading

            def again():
                try:
                    self.start(LocalGrid({}), out=tmp_path)  # type: ignore[misc]
                except Exception as error:
                    caught.append(str(error))

            thread = threading.Thread(target=again)
            thread.start()
            thread.join()
            return reply

        grid = grid_of(toys.federation(toys.mlp(), scheme=SCHEME), partner_1=second)
        self.start(grid, out=tmp_path)  # type: ignore[misc]
        assert "A run is at work" in caught[0]
