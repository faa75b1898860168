"""What a run looks like to people, from what is in its folder.

Figures on disk are written and read here; `console` shows them in a terminal, `pictures` draws
them, and `page` makes one file of all of it for a browser.
"""

from fedveil.report.answers import show_answers, write_answers
from fedveil.report.summary import summarize, write_summary

__all__ = ["show_answers", "summarize", "write_answers", "write_summary"]
