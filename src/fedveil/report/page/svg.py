"""Matplotlib figures as SVG inside a page: small, in its colours, the same bytes each time."""

from __future__ import annotations

import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

from fedveil.report.page.markup import Html, tag

__all__ = ["GRID", "INK", "PAPER", "inline_svg"]

# Stand for the page's own colours, which the reader's settings decide. Nothing else has them.
INK, GRID, PAPER = "#010203", "#dfdfde", "#fefefd"
_COLOURS = {INK: "var(--ink)", GRID: "var(--grid)", PAPER: "var(--paper)"}
# Without these an SVG says when and by what it was made.
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def inline_svg(figure: Figure, name: str, title: str, description: str) -> Html:
    """A figure as an element of a page.

    Texts stay texts. Colours `INK`, `GRID` and `PAPER` become those of the page.

    Args:
        figure: What is drawn; its size decides how large letters are on a phone.
        name: One word, unlike those of the page's other figures, for its ids.
        title: What it shows, for those who cannot see it.
        description: What there is to see.
    """
    file = io.StringIO()
    # The salt makes ids the same in each run, and different between the figures of a page.
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata=_NO_METADATA)
    drawing = re.sub(r"<style.*?</style>", "", file.getvalue(), flags=re.DOTALL)
    size = re.search(r'viewBox="([-0-9. ]+)"', drawing)
    start = re.search(r"<svg[^>]*>", drawing)
    assert size
    assert start
    inside = drawing[start.end() : drawing.rindex("</svg>")]
    # Names of groups, which nothing refers to, repeat from figure to figure.
    inside = re.sub(r'<g id="[A-Za-z][\w.]*_\d+">', "<g>", inside)
    inside = re.sub(r"<!--.*?-->", "", inside, flags=re.DOTALL)
    for colour, variable in _COLOURS.items():
        inside = inside.replace(colour, variable)
    return tag(
        "svg",
        tag("title", title, id=f"figure-{name}-title"),
        tag("desc", description, id=f"figure-{name}-text"),
        Html(re.sub(r"\s*\n\s*", "\n", inside)),
        viewBox=size[1],
        role="img",
        aria_labelledby=f"figure-{name}-title figure-{name}-text",
    )
