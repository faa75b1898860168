"""Who takes part: names of clients, and their data as the task takes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedveil.errors import ConfigurationError, DataError, FedveilError
from fedveil.tasks import Dataset, Prepared, Task
from fedveil.tasks.task import to_device
from fedveil.training import Trainer, Training
from fedveil.units.trial import Run

__all__ = ["Remote", "Rows", "check_names", "name_clients", "prepared", "run_on", "trainer_of"]

Rows = Dataset | Prepared
"""A data set, or what ``task.prepare`` made of one: to encode it once for several federations."""

_FEW = 4
"""Rows that a model is tried on."""

_CLIENT_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Remote:
    """Clients whose data are on other machines: all that the owner knows of them is their names.

    Attributes:
        names: Of letters, digits, ``.``, ``_`` and ``-``.
    """

    names: tuple[str, ...]


def name_clients(clients: Mapping[str, Rows] | Sequence[Rows]) -> dict[str, Rows]:
    """Data sets by name; those of a sequence are called ``client-00`` and so on."""
    if isinstance(clients, Mapping):
        named = dict(clients)
    else:
        named = {f"client-{i:02d}": data for i, data in enumerate(clients)}
    return named


def check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, if every client has one of its own that can be used everywhere."""
    if not names:
        raise ConfigurationError("A federation needs clients", expected="at least 1", found="none")
    if len(set(names)) < len(names):
        raise ConfigurationError("Two clients have the same name", found=", ".join(sorted(names)))
    for name in names:
        if not isinstance(name, str) or not _CLIENT_NAME.fullmatch(name) or set(name) == {"."}:
            raise ConfigurationError(
                "A client's name cannot be used",
                expected="1 to 64 letters, digits, '.', '_' and '-'",
                found=repr(name),
            )
    return names


def prepared(who: str, task: Task, data: Rows) -> Prepared:
    """What the task makes of data; an error says whose they are."""
    try:
        return task.prepare(data)
    except FedveilError as error:
        raise _name_culprit(who, error) from error


def trainer_of(name: str, task: Task, data: Rows, training: Training) -> Trainer:
    """What trains on a client's data."""
    return Trainer(task, prepared(f"client {name}", task, data), training)


def run_on(task: Task, data: Iterable[Prepared | None]) -> Run | None:
    """What runs a model on some rows of the first data there are, as training would."""
    rows = next((some for some in data if some is not None and len(some)), None)
    if rows is None:
        return None
    few = rows.select(range(min(len(rows), _FEW)))

    def run(model: nn.Module) -> object:
        device = next((one.device for one in model.parameters()), torch.device("cpu"))
        return task.loss(model, to_device(task.collate(few), device))

    return run


def _name_culprit(who: str, error: FedveilError) -> FedveilError:
    told = error.within(who)
    if isinstance(told, DataError):
        return told
    return DataError(
        told.problem, expected=told.expected, found=told.found, where=told.where, fix=told.fix
    )
