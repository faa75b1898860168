"""The log of fedveil: no record of it can pass for another, whatever words it quotes."""

from __future__ import annotations

import logging
import textwrap

from fedveil.printable import one_line, printable

__all__ = ["LOG", "PlainRecords"]


class PlainRecords(logging.Filter):
    """Makes of each record's message one line, and sets off the lines of its traceback.

    For loggers, and for handlers that are given records of other loggers, too.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Never drops a record."""
        if getattr(record, "is_plain", False):
            return True
        record.msg, record.args = one_line(record.getMessage()), ()
        text = record.exc_text
        if record.exc_info and not text:
            text = logging.Formatter().formatException(record.exc_info)
        if text:
            # Formatters take this text if it is there.
            record.exc_text = textwrap.indent(printable(text), "  ", lambda line: True)
        record.is_plain = True
        return True


LOG = logging.getLogger("fedveil")
LOG.addFilter(PlainRecords())
