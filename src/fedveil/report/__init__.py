"""What a run looks like to people: figures on disk, a table, a picture, progress on the console."""

from fedveil.report.answers import show_answers, write_answers
from fedveil.report.console import ConsoleProgress
from fedveil.report.plot import plot
from fedveil.report.summary import summarize, write_summary
from fedveil.report.table import table

__all__ = [
    "ConsoleProgress",
    "plot",
    "show_answers",
    "summarize",
    "table",
    "write_answers",
    "write_summary",
]
