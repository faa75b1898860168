"""The console that everything is printed on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from fedveil.printable import printable

__all__ = ["PlainConsole"]


class PlainConsole(Console):
    """A console on which no text is markup, and none steers the terminal.

    Colours, bars and tables are as ever; of what is in them, control characters are written out.

    Args:
        settings: As of ``rich.console.Console``.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """See ``rich.console.Console``: what everything that is printed goes through."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text == "\n":
                yield segment
            else:
                yield segment._replace(text=printable(segment.text))
