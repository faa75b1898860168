"""A run in a terminal: progress, and tables of what came of it."""

from fedveil.report.console.progress import ConsoleProgress
from fedveil.report.console.table import table

__all__ = ["ConsoleProgress", "table"]
