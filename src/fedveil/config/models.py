"""Models, tokenizers and functions by name. Whatever goes wrong, the answer is a FedveilError."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from fedveil.config.code import Approved
from fedveil.config.tables import RANDOM, ModelTable, is_function
from fedveil.data.library import library, quiet_transformers
from fedveil.errors import ConfigurationError, FedveilError

__all__ = [
    "Pair",
    "architecture_class",
    "find_function",
    "find_named",
    "load_model",
    "load_pair",
    "load_tokenizer",
    "load_untouched",
    "place_of",
    "quiet_transformers",
    "refuse_code",
]

_PEFT_TASKS = {
    "text-classification": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_IMPORTS = "megatron_config"
"""The setting of an adapter with which PEFT imports a module that another setting names."""

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
    approved: Approved | None = None,
) -> nn.Module:
    """The owner's model, with a head for the classes.

    Args:
        table: Its description.
        task: What it is trained for.
        names: The classes in order.
        folder: What paths are relative to; modules are looked for there as well.
        seed: Decides the weights that start at random: the same seed, the same model.
        weights: Whether to load weights; without them a folder needs only its config.json.
        approved: At a client's, the code that may run there: no other does, no code that comes with
            a model, and nothing is unpickled. None at the owner's.

    Raises:
        FedveilError: It cannot be found or loaded, or has a head for other classes; at a client's
            also if it wants code of its own to be run, or has its weights in a pickle.
    """
    with _drawing(seed):
        model = _load(table, task, names, folder, weights, approved)[0]
        return _adapted(model, table, task, folder, approved)


class Pair(NamedTuple):
    """The owner's model, what is released in its place, and patterns of what is new in the latter.

    New is a head that the public model's folder has none of, or one of another size, unless the
    owner's model has a new one in its place, too.
    """

    own: nn.Module
    public: nn.Module
    fresh: tuple[str, ...]


def load_pair(
    table: ModelTable,
    task: str,
    names: Sequence[str],
    folder: Path,
    *,
    seed: int,
    hidden: int,
    keyed: AbstractContextManager[object],
) -> Pair:
    """The owner's model and the public one, which begin alike in what begins at random in both.

    That is a head that is new in both, and an adapter: what clients teach the public model's is
    then added to the owner's from where both began. Clients are sent it, so that it is no secret of
    the owner's. What begins at random in the owner's model alone is drawn under the secret. Of two
    models that functions make nobody knows what was drawn: they are made with the same seed.

    Args:
        table: Their description, with a public model and without an adapter of the owner's.
        task: As for :func:`load_model`.
        names: As for :func:`load_model`.
        folder: As for :func:`load_model`.
        seed: Decides what begins at random in the public model.
        hidden: Decides what begins at random in the owner's alone, where ``keyed`` does not.
        keyed: Inside, what is drawn at random follows from the federation secret.

    Raises:
        FedveilError: As :func:`load_model`.
        ConfigurationError: Of a model that a function makes, which may read weights, there is no
            random initialization.
    """
    released, drawn = _released(table)
    if is_function(table.name) and is_function(released.name):
        hidden, keyed = seed, nullcontext()
    with _drawing(hidden), keyed:
        own, mine = _load(table, task, names, folder)
    with _drawing(seed):
        public, new = _load(released, task, names, folder, weights=not drawn)
    alike = mine & (public.state_dict().keys() if drawn else new)
    _copy(alike, public, own)
    with _drawing(seed):
        own = _adapted(own, table, task, folder)
    with _drawing(seed):
        public = _adapted(public, released, task, folder)
    # An adapter puts more before the names, and after the modules.
    fresh = {f"*{name.rpartition('.')[0]}.*" for name in new - alike}
    return Pair(own, public, tuple(sorted(fresh)))


def _released(table: ModelTable) -> tuple[ModelTable, bool]:
    """The public model's description, and whether it is drawn at random."""
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
    return table.model_copy(update={"name": name, "new_head": True}), drawn


@torch.no_grad()
def _copy(names: AbstractSet[str], source: nn.Module, target: nn.Module) -> None:
    """Copy tensors that both models have alike; what is of another shape is refused later."""
    given, taken = source.state_dict(), target.state_dict()
    for name in names & given.keys() & taken.keys():
        if given[name].shape == taken[name].shape:
            taken[name].copy_(given[name])


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Inside, PyTorch draws what it draws with this seed; outside, as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _load(
    table: ModelTable,
    task: str,
    names: Sequence[str],
    folder: Path,
    weights: bool = True,
    approved: Approved | None = None,
) -> tuple[nn.Module, set[str]]:
    """The model without its adapter, and what in it its folder has no values of, if one has any."""
    classes = table.num_labels or len(names)
    if classes < len(names):
        raise ConfigurationError(
            "The model has fewer classes than the data",
            expected=f"num_labels of at least {len(names)}",
            found=str(classes),
            where="[model] num_labels",
        )
    if not is_function(table.name):
        place = place_of(table.name, folder)
        guarded = approved is not None
        return _load_pretrained(table, task, names, classes, place, weights, guarded)
    found = approved.function if approved else partial(find_function, folder=folder)
    model = _call(found(table.name), table.name, classes or None)
    return model.to(getattr(torch, table.dtype)), set()


def _adapted(
    model: nn.Module, table: ModelTable, task: str, folder: Path, approved: Approved | None = None
) -> nn.Module:
    """The model with its adapter, if it is to have one."""
    if approved is not None:
        _refuse_imports(table, folder)
    if table.adapter is not None:
        return load_adapter(model, folder / Path(table.adapter).expanduser())
    return model if table.lora is None else add_adapter(model, task, table.lora)


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


def load_tokenizer(name: str, folder: Path, *, guarded: bool = False) -> Any:
    """A tokenizer that can pad, from a folder or the hub.

    Args:
        name: What it is called.
        folder: What paths are relative to.
        guarded: Refuse one that wants code of its own to be run: at a client's.

    Raises:
        FedveilError: It cannot be found or loaded, or is refused.
    """
    place = place_of(name, folder)
    with quiet_transformers() as transformers, _explained("tokenizer", place):
        if guarded:
            tokenizers = transformers.models.auto.tokenization_auto
            refuse_code(tokenizers.get_tokenizer_config(place, trust_remote_code=False), place)
        trust = {"trust_remote_code": False} if guarded else {}
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **trust)
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
    function: object = find_named(name, folder)
    if not callable(function):
        raise ConfigurationError("A name in a file is that of no function", where=name)
    return function


def find_named(name: str, folder: Path) -> Any:
    """What "module:NAME" names, from an installed module or one in ``folder``.

    Raises:
        ConfigurationError: There is nothing of that name.
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
    named = getattr(module, function_name, None)
    if named is None:
        raise ConfigurationError(
            f"The module has no function {function_name!r}", where=str(module.__file__)
        )
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
    guarded: bool,
) -> tuple[nn.Module, set[str]]:
    """The model, and names of what its folder has no values of; none, if none were asked for."""
    words: dict[str, Any] = {"num_labels": classes} if classes else {}
    if guarded:
        words["trust_remote_code"] = False
    if classes and classes == len(names):
        words["id2label"] = dict(enumerate(names))
        words["label2id"] = {name: number for number, name in enumerate(names)}
    with quiet_transformers() as transformers, _explained("model", place):
        kind = getattr(transformers, _CLASSES[task])
        if guarded:
            refuse_code(transformers.PretrainedConfig.get_config_dict(place)[0], place)
        if not weights:
            config = transformers.AutoConfig.from_pretrained(place, **words)
            trust = {"trust_remote_code": False} if guarded else {}
            bare: nn.Module = kind.from_config(config, dtype=getattr(torch, table.dtype), **trust)
            return bare, set()
        if guarded:
            _refuse_pickles(Path(place), "*.safetensors")
            words["use_safetensors"] = True
        model, info = kind.from_pretrained(
            place,
            dtype=getattr(torch, table.dtype),
            ignore_mismatched_sizes=table.new_head,
            output_loading_info=True,
            **words,
        )
        return model, {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


def refuse_code(settings: Any, place: str) -> None:
    """Raise if a config.json or tokenizer_config.json names code that would come with it.

    Args:
        settings: Its content.
        place: The folder or hub name that it is of.

    Raises:
        ConfigurationError: It does: a class in a file of its own, or a kernel to be fetched.
    """
    if isinstance(settings, Mapping):
        kernel = str(settings.get("attn_implementation") or settings.get("_attn_implementation"))
        fetched = "/" in kernel
        if settings.get("auto_map") or fetched:
            raise ConfigurationError(
                "The model brings code of its own, which is not run here",
                expected="a model of a class that the installed transformers has",
                found=f"the kernel {kernel[:80]!r}" if fetched else '"auto_map"',
                where=place,
                fix="Ask the owner for a model without it.",
            )
        settings = list(settings.values())
    if isinstance(settings, list):
        for one in settings:
            refuse_code(one, place)


def _refuse_pickles(folder: Path, wanted: str) -> None:
    """Raise for a folder whose weights only a pickle has; the hub's are refused by transformers."""
    if not folder.is_dir() or any(folder.glob(wanted)):
        return
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    raise ConfigurationError(
        "The model's weights are in no file that may be read here: nothing is unpickled",
        expected=wanted,
        found=", ".join(found[:3]) or "no weights",
        where=str(folder),
        fix="Whoever has the model converts it: save_pretrained(folder) writes safetensors.",
    )


def _refuse_imports(table: ModelTable, folder: Path) -> None:
    """Raise for an adapter that names a module to import, or that is a pickle."""
    settings, where = table.lora, "[model.lora]"
    if table.adapter is not None:
        place = folder / Path(table.adapter).expanduser()
        where = str(place)
        if not (place / "adapter_config.json").is_file():
            return  # which is said where it is loaded
        _refuse_pickles(place, "adapter_model.safetensors")
        try:
            settings = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigurationError(
                "An adapter's settings cannot be read", found=str(error)[:200], where=where
            ) from error
    if isinstance(settings, Mapping) and settings.get(_IMPORTS):
        raise ConfigurationError(
            "The adapter names a module to import, which is not done here",
            expected=f"no {_IMPORTS}",
            found=_IMPORTS,
            where=where,
        )


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
