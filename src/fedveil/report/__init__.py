"""What a run looks like to people: figures on disk, a table, a picture, progress on the console."""

from fedveil.report.console import ConsoleProgress
from fedveil.report.plot import plot
from fedveil.report.summary import summarize, write_summary
from fedveil.report.table import table

__all__ = ["ConsoleProgress", "plot", "summarize", "table", "write_summary"]
