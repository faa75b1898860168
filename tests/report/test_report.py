import io
import json
import re
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from fedveil.federation import Result
from fedveil.report import summarize, write_summary
from fedveil.report.console import ConsoleProgress, table
from fedveil.report.pictures import plot
from fedveil.report.words import human_bytes, human_percent, human_seconds, share
from fedveil.run import RoundRecord


def record(number, accuracy=None, **changes):
    measures = {}
    if accuracy is not None:
        measures = {
            "global": {"accuracy": accuracy, "loss": 1.0},
            "server_model": {"accuracy": accuracy - 2, "loss": 1.0},
            "proxy_before": {"accuracy": 30.0, "loss": 1.0},
            "proxy_after": {"accuracy": 50.0, "loss": 1.0},
        }
    words: dict[str, Any] = {
        "bytes_down": {"a": 100, "b": 300},
        "bytes_up": {"a": 1000, "b": 3000},
        "measures": measures,
        "seconds": 1.5,
    }
    return RoundRecord(number, **words | changes)


def result(rounds, base=20.0):
    return Result(None, rounds, {"accuracy": base, "loss": 2.0} if base else None, 10_000)  # type: ignore[arg-type]


@pytest.fixture
def summary():
    figures = summarize("fedqsn", result([record(1, 60.0), record(2, 80.0)]), seconds=3.0)
    bare = summarize("fedavg", result([record(1)], base=None), seconds=700.0)
    full = summarize("other", result([record(1, 99.9)]), seconds=9.0, own_data=41.25)
    return {
        "fp32_bytes": 10_000,
        "schemes": {"fedqsn": figures, "a-scheme-with-a-long-name": bare, "other": full},
    }


def render(thing, width, **words):
    out = io.StringIO()
    Console(file=out, width=width, **words).print(thing)
    return out.getvalue()


@pytest.mark.parametrize(
    ("kept", "line"),
    [
        (1, "the checkpoint of the last round is kept, 2.00 kB\n"),
        (3, "checkpoints of the last 3 rounds are kept, 2.00 kB each\n"),
    ],
)
def test_what_checkpoints_take_is_said_once(kept, line):
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, width=80))
    progress.checkpoint_saved(1, 2000, kept)
    progress.checkpoint_saved(2, 2000, kept)
    assert out.getvalue() == line


def test_a_round_says_how_much_of_the_model_was_shown_at_most_and_together():
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, width=80))
    progress.round_finished(record(1, exposed={"a": 0.5, "b": 0.997}, exposed_together=0.999))
    told = "at most 99.7 % of the model shown to one client so far, 99.9 % to all together"
    assert told in out.getvalue()


def test_summary_takes_the_last_round_and_keeps_gaps():
    figures = summarize("x", result([record(1, 60.0), record(2), record(3, 80.0)]), seconds=3.0)
    assert figures == {
        "name": "x", "base": 20.0, "global": 80.0, "server_model": 78.0, "proxy_before": 30.0,
        "proxy_after": 50.0, "own_data": None, "bytes_down": 200.0, "bytes_up": 2000.0,
        "seconds": 3.0, "rounds": [60.0, None, 80.0],
    }  # fmt: skip
    assert summarize("x", result([record(1)], base=None), seconds=1)["global"] is None
    assert summarize("x", result([]), seconds=1)["rounds"] == []


def test_summary_is_written_whole(tmp_path, summary):
    path = write_summary(tmp_path / "new", summary["fp32_bytes"], summary["schemes"])
    assert path == tmp_path / "new" / "summary.json"
    assert json.loads(path.read_text()) == summary
    with pytest.raises(TypeError):
        write_summary(tmp_path / "new", 1, {"x": {"base": object()}})
    assert json.loads(path.read_text()) == summary
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_table_fits_and_says_everything(summary, width):
    text = render(table(summary), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "\x1b" not in text
    for words in ("20.0", "80.0", "78.0", "30.0", "50.0", "41.2", "200 B", "2.0 %", "2.00 kB", "–"):
        assert words in text
    row = next(line for line in text.splitlines() if line.startswith("other"))
    assert " ".join(row.split()) == "other 20.0 99.9 97.9 30.0 50.0 41.2 200 B 2.00 kB 9.0 s"
    for term in ("Base, global model:", "Server model:", "Proxy:", "Own data:", "Down, up:"):
        assert term in text


def colours(path):
    pixels = imread(path)
    assert pixels.shape[0] > 400
    return np.unique((pixels[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)


def test_picture_has_a_colour_for_each_scheme(tmp_path, summary):
    plot(summary, tmp_path / "deep" / "summary.png")
    found = {tuple(colour) for colour in colours(tmp_path / "deep" / "summary.png")}
    for hexes in ("0072B2", "009E73"):
        assert tuple(bytes.fromhex(hexes)) in found


def test_picture_of_one_scheme_without_measures(tmp_path):
    bare = summarize("fedavg", result([record(1)], base=None), seconds=7.0)
    plot({"fp32_bytes": 10_000, "schemes": {"fedavg": bare}}, tmp_path / "one.png")
    assert len(colours(tmp_path / "one.png")) > 10


def test_pictures_leave_no_global_figures(tmp_path, summary):
    import sys

    plot(summary, tmp_path / "x.png")
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def tell(progress):
    progress.run_started(2, 0)
    for number in (1, 2):
        progress.round_started(number, 2)
        progress.client_finished(number, "a", None)
        failure = "The loss is not finite [nan]." if number == 2 else None
        progress.client_finished(number, "b", failure)
        failed = {"b": failure} if failure else {}
        progress.round_finished(record(number, 50.0 + number, failed=failed))


def test_progress_elsewhere_is_plain_lines():
    out = io.StringIO()
    with ConsoleProgress(Console(file=out, width=60)) as progress:
        tell(progress)
    assert out.getvalue().splitlines() == [
        "round 1/2: 2 of 2 clients, global model 51.0 %, trained proxy 50.0 %, 400 B down, "
        "4.00 kB up, 1.5 s",
        "round 2: b failed: The loss is not finite [nan].",
        "round 2/2: 1 of 2 clients, global model 52.0 %, trained proxy 50.0 %, 400 B down, "
        "4.00 kB up, 1.5 s",
    ]


@pytest.mark.parametrize(
    ("own", "taught", "words"),
    [
        (1.0, 0.5, "made of 1 x the owner's tuning + 0.5 x what clients taught"),
        (1.0, 0.0, "nothing taken over, as the base is best on the owner's rows"),
    ],
)
def test_progress_says_what_a_model_is_made_of_that_learns_of_a_public_one(own, taught, words):
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out))
    progress.run_started(1, 0)
    progress.round_finished(record(1, 51.0, metrics={"own": own, "taught": taught}))
    assert f"global model 51.0 %, trained proxy 50.0 %, {words}, 400 B down" in out.getvalue()


def test_progress_on_a_terminal_moves_and_cleans_up():
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with ConsoleProgress(console) as progress:
        tell(progress)
    text = out.getvalue()
    assert "\x1b" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "round 2/2: 1 of 2 clients" in plain
    assert "b failed: The loss is not finite [nan]." in plain
    assert text.rstrip().endswith("\x1b[?25h") or text.rindex("\x1b[?25h") > text.rindex(
        "\x1b[?25l"
    )


def test_progress_ends_when_a_run_breaks_off():
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)

    def break_off():
        with ConsoleProgress(console) as progress:
            progress.run_started(5, 0)
            progress.round_started(1, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_progress_of_resumed_runs():
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, width=80))
    progress.run_started(5, 2)
    progress.run_started(5, 5)
    assert out.getvalue() == ("continuing after round 2 of 5\nall 5 rounds are finished already\n")


def test_numbers_in_words():
    assert [human_bytes(n) for n in (0, 999, 1000, 9_994, 9_995, 99_950, 999_499, 999_500)] == [
        "0 B", "999 B", "1.00 kB", "9.99 kB", "10.0 kB", "100 kB", "999 kB", "1.00 MB",
    ]  # fmt: skip
    assert human_bytes(5e15) == "5000 TB"
    assert (human_bytes(None), human_percent(None), human_seconds(None)) == ("–", "–", "–")
    assert [human_seconds(s) for s in (0.04, 9.94, 9.96, 599.4, 600, 3599.6, 3735)] == [
        "0.0 s", "9.9 s", "10 s", "599 s", "10:00", "1:00:00", "1:02:15",
    ]  # fmt: skip
    assert share(None, 5) is None
    assert share(5, 0) is None
    assert share(5, 10) == 50
