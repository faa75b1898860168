"""What others wrote cannot steer a terminal, a log or a page, nor pass for a line of ours."""

import ast
import io
import logging
import pickle
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

import fedveil
from fedveil.errors import FedveilError, TrainingError
from fedveil.log import LOG, PlainRecords
from fedveil.printable import one_line, printable
from fedveil.report.console import ConsoleProgress
from fedveil.report.page.rendering import ENVIRONMENT
from fedveil.run import RoundRecord
from fedveil.screen import PlainConsole

HOSTILE = [
    "\x1b[2J\x1b[31mred",
    "\x1b]0;title\x07",
    "\x1b]8;;http://evil\x1b\\link",
    "\x9b2J",
    "fine\rround 1: all well",
    "fine\nround 1: all well",
    "fine\x0b\x0c\x85\u2028\u2029all well",
    "\u202egpj.exe",
    "\u2066\u2067\u200f\u061c",
    "\x00\x08\x7f",
    "\ud800",
    "[red]red[/red] [link=http://evil]x[/link] :boom:",
]


def steers(character):
    kept = character in "\u200c\u200d" or unicodedata.category(character) == "Zs"
    return not character.isprintable() and not kept


@given(st.text(st.characters()))
def test_nothing_is_left_that_steers(text):
    assert not any(map(steers, one_line(text)))
    assert not any(map(steers, printable(text).replace("\n", "")))
    assert printable(text).count("\n") == text.count("\n")
    assert one_line(one_line(text)) == one_line(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain [text]",
        "größe 你好 日本\u3000語",
        "می\u200cخواهم",
        "👩\u200d💻 🇩🇪 ❤️",
        "a\xa0b",
        "\\x1b",
    ],
)
def test_what_people_write_stays(text):
    assert one_line(text) == text


def test_what_steers_is_written_out():
    assert one_line("a\x1b[1m\n\u202e") == "a\\x1b[1m\\n\\u202e"
    assert printable("a\nb\r") == "a\nb\\r"


def console(**settings):
    file = io.StringIO()
    settings = {"force_terminal": False, "width": 300, "file": file, **settings}
    return PlainConsole(**settings), file


def assert_plain(shown, lines=None):
    assert not any(steers(c) for c in shown if c != "\n")
    assert lines is None or shown.count("\n") == lines


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("terminal", [False, True])
def test_the_console(text, terminal):
    screen, file = console(force_terminal=terminal, color_system=None)
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    table.add_row(Text(text))
    for shown in (table, text, Text(text)):
        screen.print(shown)
    assert_plain(file.getvalue())
    if text.startswith("[red]"):
        assert file.getvalue().count(text) == 7


@pytest.mark.parametrize("text", HOSTILE)
def test_the_lines_of_a_run(text):
    screen, file = console()
    progress = ConsoleProgress(screen)
    error = TrainingError("A client's training failed", found=f"RuntimeError: {text}", where=text)
    progress.client_finished(1, "clinic", str(error))
    progress.client_finished(1, text, text)
    progress.client_refused(1, text, text)
    progress.client_bounded(1, text, text)
    progress.client_left_out(1, text, text)
    progress.round_rejected(1, text)
    progress.waiting(text + "x")
    assert_plain(file.getvalue(), lines=7)


@pytest.mark.parametrize("text", HOSTILE)
def test_errors_and_what_is_kept_of_them(text):
    error = FedveilError("wrong", expected=text, found=text, where=text, fix="Do this.\nOr that.")
    assert_plain(str(error), lines=1)
    assert pickle.loads(pickle.dumps(error)).found == text  # whole, for programs
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    record = RoundRecord(1, failed={"clinic": str(error)})
    assert_plain(record.failed["clinic"], lines=1)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "template",
    [
        '<p title="{{ text }}">{{ text }}</p>',
        # Where parts are put together or made in a macro, they pass for markup of the template's.
        '{% macro p() %}<p title="{{ text }}">{{ caller() }}</p>{% endmacro %}'
        "{% call p() %}{{ text }}{% endcall %}",
        '{% set part %}<b></b>{% endset %}<p title="{{ text | e }}">{{ part ~ text }}</p>',
    ],
)
def test_pages(text, template):
    shown = ENVIRONMENT.from_string(template).render(text=f"{text}<>")
    assert_plain(shown, lines=0 if "\n" not in text else 2)
    assert shown.count("<") == shown.count(">") == template.count("<")


def logged(tell, *, logger=LOG):
    file = io.StringIO()
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    if logger is not LOG:
        handler.addFilter(PlainRecords())
    logger.addHandler(handler)
    try:
        tell(logger)
    finally:
        logger.removeHandler(handler)
    return file.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("logger", [LOG, logging.getLogger("another")], ids=lambda one: one.name)
def test_logs(text, logger):
    shown = logged(lambda log: log.warning("%s: %s", text, ValueError(text)), logger=logger)
    assert_plain(shown, lines=1)


@pytest.mark.parametrize("text", HOSTILE)
def test_logs_with_tracebacks(text):
    def tell(log):
        try:
            raise ValueError(f"{text}\nERROR: forged")
        except ValueError:
            log.exception("This failed")

    shown = logged(tell)
    assert_plain(shown)
    assert "ValueError" in shown
    first, *others = shown.splitlines()
    assert first == "ERROR: This failed"
    assert all(line.startswith("  ") for line in others)


def markup_in(source):
    """Printed texts with words in brackets, which a console without markup shows as they are."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "print":
            texts = (one.value for one in ast.walk(node) if isinstance(one, ast.Constant))
            yield from (text for text in texts if re.search(r"\[/?[a-z]+\]", str(text)))


def test_nothing_is_printed_that_counts_on_markup():
    package = Path(fedveil.__file__).parent
    assert not [one for path in package.rglob("*.py") for one in markup_in(path.read_text("utf-8"))]
    assert list(markup_in('console.print(f"[bold]{name}[/bold]")'))
