"""What a language model wrote: all of it in a file, a few answers and the scores on the console."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedveil.errors import CheckpointError
from fedveil.files import write_whole
from fedveil.training import Answers

__all__ = ["show_answers", "write_answers"]

_SHOWN = 3
_WIDTH = 300
"""Characters of a prompt that are shown, from its end."""


def write_answers(folder: Path, answers: Answers) -> Path:
    """Write ``answers.jsonl`` into a run folder: prompt, references and answer, one line each.

    Args:
        folder: The run folder; made if missing.
        answers: What the model wrote.

    Returns:
        The file.
    """
    rows = zip(answers.prompts, answers.references, answers.texts, strict=True)
    lines = "".join(
        json.dumps({"prompt": prompt, "references": references, "answer": text}, ensure_ascii=False)
        + "\n"
        for prompt, references, text in rows
    )
    path = folder / "answers.jsonl"
    write_whole(path, lines, CheckpointError)
    return path


def show_answers(answers: Answers) -> RenderableType:
    """The first answers beside what is right, and the scores of all."""
    shown = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column(style="dim", no_wrap=True)
    shown.add_column(overflow="fold")
    for number in range(min(_SHOWN, len(answers.texts))):
        shown.add_row("prompt", Text(_end_of(answers.prompts[number]), style="dim"))
        shown.add_row("right", Text(answers.references[number][0]))
        shown.add_row("written", Text(answers.texts[number] or "(nothing)", style="bold"))
        shown.add_row("", "")
    scores = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in answers.scores:
        scores.add_column(name, justify="right")
    scores.add_row(*(f"{value:.2f}" for value in answers.scores.values()))
    count = len(answers.texts)
    title = Text(f"Answers to {count} prompt{'s' * (count != 1)} of the test set", style="bold")
    return Group(title, Text(), shown, scores) if answers.scores else Group(title, Text(), shown)


def _end_of(prompt: Any) -> str:
    """The end of a prompt, which is where its question stands."""
    text = prompt if isinstance(prompt, str) else " / ".join(str(m["content"]) for m in prompt)
    return text if len(text) <= _WIDTH else "…" + text[-_WIDTH:]
