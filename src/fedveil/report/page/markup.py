"""HTML in which a text cannot become markup: whatever is not :class:`Html` is escaped.

Nor can it turn around the direction of what it stands in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fedveil.printable import printable

__all__ = ["Html", "Node", "listing", "scrolling", "table", "tag"]


class Html(str):
    """Text that is markup already; made by :func:`tag`, by hand only of what is no one's input."""

    __slots__ = ()


Node = str | Iterable["Node"] | None
"""What may stand inside a tag: a text, which is escaped; Html; several of these; nothing."""


def tag(name: str, *content: Node, **attributes: str | int | None) -> Html:
    """One element with its content.

    Args:
        name: As "p".
        content: Texts are escaped, Html is not.
        attributes: As ``class_="note"``: underscores at the end are dropped, others become hyphens.
            Those that are None are left out.
    """
    words = [
        f'{key.rstrip("_").replace("_", "-")}="{escape(printable(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    opening = " ".join([name, *words])
    if name == "meta":  # the one element here that has no end
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{''.join(_flat(content))}</{name}>")


def listing(items: Iterable[Node], **attributes: str | int | None) -> Html:
    """A list with a dot before each item."""
    return tag("ul", [tag("li", item) for item in items], **attributes)


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Node]],
    *,
    numeric: Sequence[int] = (),
    class_: str | None = None,
) -> Html:
    """A table that scrolls inside its own box where the page is narrower than it.

    Args:
        caption: What is in it. It stands above the box, so that it never scrolls out of sight.
        header: One cell per column.
        rows: The first cell of each names the row.
        numeric: Columns of numbers, from 0; they are aligned to the right.
        class_: For the style sheet.
    """
    sides = [("number" if column in numeric else None) for column in range(len(header))]
    head = [
        tag("th", text, scope="col", class_=side)
        for text, side in zip(header, sides, strict=True)
    ]  # fmt: skip
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=sides[0]),
            [tag("td", cell, class_=side) for cell, side in zip(row[1:], sides[1:], strict=True)],
        )
        for row in rows
    ]
    return scrolling(caption, tag("thead", tag("tr", head)), tag("tbody", body), class_=class_)


def scrolling(caption: str, *parts: Html, class_: str | None = None) -> Html:
    """A table made of `parts` in a box that scrolls by itself; with the keyboard, too."""
    whole = tag("table", parts, class_=class_, aria_label=caption)
    box = tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)
    return Html(tag("p", caption, class_="caption") + box)


def _flat(content: Node) -> Iterable[str]:
    if content is None:
        return
    if isinstance(content, Html):
        yield content
    elif isinstance(content, str):
        # A percent sign belongs to its number: no line ends between them.
        yield escape(printable(content)).replace(" %", "&nbsp;%")
    else:
        for part in content:
            yield from _flat(part)
