"""The benchmark of hostile clients: that all of it runs, on a federation of no size."""

import json
import math

import pytest

from studies.active import scenes
from studies.active_clients import CASES, WITH, WITHOUT, Plan, main, over_seeds

TOY = Plan(1, 2, 3, 1, digits=scenes.toy, few=scenes.toy, young=scenes.toy)
LESS = ["--only", "digits*", "images*", "damage: a million*", "backdoor: mean, honest*"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder in which all attacks were tried once."""
    folder = tmp_path_factory.mktemp("active")
    assert main(["--seeds", "0", "--out", str(folder), *LESS], TOY) == 0
    return folder


def test_every_attack_is_in_the_table_with_and_without_bounds(done):
    text = (done / "results.md").read_text()
    found = json.loads((done / "results.json").read_text())
    for name in (
        "digits",
        "images",
        "damage: a million everywhere",
        "backdoor: mean, honest weight",
    ):
        assert f"| {name} |" in text
        assert {f"{name} | {WITH}", f"{name} | {WITHOUT}"} <= found.keys()
    for name in ("digits, from within", "images, from within"):
        assert f"| {name} |" in text
        assert f"{name} | {WITHOUT}" not in found
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {5}


def test_what_was_read_without_bounds_is_not_read_with_them(done):
    found = json.loads((done / "results.json").read_text())
    free, bound = (found[f"images | {side}"]["0"] for side in (WITHOUT, WITH))
    assert free["found"] > 0 == bound["found"]
    free, bound = (found[f"digits | {side}"]["0"] for side in (WITHOUT, WITH))
    assert free["best"] < 1e-5 < 0.05 < bound["best"]


def test_what_is_done_is_not_done_again(done, capsys):
    assert main(["--seeds", "0", "--out", str(done), *LESS], TOY) == 0
    assert "seed 0" not in capsys.readouterr().out


def test_that_bounds_do_not_help_against_an_honest_backdoor_is_said(done):
    assert "no bound on them helps" in (done / "results.md").read_text()
    assert all(bool(case.note) == ("honest" in name) for name, case in CASES.items())


def test_no_such_attack_is_said(tmp_path, capsys):
    assert main(["--only", "none", "--out", str(tmp_path / "new")]) == 2
    assert "images, from within" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("values", "told"),
    [([2.0, 2.0], "2"), ([1.0, 3.0], "2 (1 to 3)"), ([], "-"), ([math.nan], "nan")],
)
def test_a_figure_is_a_mean_over_seeds_with_its_range(values, told):
    assert over_seeds("{x:.0f}", [{"x": value} for value in values]) == told
