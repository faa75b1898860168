"""Reports of runs that taught language models: losses, of which less is better."""

import dataclasses
import io
import json
import math

import pytest
from matplotlib.figure import Figure
from page_samples import SCHEME, audit, in_nats, records, spoken, write_run
from rich.console import Console

from fedveil.errors import ConfigurationError
from fedveil.federation import Result
from fedveil.report import summarize, write_summary
from fedveil.report.compare import compare
from fedveil.report.console import table
from fedveil.report.console.audit_table import attack_table
from fedveil.report.console.comparison_table import comparison_table
from fedveil.report.page import page
from fedveil.report.pictures import plot, plot_frontier
from fedveil.report.reading import RunFolder
from fedveil.run import RoundRecord
from fedveil.tasks.metrics import metric_named


def render(thing, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(thing)
    return out.getvalue()


def reached(loss):
    return {"accuracy": 40.0, "loss": loss, "perplexity": math.exp(loss)}


def record(number, loss):
    views = {"global": loss, "proxy_before": loss + 1, "proxy_after": loss + 0.5}
    return RoundRecord(
        number, bytes_down={"a": 100}, bytes_up={"a": 1000},
        measures={view: reached(value) for view, value in views.items()},
    )  # fmt: skip


@pytest.fixture
def summary():
    result = Result(None, [record(1, 2.75), record(2, 2.5)], reached(3.25), 10_000)  # type: ignore[arg-type]
    figures = summarize("fedlpp", result, seconds=3.0, own_data=2.875)
    return {"fp32_bytes": 10_000, "schemes": {"fedlpp": figures}}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **words: found.append(self))
    return found


class TestTheSummary:
    def test_has_losses_and_says_so(self, summary):
        assert summary["schemes"]["fedlpp"] == {
            "name": "fedlpp", "metric": "loss", "base": 3.25, "global": 2.5, "server_model": None,
            "proxy_before": 3.5, "proxy_after": 3.0, "own_data": 2.875, "bytes_down": 100.0,
            "bytes_up": 1000.0, "seconds": 3.0, "rounds": [2.75, 2.5],
        }  # fmt: skip

    def test_of_a_run_that_measured_its_base_only(self):
        bare = RoundRecord(1, bytes_down={"a": 1}, bytes_up={"a": 1})
        assert summarize("x", Result(None, [bare], reached(3.0), 1), seconds=1)["base"] == 3.0  # type: ignore[arg-type]

    @pytest.mark.parametrize("width", [80, 200])
    def test_as_a_table(self, summary, width):
        text = render(table(summary), width)
        for words in ("3.250", "2.500", "3.500", "3.000", "2.875"):
            assert words in text
        said = " ".join(text.split())
        assert "loss in nats per token on the owner's test set, after the last round" in said
        assert "lower is better" in said
        assert "accuracy" not in said
        assert "%" in said  # bytes still have their share

    def test_as_a_picture(self, summary, drawn, tmp_path):
        plot(summary, tmp_path / "summary.png")
        over_rounds, views, _ = drawn[0].axes
        for axes in (over_rounds, views):
            assert "loss" in axes.get_ylabel()
            assert "nats per token, lower is better" in axes.get_ylabel()
        low, high = views.get_ylim()
        assert low == 0
        assert 3.5 < high < 4.5  # room for the highest bar and its number
        assert {text.get_text() for text in views.texts} == {"2.500", "3.500", "3.000"}

    def test_of_accuracies_is_a_picture_of_percent(self, summary, drawn, tmp_path):
        figures = summary["schemes"]["fedlpp"]
        del figures["metric"]
        plot(summary, tmp_path / "summary.png")
        views = drawn[0].axes[1]
        assert views.get_ylabel() == "accuracy on the owner's test set (%)"
        assert views.get_ylim() == (0, 105)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    found = in_nats(audit(5, 3, attacks=4))
    runs = {
        "audited": write_run(folder / "audited", 5, 3, found=found, lines=spoken(records(5, 3))),
        "not audited": write_run(folder / "plain", lines=spoken(records())),
        "adapter": write_run(folder / "adapter", scheme={"name": "fedlpp", "bits": 2}),
    }
    return {name: " ".join(page(RunFolder.read(run)).split()) for name, run in runs.items()}


class TestThePage:
    @pytest.mark.parametrize("kind", ["audited", "not audited"])
    def test_says_which_way_is_better(self, pages, kind):
        text = pages[kind]
        assert "(nats per token, lower is better)" in text
        assert "lies below every proxy" in text
        assert "Per round: losses (nats per token)" in text
        assert "e to the loss: among so many tokens" in text
        assert "accurac" not in text

    def test_has_the_strongest_attack_first(self, pages):
        found = in_nats(audit(5, 3, attacks=4))
        least = min(one.measures["loss"] for one in found.attacks if one.released)
        assert found.strongest.measures["loss"] == least
        shown = pages["audited"].split("<dd>")[2].split("</dd>")[0]
        assert shown == f"{least:.3f} nats"
        assert "line falls to the right" in pages["audited"]
        assert f"<b>{least:.3f} nats</b>" in pages["audited"]  # in the legend, as in the table

    def test_of_accuracies_says_the_opposite(self, pages):
        text = pages["adapter"]
        assert "lies above every proxy" in text
        assert "nats per token" not in text

    def test_of_an_adapter_says_what_its_figures_are_of(self, pages):
        assert "Numbers in the adapter" in pages["adapter"]
        assert "every client holds the backbone" in pages["adapter"]
        assert "Numbers in the model" in pages["audited"]
        assert "backbone" not in pages["audited"]


class TestARunFolder:
    def test_knows_its_metric_from_any_round(self, tmp_path):
        lines = spoken(records(3, 2))
        lines[-1] = dataclasses.replace(lines[-1], measures={})
        run = RunFolder.read(write_run(tmp_path, lines=lines))
        assert run.metric == metric_named("loss")

    def test_takes_figures_of_its_own_metric_only(self, tmp_path):
        for metric, expected in (({"metric": "loss"}, 3.25), ({}, None)):
            folder = write_run(tmp_path / str(expected), lines=spoken(records()))
            write_summary(folder, 1, {"fedqsn": {"base": 3.25, **metric}})
            assert RunFolder.read(folder).figure("base") == expected


def test_the_table_of_attacks_has_the_lowest_loss_in_bold():
    found = in_nats(audit(1, 1))
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system="standard")
    console.print(attack_table(found))
    bold = [line for line in out.getvalue().splitlines() if "\x1b[1m" in line and "zeros" in line]
    assert len(bold) == 1
    assert f"{found.strongest.measures['loss']:.3f}" in bold[0]
    assert "Loss in nats per token, lower is better." in out.getvalue()
    assert "lower" not in render(attack_table(audit(1, 1)))


class TestAComparison:
    @pytest.fixture
    def folders(self, tmp_path):
        found = []
        for name, strongest in (("three", 66.0), ("four", 80.0)):
            scheme = SCHEME | {"bits": 3 + (name == "four")}
            one = in_nats(audit(scheme=scheme, strongest=strongest))
            found.append(write_run(tmp_path / name, found=one, lines=spoken(records())))
        return found

    def test_is_by_loss(self, folders):
        comparison = compare(folders)
        assert comparison.metric == "loss"
        for run in comparison.runs:
            assert run.attack == RunFolder.read(run.folder).audit.strongest.measures["loss"]
        text = " ".join(render(comparison_table(comparison)).split())
        assert "loss in nats per token, lower is better" in text
        assert f"{comparison.runs[0].attack:.3f}" in text

    def test_has_the_better_model_on_top(self, folders, drawn, tmp_path):
        plot_frontier(compare(folders), tmp_path / "frontier.png")
        (axes,) = drawn[0].axes
        assert axes.get_ylabel() == "global model: loss (nats per token)"
        low, high = axes.get_ylim()
        assert low > high

    def test_of_runs_that_were_never_audited(self, tmp_path):
        folders = []
        for name, base in (("one", 2.0), ("other", 2.0), ("elsewhere", 2.5)):
            folders.append(write_run(tmp_path / name, lines=spoken(records())))
            write_summary(folders[-1], 1, {"fedqsn": {"metric": "loss", "base": base}})
        runs = compare(folders[:2]).runs
        assert [run.base for run in runs] == [2.0, 2.0]
        assert runs[0].final == spoken(records())[-1].measures["global"]["loss"]
        with pytest.raises(ConfigurationError, match=r"different test sets.*loss 2\.0000"):
            compare(folders[1:])

    def test_with_a_classifier_is_refused(self, folders, tmp_path):
        other = write_run(tmp_path / "classifier")
        with pytest.raises(ConfigurationError, match=r"different measures.*accuracy in classifier"):
            compare([folders[0], other])

    def test_with_a_run_that_measured_nothing(self, folders, tmp_path):
        other = write_run(tmp_path / "unmeasured", lines=records(measured=False))
        assert compare([folders[0], other]).metric == "loss"


def test_unknown_measures_do_no_harm(tmp_path):
    lines = [
        dataclasses.replace(one, measures={v: {**m, "f1": 1.0} for v, m in one.measures.items()})
        for one in records()
    ]
    run = write_run(tmp_path, found=audit(), lines=lines)
    (run / "summary.json").write_text(
        json.dumps({"schemes": {"fedqsn": {"base": 54.0, "generation": {"bleu": 1.0}}}})
    )
    assert "accuracy" in page(RunFolder.read(run))
