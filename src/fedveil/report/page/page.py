"""One run as one self-contained HTML page: no network, no script, no other file."""

from __future__ import annotations

from pathlib import Path

from fedveil.errors import CheckpointError
from fedveil.files import write_whole
from fedveil.report.page.contents import contents
from fedveil.report.page.rendering import ENVIRONMENT
from fedveil.report.reading import RunFolder
from fedveil.run.folder import RunFolder as OwnedFolder

__all__ = ["page", "write_page"]


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
    text = page(RunFolder.read(folder))
    path = OwnedFolder(folder).claim("report.html") if out is None else out
    write_whole(path, text, CheckpointError, "Free some space, or name another file.")
    return path


def page(run: RunFolder) -> str:
    """The whole page.

    Raises:
        CheckpointError: The run's exposure ledger is damaged.
    """
    return ENVIRONMENT.get_template("page.html.j2").render(contents(run))
