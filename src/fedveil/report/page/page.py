"""One run as one self-contained HTML page: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedveil.errors import CheckpointError
from fedveil.files import write_whole
from fedveil.report.page import privacy_sections as privacy
from fedveil.report.page import run_sections as about
from fedveil.report.page.markup import Html, Node, tag
from fedveil.report.page.style import style_sheet
from fedveil.report.reading import RunFolder
from fedveil.run.folder import RunFolder as OwnedFolder

__all__ = ["page", "write_page"]

# Whatever a value might smuggle in: a browser may load nothing and run nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_NOT_AUDITED = (
    "This run has not been audited: nobody knows yet what clients can make of what they were sent."
)


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run, whole or not at all.

    The same run gives the same bytes. The page is the owner's to show: how good the global model is
    and names of clients are in it and, until the run is audited, where its folder lies.

    Args:
        folder: Of the run; audited or not.
        out: The file to write, ``report.html`` in the folder by default.

    Returns:
        The file.

    Raises:
        CheckpointError: It is not the folder of a run, one of its files is damaged, or the page
            cannot be written.
        AuditError: The run's audit is damaged or of another version.
    """
    # What no text can hold (half a character, as JSON can) becomes a question mark.
    text = page(RunFolder.read(folder)).encode("utf-8", "replace").decode("utf-8")
    path = OwnedFolder(folder).claim("report.html") if out is None else out
    write_whole(path, text, CheckpointError, "Free some space, or name another file.")
    return path


def page(run: RunFolder) -> str:
    """The whole page.

    Raises:
        CheckpointError: The run's exposure ledger is damaged.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content_=_POLICY),
        tag("meta", name_="viewport", content_="width=device-width, initial-scale=1"),
        tag("title", f"fedveil report: {run.name}"),
        tag("style", Html(style_sheet())),
    )
    body = tag("body", _headline(run), tag("main", _sections(run)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _headline(run: RunFolder) -> Html:
    scheme = str(run.scheme.get("name", "unknown scheme"))
    kicker = f"fedveil report: {run.name}, scheme {scheme}"
    return tag(
        "header",
        tag("p", kicker, class_="kicker"),
        tag("h1", run.audit.sentence if run.audit else _NOT_AUDITED),
        None if run.audit else privacy.audit_command(run),
        privacy.raised_alarms(run),
        about.key_figures(run),
        about.on_adapters(run),
    )


def _sections(run: RunFolder) -> Node:
    sections: Sequence[tuple[str, str, Node]] = (
        ("models", "What is kept, and what is shown", privacy.kept_and_shown(run)),
        ("exposure", "How much of the model each client was shown", privacy.exposure(run)),
        ("attacks", "Attacks", privacy.attacks(run)),
        ("checks", "Checks", privacy.checks(run)),
        ("bytes", "Bytes and clients", [about.traffic(run), about.clients(run)]),
        ("rounds", "Rounds", about.rounds(run)),
        ("configuration", "Configuration", about.configuration(run)),
        ("limits", "What is not protected", privacy.not_protected(run)),
        ("words", "Words", about.words(run)),
    )
    links = [tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in sections]
    return [
        tag("nav", tag("ul", links), aria_label="Sections"),
        [
            tag("section", tag("h2", title, id=f"{name}-title"), content, id=name,
                aria_labelledby=f"{name}-title")
            for name, title, content in sections
        ],
    ]  # fmt: skip
