"""Messages of a conversation: what is in them, and which of them can be learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedveil.errors import DataError

__all__ = ["are_messages", "check_answers", "for_template", "role_of", "text_of"]

_NAMED = 5


def are_messages(value: Any) -> bool:
    """Whether this is a list, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def role_of(message: Any) -> Any:
    """Who speaks; None if it does not say."""
    return message.get("role") if isinstance(message, Mapping) else None


def text_of(message: Any) -> str:
    """What a message says: its content, or the texts among its parts; "" if it says nothing."""
    content: Any = message.get("content") if isinstance(message, Mapping) else None
    if are_messages(content):
        parts = (part.get("text") for part in content if isinstance(part, Mapping))
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def for_template(messages: Sequence[Any]) -> list[Any]:
    """Messages as a chat template expects them: keys without a value are not there, content is.

    Tables fill a key that one message has into all others, and templates write None as a word.
    """
    return [
        {"content": "", **{key: value for key, value in message.items() if value is not None}}
        if isinstance(message, Mapping)
        else message
        for message in messages
    ]


def check_answers(answers: Iterable[Any], where: str) -> None:
    """Refuse rows whose answer is no text of the assistant's, where it is given as messages.

    A call of a tool, or what a tool returned, is no answer: without text, a template would have the
    model learn the word "None", or the end of a turn that says nothing.

    Args:
        answers: Of each row, in order: messages, or anything else, which is left alone.
        where: The column.

    Raises:
        DataError: Naming the rows, and how many there are.
    """
    count = 0
    wrong: dict[int, tuple[str, str]] = {}
    for row, answer in enumerate(answers):
        count += 1
        if are_messages(answer) and (what := _problem(answer)):
            wrong[row] = what
    if not wrong:
        return
    first, *others = wrong
    problem, found = wrong[first]
    if others:
        named = ", ".join(map(str, others[:_NAMED])) + (", ..." if len(others) > _NAMED else "")
        found += f"; {len(wrong)} of {count} rows have no answer that can be learned, also {named}"
    raise DataError(
        f"row {first} {problem}",
        expected='messages of role "assistant" with some text as content',
        found=found,
        where=f'column "{where}"',
        fix="Leave such rows out, or end them at the assistant's last text.",
    )


def _problem(answer: Sequence[Any]) -> tuple[str, str] | None:
    """What is wrong with an answer, and what it has in place of text."""
    for message in answer:
        role = role_of(message)
        if role != "assistant":
            return "does not end with an answer", f"a message of role {role!r}"[:80]
        if not text_of(message).strip():
            calls = message.get("tool_calls") or message.get("function_call")
            return "has an empty answer", "a call of a tool, and no text" if calls else "no text"
    return None
