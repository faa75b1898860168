"""Settings that owner and client must share: told as digests, and compared where training is.

A client that trains with another learning rate, or numbers its classes in another order, sends an
update like any other. So every release says the digests of what the owner has; a client that has
something else does not train, and its own log says what differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from torch import nn

from fedveil.errors import ProtocolError, WireError
from fedveil.schemes import Scheme
from fedveil.tasks import Task
from fedveil.training import Training

__all__ = ["DisagreementError", "check_agreement", "digests_of", "packed", "settings_of"]

_OWN = frozenset({"device", "gradient_accumulation_steps", "gradient_checkpointing"})
"""Settings of training that are each machine's own: they change no result but by rounding."""

_OF_TASKS = ("name", "max_length", "label_smoothing")
_BYTES = 8
_LONGEST = 2**14
"""Characters of all digests together, at most."""


class DisagreementError(ProtocolError):
    """A client's settings are not the owner's."""


def settings_of(
    scheme: Scheme, training: Training, task: Task, model: nn.Module
) -> dict[str, object]:
    """What owner and clients must have in common, by name.

    Args:
        scheme: Its name, and those fields that clients are given.
        training: But for what is each machine's own.
        task: Name, length and smoothing, as far as it has them. Columns are each client's own.
        model: The order of its classes, if it names them.
    """
    found: dict[str, object] = {"scheme.name": scheme.name}
    for field in fields(scheme):  # type: ignore[arg-type]
        if field.name in scheme.client_fields:
            found[f"scheme.{field.name}"] = _plain(getattr(scheme, field.name))
    for name, value in asdict(training).items():
        if name not in _OWN:
            found[f"training.{name}"] = _plain(value)
    for name in _OF_TASKS:
        if hasattr(task, name):
            found[f"task.{name}"] = _plain(getattr(task, name))
    if isinstance(names := getattr(getattr(model, "config", None), "id2label", None), Mapping):
        labels = [str(name) for _, name in sorted(names.items(), key=lambda one: int(one[0]))]
        # Names that nobody gave say nothing.
        if not all(label == f"LABEL_{number}" for number, label in enumerate(labels)):
            found["labels"] = labels
    return found


def digests_of(settings: Mapping[str, object]) -> dict[str, str]:
    """A short digest of each setting."""
    return {
        name: hashlib.blake2b(
            json.dumps([name, value], sort_keys=True, default=repr).encode(), digest_size=_BYTES
        ).hexdigest()
        for name, value in settings.items()
    }


def packed(settings: Mapping[str, object]) -> str:
    """The digests as one string, to travel beside a proxy."""
    return json.dumps(digests_of(settings), sort_keys=True)


def check_agreement(told: object, own: Mapping[str, object]) -> None:
    """Compare what the owner has with what is here.

    What only one of the two knows is passed over: an owner of another version tells of others.

    Args:
        told: What :func:`packed` made at the owner; None if it told nothing.
        own: This client's settings.

    Raises:
        DisagreementError: Something differs; the error names it, with this client's value.
        WireError: It is no list of digests.
    """
    if told is None:
        return
    theirs, mine = _read(told), digests_of(own)
    odd = [name for name in mine if name in theirs and theirs[name] != mine[name]]
    if odd:
        raise DisagreementError(
            "This client's settings are not the owner's",
            expected=f"the owner's values of {', '.join(odd)}",
            found="; ".join(f"{name} = {_short(own[name])}" for name in odd),
            where="this client's file",
            fix="Take the values of the file that the owner handed out, and start anew. Nothing "
            "was trained.",
        )


def _read(told: object) -> dict[str, str]:
    found: object = None
    if isinstance(told, str) and len(told) < _LONGEST:
        with suppress(ValueError, RecursionError):
            found = json.loads(told)
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise WireError("What a message says of settings cannot be read")
    return found


def _plain(value: Any) -> object:
    """A setting as JSON has it: 1.0 is 1, and one that is a class of settings has its name."""
    if is_dataclass(value) and not isinstance(value, type):
        own = {name: _plain(one) for name, one in asdict(value).items()}
        return {"name": getattr(value, "name", type(value).__name__), **own}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
