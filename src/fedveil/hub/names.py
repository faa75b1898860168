"""What a name in a configuration stands for: a folder, something on the hub, or a function."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from fedveil.errors import ConfigurationError, FedveilError

__all__ = ["Functions", "explained", "find_function", "find_named", "made_by", "place_of"]


class Functions(Protocol):
    """Finds functions by name for a party that runs nothing but what it has approved."""

    def function(self, name: str) -> Callable[..., Any]:
        """The function that "module:function" names.

        Raises:
            ConfigurationError: It is nothing that was approved.
        """


def find_function(name: str, folder: Path) -> Callable[..., Any]:
    """The function that "module:function" names, from an installed module or one in ``folder``.

    Raises:
        ConfigurationError: There is none.
    """
    function: object = find_named(name, folder)
    if not callable(function):
        attribute = name.partition(":")[2]
        raise ConfigurationError(f"The module has no function {attribute!r}", where=name)
    return function


def find_named(name: str, folder: Path) -> Any:
    """What "module:NAME" names, from an installed module or one in ``folder``.

    Raises:
        ConfigurationError: There is nothing of that name.
    """
    module_name, _, attribute = name.partition(":")
    # At the end, so that no file beside the configuration hides an installed module; and for good,
    # as client processes import it again.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigurationError(
            "A module cannot be imported",
            found=f"{type(error).__name__}: {error}",
            where=name,
            fix=f"It must be installed, or lie in {folder}.",
        ) from error
    named = getattr(module, attribute, None)
    if named is None:
        raise ConfigurationError(f"The module has no {attribute!r}", where=str(module.__file__))
    return named


def place_of(name: str, folder: Path) -> str:
    """A local folder as a path, anything else as the hub name that it must be.

    Raises:
        ConfigurationError: The name can only be that of a folder, and there is none.
    """
    path = folder / Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigurationError("There is no such folder", where=str(path))
    return name


def made_by(function: Callable[..., Any], name: str, classes: int | None) -> nn.Module:
    """The model that a function returns, which is told the number of classes if it asks.

    Raises:
        ConfigurationError: It fails, or returns something else.
    """
    takes_labels = "num_labels" in inspect.signature(function).parameters
    try:
        wanted = {"num_labels": classes} if takes_labels and classes is not None else {}
        model = function(**wanted)
    except FedveilError:
        raise
    except Exception as error:
        raise ConfigurationError(
            "The function that makes the model failed",
            found=f"{type(error).__name__}: {error}",
            where=name,
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            "The function does not make a model",
            expected="torch.nn.Module",
            found=type(model).__name__,
            where=name,
        )
    return model


@contextmanager
def explained(what: str, place: str) -> Iterator[None]:
    """Say in one line what the libraries say in a page.

    Raises:
        FedveilError: In the place of any other error.
    """
    try:
        yield
    except FedveilError:
        raise
    except Exception as error:
        text = str(error).strip()
        if "ignore_mismatched_sizes" in text or "size mismatch" in text:
            raise ConfigurationError(
                "The model has a head for another number of classes",
                where=place,
                fix="Set `new_head = true` in [model] to start with a new one.",
            ) from error
        if "Unrecognized configuration class" in text:
            raise ConfigurationError(
                "The model is of a kind that this task has no use for",
                expected="a model that transformers can load for the task",
                found=text.split("'")[1].rpartition(".")[2] if "'" in text else text[:200],
                where=place,
                fix="Choose another `task` in [data], or another model.",
            ) from error
        first = text.splitlines()[0].split(". ")[0][:200] if text else ""
        if Path(place).is_dir():
            raise FedveilError(
                f"The {what} in this folder cannot be loaded",
                found=f"{type(error).__name__}: {first}".rstrip(".: "),
                where=place,
                fix="It should be as save_pretrained of an installed transformers writes it.",
            ) from error
        raise FedveilError(
            f"The {what} cannot be loaded",
            found=f"{type(error).__name__}: {first}".rstrip(".: "),
            where=place,
            fix="A name that is no local folder is looked up on the Hugging Face hub: check its "
            "spelling and the network, or download it elsewhere and name the folder.",
        ) from error
