"""What tables say of fabricated results."""

import io
import math

import pytest
from rich.console import Console
from speed.budgets import HEADLINES
from speed.rows import Row, measured, plain, skipped
from speed.table import markdown, sheets, show
from speed.timing import Pairs


def quantize(value, *, bits=4, dtype="float32", budget=3.0, model="GPT-2 small", **more):
    case = {"model": model, "storage": "[out, in]", "dtype": dtype, "bits": bits}
    return Row("quantize/model", case, value=value, budget=budget, **more)


def summary(*rows):
    (sheet,) = [sheet for sheet in sheets(rows) if sheet.title == "Budgets"]
    return {line[0]: dict(zip(sheet.columns[1:], line[1:], strict=True)) for line in sheet.lines}


def only(rows):
    """The one table beside the summary."""
    (sheet,) = [sheet for sheet in sheets(rows) if sheet.title != "Budgets"]
    return sheet


@pytest.mark.parametrize(
    ("value", "budget", "met"),
    [
        (2.9, 3.0, True),
        (3.0, 3.0, True),
        (3.001, 3.0, False),
        (None, 3.0, None),
        (2.0, None, None),
    ],
)
def test_a_row_meets_its_budget_or_not_or_has_none(value, budget, met):
    assert quantize(value, budget=budget).met is met


@pytest.mark.parametrize(("value", "mark"), [(2.9, "yes"), (3.1, "NO"), (None, "")])
def test_tables_mark_what_meets_its_budget(value, mark):
    (pivoted,) = only([quantize(value)]).lines
    assert pivoted[-2:] == ["3", mark]
    (listed,) = only([Row("server/release", {"model": "m"}, value=value, budget=3.0)]).lines
    assert listed[-3:-1] == ["3", mark]


def test_one_width_over_its_budget_marks_the_line():
    rows = [quantize(2.0), quantize(9.0, bits=8, budget=None), quantize(2.0, bits=2, budget=None)]
    (line,) = only(rows).lines
    assert line == ["GPT-2 small, [out, in], float32", "2.00 x", "2.00 x", "9.00 x", "3", "yes"]
    rows[1] = quantize(9.0, bits=8, budget=4.0)
    assert only(rows).lines[0][-2:] == ["3 to 4", "NO"]


def test_what_was_not_measured_leaves_a_hole_in_its_column():
    sheet = only([quantize(2.0), quantize(2.5, bits=8, dtype="bfloat16", budget=None)])
    assert sheet.columns == ["", "4 bit", "8 bit", "budget", "met"]
    assert [line[1:3] for line in sheet.lines] == [["2.00 x", ""], ["", "2.50 x"]]


def test_the_summary_has_the_range_of_all_rows_under_a_budget():
    title = "quantize and pack, 4 bit, [out, in] from float32 / fp32 copy"
    rows = [quantize(2.0), quantize(2.9, model="another"), quantize(9.0, bits=8, budget=None)]
    line = summary(*rows)[title]
    assert line == {"budget": "3 x", "fedveil": "2 to 2.9 x", "met": "yes", "others": "-"}
    rows.append(quantize(3.2, model="one more"))
    line = summary(*rows)[title]
    assert (line["fedveil"], line["met"]) == ("2 to 3.2 x", "NO")
    rows.append(quantize(9.9, dtype="bfloat16"))
    assert summary(*rows)[title] == line


def test_the_summary_says_what_is_missing():
    rows = [
        quantize(None, reason="broken"),
        plain("peers/layers", {"what": "quantize"}, 57.0, "x", who="fast"),
        skipped("peers/layers", {"what": "quantize"}, "not installed", who="absent"),
        plain("peers/layers", {"what": "dequantize"}, 4.0, "x", who="other column"),
        plain("peers/layers", {"what": "quantize"}, 1.2, "x"),
    ]
    line = summary(*rows)["quantize and pack, 4 bit, [out, in] from float32 / fp32 copy"]
    assert line["fedveil"] == "skipped"
    assert line["met"] == "-"
    assert line["others"] == "fast 57.0 x; absent skipped"


def test_a_reason_is_told_in_either_kind_of_table():
    rows = [skipped("peers/layers", {"what": "quantize"}, "not installed", who="absent")]
    assert any("absent" in note and "not installed" in note for note in only(rows).notes)
    rows = [skipped("rounds/simulator", {}, "no such package", who="absent")]
    assert "no such package" in only(rows).lines[0]


def test_every_headline_has_rows_that_a_run_makes():
    titles = [line.title for line in HEADLINES]
    assert len(set(titles)) == len(titles)
    for line in HEADLINES:
        row = Row(line.name, dict(line.case), value=1.0, budget=2.0)
        assert summary(row)[line.title]["met"] == "yes"


def test_printed_and_markdown_tables_hold_the_same_cells():
    rows = [
        measured("server/release", {"model": "a|b"}, Pairs([3e-3, 4e-3], [1e-3, 1e-3]), "memcpy"),
        plain("bytes/unmasked", {"bits": 4}, 12.5, "%", budget=12.9),
        quantize(1.75),
    ]
    page, out = markdown(rows), io.StringIO()
    show(Console(file=out, width=200), rows)
    for sheet in sheets(rows):
        for cell in (cell for line in sheet.lines for cell in line):
            assert cell in out.getvalue()
            assert cell.replace("|", "\\|") in page
    for block in page.split("\n\n"):
        table = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in table}) <= 1


def test_a_measured_row_holds_medians_and_quartiles():
    pairs = Pairs([2.0, 4.0, 6.0, 8.0, 10.0], [2.0] * 5)
    row = measured("gather/model", {"bits": 4}, pairs, "memcpy", budget=1.5)
    assert (row.value, row.low, row.high, row.samples) == (3.0, 2.0, 4.0, 5)
    assert (row.seconds, row.floor_seconds, row.met) == (6.0, 2.0, False)
    assert Row.from_json(row.to_json()) == row
    assert row.value is not None
    assert math.isfinite(row.value)
