import json

import pytest
import torch

from fedveil import (
    ConfigurationError,
    DataError,
    Evaluation,
    Federation,
    FedQSN,
    ImageClassification,
    Observer,
    UnknownArchitectureError,
)  # fmt: skip
from fedveil.tasks import Measure
from toys import SECRET, bert, federation, metrics, mlp, rows, same, texts, weights


def test_it_runs_with_nothing_but_a_model_clients_and_a_task():
    result = Federation(mlp(), [rows(6), rows(9)], task=ImageClassification()).run(1)
    assert set(result.rounds[0].examples) == {"client-00", "client-01"}
    assert result.base is None
    assert result.rounds[0].measures == {}


class TestClients:
    def test_one_with_one_example_takes_part(self):
        result = federation(mlp(), clients={"a": rows(1), "b": rows(7)}).run(2)
        assert [record.examples["a"] for record in result.rounds] == [1, 1]
        assert result.rounds[0].failed == {}

    def test_one_without_data_is_refused_by_name(self):
        with pytest.raises(DataError, match="client clinic-2"):
            federation(mlp(), clients={"clinic-1": rows(2), "clinic-2": []})

    def test_one_with_a_wrong_label_is_refused_by_name(self):
        with pytest.raises(DataError, match="client clinic-2"):
            federation(mlp(), clients={"clinic-2": [{"image": [[1.0]], "label": "x"}]})

    @pytest.mark.parametrize(
        "name", ["", ".", "..", "a/b", "../up", "a b", "x" * 65, "é", "a\n", "C:\\x", 3, None]
    )
    def test_names_that_could_be_paths_or_worse_are_refused(self, name):
        with pytest.raises(ConfigurationError, match="name"):
            federation(mlp(), clients={name: rows(2)})

    @pytest.mark.parametrize("name", ["a", "Clinic_2.north-3", "x" * 64, "..a"])
    def test_ordinary_names_are_fine(self, name, tmp_path):
        run = federation(mlp(), clients={name: rows(2)}, out=tmp_path, keep_messages=True)
        assert set(run.run(1).rounds[0].bytes_down) == {name}

    @pytest.mark.parametrize("none", [{}, [], ()])
    def test_there_must_be_some(self, none):
        with pytest.raises(ConfigurationError, match="needs clients"):
            Federation(mlp(), none, task=ImageClassification())


class TestSettings:
    @pytest.mark.parametrize("count", [0, -1, 4, 1.0, True])
    def test_impossible_clients_per_round_are_refused(self, count):
        with pytest.raises(ConfigurationError, match="clients_per_round"):
            federation(mlp(), clients_per_round=count)

    @pytest.mark.parametrize("count", [0, -2, 1.5, "2"])
    def test_impossible_workers_and_rounds_are_refused(self, count):
        with pytest.raises(ConfigurationError, match="workers"):
            federation(mlp(), workers=count)
        with pytest.raises(ConfigurationError, match="rounds"):
            federation(mlp()).run(count)

    @pytest.mark.parametrize("name", ["every", "proxies_every", "proxies"])
    @pytest.mark.parametrize("value", [-1, 1.5, "1"])
    def test_impossible_evaluations_are_refused(self, name, value):
        with pytest.raises(ConfigurationError, match=name):
            Evaluation(**{name: value})

    def test_messages_need_a_place(self):
        with pytest.raises(ConfigurationError, match="out="):
            federation(mlp(), keep_messages=True)

    def test_a_model_with_nan_is_refused_before_the_first_round(self):
        model = mlp()
        model[1].weight.data[3, 3] = float("nan")
        with pytest.raises(ConfigurationError, match=r"1\.weight"):
            federation(model)

    def test_a_model_without_units_is_refused_before_the_first_round(self):
        with pytest.raises(UnknownArchitectureError):
            federation(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)))

    def test_a_test_set_that_cannot_be_used_is_named(self):
        with pytest.raises(DataError, match="the test set"):
            federation(mlp(), test=[])


def test_clients_are_sampled_anew_and_the_same_for_the_same_seed():
    clients = {f"c{i}": rows(2, seed=i) for i in range(8)}
    runs = [
        federation(mlp(), clients=clients, clients_per_round=3, seed=s).run(4) for s in (0, 0, 1)
    ]
    sampled = [[sorted(record.bytes_down) for record in run.rounds] for run in runs]
    assert sampled[0] == sampled[1] != sampled[2]
    assert all(len(names) == 3 for names in sampled[0])
    assert len(set(map(tuple, sampled[0]))) > 1


def test_the_record_of_a_round_says_what_happened(tmp_path):
    run = federation(mlp(), out=tmp_path, keep_messages=True, test=rows(6))
    record = run.run(1).rounds[0]
    assert record.examples == {"partner-0": 6, "partner-1": 8, "partner-2": 10}
    folder = tmp_path / "messages" / "round-000001"
    for name in record.examples:
        assert record.bytes_down[name] == (folder / f"{name}.proxy.safetensors").stat().st_size
        assert record.bytes_up[name] == (folder / f"{name}.update.safetensors").stat().st_size
    assert set(record.loss_first) == set(record.loss_last) == set(record.examples)
    assert record.metrics["clients"] == 3
    assert record.metrics["update_norm"] > 0
    assert record.seconds > 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record.to_json()]


def test_mean_bytes_are_means_over_clients_and_rounds():
    result = federation(mlp(), clients_per_round=2).run(2)
    down = [size for record in result.rounds for size in record.bytes_down.values()]
    assert result.mean_bytes_down() == sum(down) / 4
    assert result.mean_bytes_up() > result.mean_bytes_down()
    assert result.parameters_bytes == 4 * sum(t.numel() for t in weights(mlp()).values())


@pytest.mark.parametrize(("every", "rounds"), [(1, [1, 2, 3]), (2, [2, 3]), (0, [3]), (5, [3])])
def test_models_are_measured_when_due_and_always_at_the_end(every, rounds):
    run = federation(mlp(), test=rows_of(6), evaluation=Evaluation(every, proxies_every=every))
    measured = {record.round: set(record.measures) for record in run.run(3).rounds}
    expected = {"global", "server_model", "proxy_before", "proxy_after"}
    assert {n: m for n, m in measured.items() if m} == dict.fromkeys(rounds, expected)


def test_rounds_that_are_not_measured_are_looked_at_whatever_the_task_makes_of_rows():
    """Rows of a text task are tokens, which are not read a second time."""
    first, second = (
        federation(bert(), test=texts(6, seed=9), evaluation=Evaluation(0)).run(2).rounds
    )
    assert not first.measures
    assert second.measures
    assert not first.rejected


def rows_of(count):
    return rows(count, seed=11)


@pytest.mark.parametrize("proxies", [0, 1])
def test_as_many_proxies_are_measured_as_asked(proxies):
    run = federation(mlp(), test=rows(6), evaluation=Evaluation(proxies=proxies))
    assert ("proxy_before" in run.run(1).rounds[0].measures) == (proxies > 0)


def test_measuring_changes_no_result():
    plain = federation(mlp()).run(2)
    measured = federation(mlp(), test=rows(6), evaluation=Evaluation(1, proxies_every=1)).run(2)
    assert same(weights(plain.global_model), weights(measured.global_model))


def test_the_base_is_what_the_owner_came_with():
    result = federation(mlp(), test=rows(6)).run(1)
    again = Federation(
        result.global_model, {"a": rows(3)}, task=ImageClassification(), test=rows(6), secret=SECRET
    ).run(1)
    assert again.base == result.rounds[0].measures["global"]


def test_the_base_need_not_be_measured():
    run = federation(mlp(), test=rows(9), evaluation=Evaluation(base=False)).run(1)
    assert run.base is None
    assert run.rounds[0].measures["global"]


class PrecisionTask(ImageClassification):
    """Its accuracy says what PyTorch is set to where clients train."""

    def measure(self, model, batch):
        fast = torch.get_float32_matmul_precision() == "medium"
        return Measure(len(batch["labels"]), 0.0, len(batch["labels"]) * fast)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_workers_multiply_as_precisely_as_the_process_that_started_them(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        run = federation(mlp(), task=PrecisionTask(), test=rows(3), workers=2).run(1)
    finally:
        torch.set_float32_matmul_precision(before)
    fast = 100.0 * (precision == "medium")
    assert run.rounds[0].measures["proxy_after"]["accuracy"] == fast


def test_an_observer_hears_of_every_event_in_order():
    heard: list[tuple[object, ...]] = []

    class Ear(Observer):
        def run_started(self, rounds, finished):
            heard.append(("run", rounds, finished))

        def round_started(self, number, clients):
            heard.append(("round", number, clients))

        def client_finished(self, number, client, failure):
            heard.append((client, number, failure))

        def round_finished(self, record):
            heard.append(("end", record.round))

    federation(mlp(), observer=Ear(), clients={"a": rows(2)}).run(2)
    assert heard == [
        ("run", 2, 0),
        *(("round", 1, 1), ("a", 1, None), ("end", 1)),
        *(("round", 2, 1), ("a", 2, None), ("end", 2)),
    ]


def test_training_helps():
    data = {f"c{i}": rows(30, seed=i) for i in range(3)}
    result = federation(mlp(), clients=data, scheme=FedQSN(), test=rows(60, seed=9)).run(12)
    assert result.rounds[-1].measures["global"]["loss"] < result.base["loss"] / 2
    assert metrics_of(result)[-1] > result.base["accuracy"]


def metrics_of(result):
    return [record.measures["global"]["accuracy"] for record in result.rounds]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    federation(mlp()).run(1)
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_those_of_finished_rounds(tmp_path):
    federation(mlp(), out=tmp_path).run(2)
    assert [line["round"] for line in metrics(tmp_path)] == [1, 2]
