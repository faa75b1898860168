import io
import json
import re

import pytest
from matplotlib.image import imread
from page_samples import SCHEME, audit, records, write_run
from rich.console import Console

from fedveil.errors import AuditError, CheckpointError, ConfigurationError
from fedveil.report.compare import compare, mean_of
from fedveil.report.console.comparison_table import comparison_table
from fedveil.report.pictures import plot_frontier
from fedveil.run.manifest import TensorInfo

FEDAVG = {"name": "fedavg"}


@pytest.fixture
def folders(tmp_path):
    """FedAvg and two recipes of FedQSN, two seeds each, and a run without an audit."""
    found = []
    for seed in (0, 1):
        for name, scheme, strongest in (
            ("fedavg", FEDAVG, 88.0),
            ("four", SCHEME, 80.0 - 2 * seed),
            ("three", SCHEME | {"bits": 3}, 66.0),
        ):
            found.append(
                write_run(
                    tmp_path / f"{name}-{seed}",
                    found=audit(seed=seed, scheme=scheme, strongest=strongest),
                    seed=seed,
                    model=f"base-{seed}",
                )
            )
    return [*found, write_run(tmp_path / "plain", seed=5, model="base-0")]


def render(table, width=80):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def test_runs_of_one_recipe_come_together(folders):
    comparison = compare(folders)
    assert comparison.labels == ("fedavg", "fedqsn bits=4", "fedqsn bits=3")
    assert [run.folder.name for run in comparison.runs] == [
        "fedavg-0", "fedavg-1", "four-0", "four-1", "plain", "three-0", "three-1",
    ]  # fmt: skip
    assert [run.seed for run in comparison.of("fedqsn bits=4")] == [0, 1, 5]
    assert comparison.metric == "accuracy"
    assert len(comparison.notes) == 2


def test_figures_are_those_of_audit_and_rounds(folders):
    run = compare(folders[:1]).runs[0]
    found = audit(scheme=FEDAVG, strongest=88.0)
    assert run.label == "fedavg"
    assert run.attack == found.strongest.measures["accuracy"]
    assert run.attack_name == found.strongest.attack
    assert (run.leak, run.gain_shown) == (found.strongest.leak, found.strongest.gain_shown)
    assert run.final == found.models["global"]["accuracy"]
    assert run.shown == max(one.share for one in found.exposure.values())
    sizes = [size for record in records() for size in record.bytes_down.values()]
    assert run.bytes_down == sum(sizes) / len(sizes)


def test_a_run_without_an_audit_is_not_audited(folders):
    run = compare(folders[-1:]).runs[0]
    assert not run.audited
    assert (run.attack, run.leak, run.own, run.base) == (None, None, None, None)
    assert run.final == pytest.approx(88.4)
    assert "not audited" in render(comparison_table(compare(folders[-1:])))
    with pytest.raises(AuditError, match="nothing to draw") as caught:
        plot_frontier(compare(folders[-1:]), folders[-1] / "frontier.png")
    assert "fedveil audit" in caught.value.fix


def test_a_different_number_of_rounds_is_a_different_recipe(tmp_path):
    long, short = write_run(tmp_path / "long", rounds=3), write_run(tmp_path / "short", rounds=2)
    assert compare([long, short]).labels == ("fedqsn rounds=3", "fedqsn rounds=2")


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_and_has_means(folders, width):
    comparison = compare(folders)
    text = render(comparison_table(comparison), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count("mean of 2") == 3  # what was not audited is in no mean
    audited = [run for run in comparison.of("fedqsn bits=4") if run.audited]
    assert f"{mean_of(audited, lambda run: run.attack):.1f}" in text
    low, high = sorted(run.attack for run in audited if run.attack is not None)
    assert f"{low:.1f}–{high:.1f}" in text
    assert "not audited" in " ".join(text.split())
    assert "plain" in text


def test_frontier_has_every_audited_recipe_and_its_seeds(folders, tmp_path):
    plot_frontier(compare(folders), tmp_path / "deep" / "frontier.svg")
    drawing = (tmp_path / "deep" / "frontier.svg").read_text()
    for colour in ("#0072b2", "#d55e00", "#009e73"):
        assert colour in drawing
    said = re.findall(r"<!-- (.*?) -->", drawing)
    for words in ("fedavg (2 seeds)", "fedqsn bits=4 (2 seeds)", "everything leaks →"):
        assert words in said
    assert any("not audited or not measured: plain" in words for words in said)


def test_frontier_of_one_run_and_by_result(folders, tmp_path):
    plot_frontier(compare(folders[:1]), tmp_path / "one.png")
    assert imread(tmp_path / "one.png").shape[0] > 500
    whole = json.loads((folders[0] / "audit.json").read_text())
    for attack in whole["attacks"]:
        attack["leak"] = None
    (folders[0] / "audit.json").write_text(json.dumps(whole))
    plot_frontier(compare(folders), tmp_path / "by-result.svg")
    assert "strongest attacker: accuracy (%)" in (tmp_path / "by-result.svg").read_text()


def test_frontier_takes_names_as_they_are(tmp_path):
    runs = [
        write_run(tmp_path / f"{bits}", found=audit(scheme=SCHEME | {"units": bits}))
        for bits in ("$\\frac{", "<b>")
    ]
    plot_frontier(compare(runs), tmp_path / "frontier.svg")
    assert "<b>" not in (tmp_path / "frontier.svg").read_text().replace("&lt;b&gt;", "")


def test_frontier_that_cannot_be_written(folders, tmp_path):
    (tmp_path / "taken.png").mkdir()
    for name in ("taken.png", "picture.unheard-of"):
        with pytest.raises(CheckpointError, match="could not be written"):
            plot_frontier(compare(folders[:1]), tmp_path / name)


def test_runs_that_do_not_compare_are_refused(folders, tmp_path):
    with pytest.raises(ConfigurationError, match="nothing to compare"):
        compare([])
    with pytest.raises(ConfigurationError, match="with itself"):
        compare([folders[0], folders[0] / "." / "../fedavg-0"])
    other = write_run(tmp_path / "other", found=audit())
    whole = json.loads((other / "run.json").read_text())
    tensors = {"layer.weight": TensorInfo("float32", (2, 4_000)).__dict__}
    (other / "run.json").write_text(json.dumps(whole | {"tensors": tensors}))
    with pytest.raises(ConfigurationError, match="different models"):
        compare([folders[0], other])


def test_other_test_sets_and_other_measures_are_noticed(folders, tmp_path):
    found = audit()
    models = dict(found.models) | {"base": {"accuracy": 71.0, "loss": 1.0}}
    elsewhere = write_run(tmp_path / "elsewhere", model="base-0")
    whole = json.loads((folders[0] / "audit.json").read_text())
    (elsewhere / "audit.json").write_text(json.dumps(whole | {"models": models}))
    with pytest.raises(ConfigurationError, match="different test sets") as caught:
        compare([folders[0], elsewhere])
    assert "71.00" in str(caught.value)
    (elsewhere / "audit.json").write_text(json.dumps(whole | {"metric": "loss"}))
    with pytest.raises(ConfigurationError, match="different measures"):
        compare([folders[0], elsewhere])


def test_damaged_runs_are_named(folders, tmp_path):
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        compare([folders[0], tmp_path / "missing"])
    (folders[1] / "audit.json").write_text("{")
    with pytest.raises(AuditError, match=r"fedavg-0|four-0|audit\.json"):
        compare(folders)
