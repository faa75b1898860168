"""Models, tokenizers and functions by name. Whatever goes wrong, the answer is a FedveilError."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from fedveil.config.tables import RANDOM, ModelTable, is_function
from fedveil.data.library import library, quiet_transformers
from fedveil.errors import ConfigurationError, FedveilError

__all__ = [
    "architecture_class",
    "find_function",
    "load_model",
    "load_public",
    "load_tokenizer",
    "load_untouched",
    "place_of",
    "quiet_transformers",
]

_PEFT_TASKS = {
    "text-classification": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}
_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def load_model(
    table: ModelTable,
    task: str,
    names: Sequence[str],
    folder: Path,
    *,
    seed: int,
    weights: bool = True,
) -> nn.Module:
    """The owner's model, with a head for the classes.

    Args:
        table: Its description.
        task: What it is trained for.
        names: The classes in order.
        folder: What paths are relative to; modules are looked for there as well.
        seed: Decides the weights that start at random: the same seed, the same model.
        weights: Whether to load weights; without them a folder needs only its config.json.

    Raises:
        FedveilError: It cannot be found or loaded, or has a head for other classes.
    """
    return _load(table, task, names, folder, seed, weights)[0]


def load_public(
    table: ModelTable, task: str, names: Sequence[str], folder: Path, *, seed: int
) -> tuple[nn.Module, tuple[str, ...]]:
    """What is released in the model's place, and patterns of what it has not been trained for.

    The latter is a head that its folder has none of, or one of another size.

    Raises:
        FedveilError: As :func:`load_model`.
        ConfigurationError: Of a model that a function makes, which may read weights, there is no
            random initialization.
    """
    assert table.public is not None
    drawn = table.public == RANDOM
    if drawn and is_function(table.name):
        raise ConfigurationError(
            "Nobody here knows whether that function reads the owner's weights",
            expected='a function that draws them at random, as public = "module:function"',
            found=f'public = "{RANDOM}" with name = "{table.name}"',
            where="[model] public",
        )
    name = table.name if drawn else table.public
    table = table.model_copy(update={"name": name, "new_head": True})
    return _load(table, task, names, folder, seed, weights=not drawn)


def _load(
    table: ModelTable, task: str, names: Sequence[str], folder: Path, seed: int, weights: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    fresh: tuple[str, ...] = ()
    classes = table.num_labels or len(names)
    if classes < len(names):
        raise ConfigurationError(
            "The model has fewer classes than the data",
            expected=f"num_labels of at least {len(names)}",
            found=str(classes),
            where="[model] num_labels",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_function(table.name):
            model = _call(find_function(table.name, folder), table.name, classes or None)
            model = model.to(getattr(torch, table.dtype))
        else:
            place = place_of(table.name, folder)
            model, fresh = _load_pretrained(table, task, names, classes, place, weights)
        if table.adapter is not None:
            model = load_adapter(model, folder / Path(table.adapter).expanduser())
        elif table.lora is not None:
            model = add_adapter(model, task, table.lora)
    return model, fresh


def architecture_class(task: str) -> str:
    """The class of transformers that makes models for a task."""
    return _CLASSES[task]


def add_adapter(model: nn.Module, task: str, settings: Mapping[str, Any]) -> nn.Module:
    """A model with a LoRA adapter, which alone requires gradients.

    Args:
        model: The backbone, which is frozen.
        task: What it is trained for: tells PEFT what is trained whole, such as a new head.
        settings: Of ``peft.LoraConfig``, in its own words.

    Raises:
        ConfigurationError: PEFT does not know a setting, or nothing in the model fits.
    """
    peft = library("peft")
    try:
        config = peft.LoraConfig(task_type=_PEFT_TASKS.get(task), **settings)
        with warnings.catch_warnings():
            # PEFT asks transformers for what will have another name, and says what it mends.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            adapted: nn.Module = peft.get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            "The adapter cannot be added",
            found=str(error).split("\n", maxsplit=1)[0].rstrip(".")[:200],
            where="[model.lora]",
            fix="Its keys are the arguments of peft.LoraConfig; target_modules name layers of this "
            "model.",
        ) from error
    return adapted


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """A model with an adapter that PEFT saved, which alone requires gradients.

    Args:
        model: The backbone, which is frozen.
        folder: Where the adapter is: adapter_config.json and its weights.

    Raises:
        ConfigurationError: There is none, or it was trained for another model.
    """
    peft = library("peft")
    if not (folder / "adapter_config.json").is_file():
        raise ConfigurationError(
            "There is no adapter",
            expected="a folder with adapter_config.json, as PEFT saves it",
            where=str(folder),
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # What PEFT only warns of: tensors of the model that the folder does not have.
            warnings.filterwarnings("error", message=".*adapter keys.*")
            adapted: nn.Module = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
        _check_places(folder, peft.get_peft_model_state_dict(adapted))
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, UserWarning) as error:
        raise ConfigurationError(
            "The adapter does not fit the model",
            expected="an adapter that was trained on this model",
            found=_last_line(error),
            where=str(folder),
        ) from error
    return adapted


def _check_places(folder: Path, own: Mapping[str, Any]) -> None:
    """Raise ValueError for tensors of an adapter's file that PEFT found no place for."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        lost = sorted(set(file.keys()) - own.keys())
    if lost:
        raise ValueError(f"{len(lost)} tensors without a place in this model, such as {lost[0]}")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]


def load_tokenizer(name: str, folder: Path) -> Any:
    """A tokenizer that can pad, from a folder or the hub."""
    place = place_of(name, folder)
    with quiet_transformers() as transformers, _explained("tokenizer", place):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


def load_untouched(name: str, folder: Path) -> nn.Module:
    """A model as it lies in its folder or on the hub, in the class that it was saved from."""
    if is_function(name):
        return _call(find_function(name, folder), name, None)
    place = place_of(name, folder)
    with quiet_transformers() as transformers, _explained("model", place):
        architectures = transformers.AutoConfig.from_pretrained(place).architectures or [""]
        kind = getattr(transformers, architectures[0], transformers.AutoModel)
        model: nn.Module = kind.from_pretrained(place, dtype=torch.float32)
        return model


def find_function(name: str, folder: Path) -> Callable[..., Any]:
    """The function that "module:function" names, from an installed module or one in ``folder``.

    Raises:
        ConfigurationError: There is none.
    """
    module_name, _, function_name = name.partition(":")
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
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigurationError(
            f"The module has no function {function_name!r}", where=str(module.__file__)
        )
    return function  # type: ignore[no-any-return]


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


def _call(function: Callable[..., Any], name: str, classes: int | None) -> nn.Module:
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


def _load_pretrained(
    table: ModelTable,
    task: str,
    names: Sequence[str],
    classes: int,
    place: str,
    weights: bool,
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, and patterns of what begins at random in it."""
    words: dict[str, Any] = {"num_labels": classes} if classes else {}
    if classes and classes == len(names):
        words["id2label"] = dict(enumerate(names))
        words["label2id"] = {name: number for number, name in enumerate(names)}
    with quiet_transformers() as transformers, _explained("model", place):
        kind = getattr(transformers, _CLASSES[task])
        if not weights:
            config = transformers.AutoConfig.from_pretrained(place, **words)
            bare: nn.Module = kind.from_config(config, dtype=getattr(torch, table.dtype))
            return bare, ()
        model, info = kind.from_pretrained(
            place,
            dtype=getattr(torch, table.dtype),
            ignore_mismatched_sizes=table.new_head,
            output_loading_info=True,
            **words,
        )
        new = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
        # An adapter puts more before the names, and after the modules.
        return model, tuple(sorted({f"*{name.rpartition('.')[0]}.*" for name in new}))


@contextmanager
def _explained(what: str, place: str) -> Iterator[None]:
    """Say in one line what the libraries say in a page."""
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
