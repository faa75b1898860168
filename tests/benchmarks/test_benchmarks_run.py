"""The benchmarks as a process, and what a run leaves behind. No figure that was timed is judged."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from speed import children, machine, results
from speed.peers import PEERS, rows_of_peer
from speed.plan import Plan
from speed.rounds import SCHEMES, SIMULATORS, rows_of_simulator
from speed.rows import Row, plain
from speed.suite import BENCHMARKS, choose, run

RUN = Path(__file__).parents[2] / "benchmarks" / "run.py"
BITS = (2, 3, 4, 8)
STORAGES = ("[out, in]", "[in, out]")
QUICK = Plan(quick=True)
pytestmark = pytest.mark.slow


def bench(*arguments, cwd):
    return subprocess.run(
        [sys.executable, RUN, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run: its process, and its folder."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bench")
    return bench("--quick", "--out", "out", cwd=folder), folder / "out"


@pytest.fixture(scope="module")
def rows(quick):
    text = (quick[1] / "results.json").read_text(encoding="utf-8")
    return [Row.from_json(r) for r in json.loads(text, parse_constant=refuse)["rows"]]


def test_a_quick_run_ends_well_whatever_the_figures_are(quick, rows):
    done, folder = quick
    assert done.returncode == 0, done.stderr
    assert "Budgets" in done.stdout
    # Small tensors have too many scales for the budget, on any machine.
    assert any(row.met is False for row in rows)
    assert {p.name for p in folder.iterdir()} == {"results.json", "results.md", "scaling.png"}
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_of_ours_fails(rows):
    assert not [row for row in rows if row.name.endswith("/failed")]
    assert {r.name: r.reason for r in rows if r.value is None and r.who == "fedveil"} == {}


def promised():
    for storage in STORAGES:
        for dtype in ("float32", "bfloat16"):
            for bits in BITS:
                case = {"model": "GPT-2 small", "storage": storage, "dtype": dtype, "bits": bits}
                yield "quantize/model", case
            yield "quantize/model", {"model": "Llama 1B", "storage": storage, "dtype": dtype}
        for bits in BITS:
            case = {"model": "GPT-2 small", "storage": storage, "bits": bits}
            yield "dequantize/model", case
            yield "dequantize/add", case
            yield "bytes/per_parameter", case
        for model in ("GPT-2 small", "Llama 1B"):
            yield "gather/model", {"model": model, "storage": storage}
    for name in ("server/begin_round", "server/release", "client/load"):
        yield name, {"model": "GPT-2 small"}
    for bits in (4, 8, 32):
        yield "client/encode", {"bits": bits}
        yield "server/absorb", {"bits": bits}
    for bits in BITS:
        yield "bytes/unmasked", {"bits": bits}
    for scheme in ("FedQSN()", "FedQSN.paper()"):
        yield "bytes/masked", {"scheme": scheme}
    for step in ("begin_round", "release", "absorb"):
        yield "memory/step", {"step": step}
    yield "memory/running_sum", {}
    for scheme in SCHEMES:
        yield "rounds/fedveil", {"scheme": scheme}
        yield "rounds/epoch", {"scheme": scheme}
    yield "shrink/step", {}
    for clients in QUICK.clients:
        for step in ("begin_round", "release", "absorb", "end_round"):
            yield f"clients/{step}", {"clients": clients}
    for step in ("release", "absorb"):
        yield "clients/flat", {"step": step}
    for name in ("quantize", "gather", "dequantize", "add"):
        yield f"parameters/{name}", {}


@pytest.mark.parametrize(("name", "case"), list(promised()))
def test_every_promised_row_is_there(rows, name, case):
    found = [row for row in rows if row.matches(name, **case)]
    assert found
    for row in found:
        assert math.isfinite(row.value)
        assert row.value >= 0
        if row.samples:
            assert row.low <= row.value <= row.high
            assert min(row.seconds, row.floor_seconds) > 0


def test_every_competitor_has_a_figure_or_a_reason(rows):
    wanted = [("peers/layers", {"what": what}, who)
              for who in PEERS for what in ("quantize", "dequantize", "bytes")]  # fmt: skip
    wanted += [("rounds/simulator", {}, who) for who in SIMULATORS]
    for name, case, who in wanted:
        (row,) = [row for row in rows if row.matches(name, **case) and row.who == who]
        assert (row.value is None) == bool(row.reason)


def test_budgets_are_those_that_were_set(rows):
    limits = {
        "quantize/model": {3.0, 4.5, None},
        "dequantize/model": {1.8},
        "gather/model": {None},
        "server/release": {1.5},
        "client/load": {2.0},
        "bytes/unmasked": {12.9, None},
        "memory/step": {1.0},
        "rounds/fedveil": {1.15, 1.5},
        "rounds/epoch": {None},
        "shrink/step": {0.75},
        "clients/flat": {1.25},
    }
    for name, expected in limits.items():
        assert {row.budget for row in rows if row.name == name} == expected
    for row in rows:
        if row.name == "quantize/model":
            assert (row.budget is not None) == (row.case["bits"] == 4)
        if row.name == "bytes/masked":
            share = float(row.reason.split(" %")[0]) / 100
            assert row.budget == pytest.approx(12.9 * share, abs=0.01)


def test_the_machine_is_described(quick):
    facts, rows = results.read(quick[1])
    assert {"date", "commit", "cpu", "cores", "caches", "memory_gib", "load", "python", "versions",
            "kernels", "threads", "quick", "seconds"} <= set(facts)  # fmt: skip
    assert (facts["threads"], facts["quick"]) == (1, True)
    assert {"fedveil", "torch", "numba"} <= {n for n, v in facts["versions"].items() if v}
    assert facts["kernels"] in ("numba", "torch")
    page = (quick[1] / "results.md").read_text(encoding="utf-8")
    assert results.describe(facts) in page
    assert len(rows) > 80


def test_facts_need_neither_git_nor_proc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    monkeypatch.setattr(machine, "_text", lambda path: None)
    facts = machine.facts()
    assert facts["commit"] is None
    assert facts["cpu"]
    assert "caches unknown" in results.describe(facts)


def test_only_what_is_asked_for_is_run(tmp_path):
    pytest.importorskip("transformers")
    done = bench("--quick", "--only", "byt*", "--out", "x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "x" / "results.json").read_text(encoding="utf-8"))["rows"]
    assert {row["name"].split("/")[0] for row in found} == {"bytes"}
    assert not (tmp_path / "x" / "scaling.png").exists()


def test_a_pattern_that_matches_nothing_is_told(tmp_path):
    done = bench("--only", "nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert "quantize" in done.stdout
    assert not list(tmp_path.iterdir())


def test_patterns_choose_in_order():
    assert choose("*") == list(BENCHMARKS)
    assert choose("*quantize") == ["quantize", "dequantize"]


@pytest.fixture(params=["missing", "broken"])
def without(request, monkeypatch, tmp_path):
    """Make packages impossible to import: not installed, or failing as they are imported."""

    def hide(package):
        if request.param == "missing":
            find_spec = children.find_spec  # type: ignore[attr-defined]
            monkeypatch.setattr(
                children, "find_spec", lambda name: None if name == package else find_spec(name)
            )
            return
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(
            f"raise ImportError('no {package} on this machine')"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.syspath_prepend(tmp_path)

    return hide


def test_a_missing_library_is_rows_with_a_reason(without):
    without("bitsandbytes")
    rows = rows_of_peer("bitsandbytes NF4", QUICK)
    assert [row.case["what"] for row in rows] == ["quantize", "dequantize", "bytes"]
    for row in rows:
        assert (row.value, row.who) == (None, "bitsandbytes NF4")
        assert "bitsandbytes" in row.reason


def test_a_missing_simulator_is_a_row_with_a_reason(without):
    without("pfl")
    (row,) = rows_of_simulator("pfl-research", QUICK)
    assert (row.value, row.who, row.name) == (None, "pfl-research", "rounds/simulator")
    assert "pfl" in row.reason


def test_what_is_measured_before_a_failure_is_kept():
    def half(plan, tell):
        tell("half")
        yield plain("half/one", {}, 1.0, "x")
        raise RuntimeError("out of luck")

    def whole(plan, tell):
        yield plain("whole/one", {}, 2.0, "x")

    told = []
    made = {"half": half, "whole": whole}
    found = dict(run(list(made), QUICK, told.append, made))
    assert told == ["half"]
    assert [row.name for row in found["half"]] == ["half/one", "half/failed"]
    assert "RuntimeError: out of luck" in found["half"][1].reason
    assert [row.value for row in found["whole"]] == [2.0]


FACTS = {
    "caches": {"L2": "1024K"}, "versions": {"torch": "2"}, "cpu": "a cpu", "cores": 2, "load": 0.5,
    "memory_gib": 8.0, "python": "3.11", "kernels": "numba", "threads": 1, "commit": None,
    "date": "2030-01-02T03:04:05+00:00",
}  # fmt: skip


def test_figures_are_put_between_the_marks_and_nowhere_else(tmp_path):
    out, page = tmp_path / "out", tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n", encoding="utf-8")
    for value in (1.0, 7.0):
        rows = [plain("rounds/fedveil", {"scheme": "a"}, value, "x", budget=2.0)]
        results.write(out, FACTS, rows)
        (out / results.PLOT).write_bytes(b"picture")
        results.publish(out, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{results.BEGIN}\n")
    assert text.endswith(f"{results.END}\nafter\n")
    assert "7.00 x" in text
    assert "a cpu" in text
    assert "old" not in text
    assert "1.00 x" not in text
    assert (page.parent / "images" / results.PUBLISHED_PLOT).read_bytes() == b"picture"


def test_a_page_without_marks_is_left_alone(tmp_path):
    results.write(tmp_path, FACTS, [])
    page = tmp_path / "page.md"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="no place for figures"):
        results.publish(tmp_path, page)
    assert page.read_text(encoding="utf-8") == "nothing"


def test_the_docs_have_a_place_for_figures():
    text = (RUN.parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text.count(results.BEGIN) == text.count(results.END) == 1
    assert f"images/{results.PUBLISHED_PLOT}" in text
