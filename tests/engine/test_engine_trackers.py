"""Records of rounds in TensorBoard and MLflow."""

import importlib
import signal
import sys
import types

import pytest

import toys
from fedveil import ConfigurationError, Observer
from fedveil.engine import trackers
from fedveil.engine.trackers import numbers_of, watched
from fedveil.run import RoundRecord

RECORD = RoundRecord(
    1,
    bytes_down={"a": 10, "b": 20},
    bytes_up={"a": 5},
    failed={"b": "away"},
    bounded={"a": "its claim of 90 examples counts as 50"},
    rejected="a weight that is not finite",
    loss_first={"a": 2.0},
    loss_last={"a": 1.0},
    measures={"global": {"accuracy": 50.0}},
    metrics={"update_norm": 0.5},
    exposed={"a": 0.5, "b": 0.6},
    exposed_together=0.8,
    seconds=3.0,
)


def run(folder, names, rounds=2, resume=False):
    with watched(Observer(), folder, names) as observer:
        federation = toys.federation(
            toys.mlp(), out=folder, observer=observer, test=toys.rows(6, seed=9)
        )
        return federation.run(rounds, resume=resume).rounds


def test_a_round_in_numbers():
    assert numbers_of(RECORD) == {
        "bytes/down": 30,
        "bytes/up": 5,
        "clients/answered": 1,
        "clients/failed": 1,
        "clients/refused": 0,
        "clients/bounded": 1,
        "rejected": 1,
        "seconds": 3.0,
        "loss/first": 2.0,
        "loss/last": 1.0,
        "measure/global/accuracy": 50.0,
        "scheme/update_norm": 0.5,
        "exposure/most": 0.6,
        "exposure/together": 0.8,
    }
    nothing = numbers_of(RoundRecord(1))
    assert [nothing[name] for name in ("bytes/down", "clients/bounded", "rejected")] == [0, 0, 0]


class TestTensorBoard:
    def curves(self, folder):
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        events = accumulator.EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        return {
            name: {event.step: event.value for event in events.Scalars(name)}
            for name in events.Tags()["scalars"]
        }

    def test_has_a_curve_of_everything(self, tmp_path):
        pytest.importorskip("tensorboard")
        records = run(tmp_path, ["tensorboard"])
        curves = self.curves(tmp_path)
        for record in records:
            for name, value in numbers_of(record).items():
                assert curves[name][record.round] == pytest.approx(value, rel=1e-6)

    def test_goes_on_when_the_run_does(self, tmp_path):
        pytest.importorskip("tensorboard")
        run(tmp_path, ["tensorboard"], rounds=1)
        run(tmp_path, ["tensorboard"], rounds=3, resume=True)
        assert sorted(self.curves(tmp_path)["seconds"]) == [1, 2, 3]


class FakeMLflow(types.ModuleType):
    """MLflow as far as it is used."""

    def __init__(self):
        super().__init__("mlflow")
        self.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
        self.runs, self.active = {}, None

    def start_run(self, run_id=None, run_name=None):
        self.active = run_id or f"id-{len(self.runs)}"
        self.runs.setdefault(self.active, [])
        info = types.SimpleNamespace(run_id=self.active)
        return types.SimpleNamespace(info=info)

    def log_metrics(self, values, step):
        self.runs[self.active].append((step, values["clients/answered"]))

    def end_run(self):
        self.active = None


class TestMLflow:
    @pytest.fixture
    def mlflow(self, monkeypatch):
        fake = FakeMLflow()
        monkeypatch.setitem(sys.modules, "mlflow", fake)
        return fake

    def test_is_one_run_however_often_it_is_resumed(self, tmp_path, mlflow):
        run(tmp_path, ["mlflow"], rounds=1)
        run(tmp_path, ["mlflow"], rounds=3, resume=True)
        assert mlflow.runs == {"id-0": [(1, 3.0), (2, 3.0), (3, 3.0)]}
        assert mlflow.active is None

    def test_is_used_only_where_it_was_told_where_to(self, tmp_path, mlflow, monkeypatch):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run(tmp_path / "one", None, rounds=1)
        assert not mlflow.runs
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///nowhere")
        run(tmp_path / "two", None, rounds=1)
        assert len(mlflow.runs) == 1

    def test_that_fails_loses_no_round(self, tmp_path, mlflow, monkeypatch, caplog):
        def down(*words, **settings):
            raise OSError("the server is down")

        monkeypatch.setattr(mlflow, "log_metrics", down)
        assert len(run(tmp_path, ["mlflow"], rounds=3)) == 3
        assert caplog.text.count("the server is down") == 1


def test_what_is_named_and_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(ConfigurationError, match="pip install tensorboard"),
        watched(Observer(), tmp_path, ["tensorboard"]),
    ):
        pass
    with watched(Observer(), tmp_path) as observer:  # and nothing else is
        observer.round_finished(RECORD)


def test_an_interruption_waits_for_a_tracker_and_is_not_lost(tmp_path, monkeypatch):
    done = []

    class Slow:
        def open(self, finished):
            pass

        def write(self, number, values):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass  # as a library may do that does not look what it catches
            else:
                done.append(number)

        def close(self):
            done.append("closed")

    monkeypatch.setitem(trackers._TRACKERS, "tensorboard", lambda folder: Slow())
    # Where the suite runs in the background, interruptions are ignored from the start.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (
            pytest.raises(KeyboardInterrupt),
            watched(Observer(), tmp_path, ["tensorboard"]) as observer,
        ):
            observer.round_finished(RECORD)
        assert done == [1, "closed"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)
