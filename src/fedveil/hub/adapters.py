"""Adapters of PEFT: what they train, what is new beside them, and what they begin with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedveil.errors import ConfigurationError
from fedveil.hub.library import library

__all__ = ["add_adapter", "check_start", "load_adapter", "saved_whole"]

_PEFT_TASKS = {
    "text-classification": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}
_WHOLE = {"SEQ_CLS": ("classifier", "score")}
"""What PEFT trains whole for a task, if it is there."""

_BESIDE = (True, False, "gaussian", "orthogonal")
"""Beginnings of an adapter that leave the backbone as it is."""

_OF_WEIGHTS = ("pissa", "olora")
"""Those that take from the backbone what follows from it alone: again the same, wherever loaded."""


def add_adapter(
    model: nn.Module, task: str, settings: Mapping[str, Any], new: Collection[str] = ()
) -> nn.Module:
    """A model with a LoRA adapter, which alone requires gradients.

    Args:
        model: The backbone, which is frozen.
        task: What it is trained for: tells PEFT what is trained whole, such as a new head.
        settings: Of ``peft.LoraConfig``, in its own words.
        new: Names of what begins at random in the backbone, such as a new head. Frozen it would be
            another one on every machine, and in no file: it is trained whole, travels with the
            adapter, and is saved in it.

    Raises:
        ConfigurationError: PEFT does not know a setting, nothing in the model fits, or the adapter
            would begin with a change of the backbone that nobody else can repeat.
    """
    peft = library("peft")
    check_start(settings.get("init_lora_weights", True), "[model.lora]")
    kind = _PEFT_TASKS.get(task)
    whole = [*(settings.get("modules_to_save") or ())]
    beside = modules_of(new, {*whole, *_WHOLE.get(kind or "", ())})
    words = {**settings, "modules_to_save": [*whole, *beside] or None}
    try:
        config = peft.LoraConfig(task_type=kind, **words)
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
    return _with_nothing_twice(adapted, new)


def load_adapter(model: nn.Module, folder: Path, new: Collection[str] = ()) -> nn.Module:
    """A model with an adapter that PEFT saved, which alone requires gradients.

    Args:
        model: The backbone, which is frozen.
        folder: Where the adapter is: adapter_config.json and its weights.
        new: As of :func:`add_adapter`. What the folder has values of takes them.

    Raises:
        ConfigurationError: There is none, it was trained for another model, or it began with a
            change of its backbone that this one does not have.
    """
    peft = library("peft")
    if not (folder / "adapter_config.json").is_file():
        raise ConfigurationError(
            "There is no adapter",
            expected="a folder with adapter_config.json, as PEFT saves it",
            where=str(folder),
        )
    try:
        # Before PEFT reads it, which asks for other packages for some beginnings.
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        check_start(settings.get("init_lora_weights", True), str(folder))
        config = peft.PeftConfig.from_pretrained(str(folder))
        whole = [*(getattr(config, "modules_to_save", None) or ())]
        beside = modules_of(new, {*whole, *_WHOLE.get(config.task_type or "", ())})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # What is lacking is looked for below.
            warnings.filterwarnings("ignore", message=".*adapter keys.*")
            adapted: nn.Module
            if beside:
                config.modules_to_save = [*whole, *beside]
                adapted = _with_more(model, config, folder)
            else:
                adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
        _check_places(folder, peft.get_peft_model_state_dict(adapted), beside)
    except ConfigurationError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, UserWarning) as error:
        raise ConfigurationError(
            "The adapter does not fit the model",
            expected="an adapter that was trained on this model",
            found=_last_line(error),
            where=str(folder),
        ) from error
    return _with_nothing_twice(adapted, new)


def _with_more(model: nn.Module, config: Any, folder: Path) -> nn.Module:
    """A model with an adapter of a folder, and modules of which that has no values."""
    peft, utils = library("peft"), library("peft.utils")
    config.inference_mode = False
    adapted: nn.Module = peft.get_peft_model(model, config)
    found = utils.load_peft_weights(str(folder), device="cpu")
    # PEFT wants a value for all that is saved.
    own = {n: t for n, t in peft.get_peft_model_state_dict(adapted).items() if "lora_" not in n}
    peft.set_peft_model_state_dict(adapted, {**own, **found})
    return adapted


def check_start(start: Any, where: str, *, held: bool = False) -> None:
    """Refuse an adapter that begins with a change of its backbone that others do not have.

    Args:
        start: ``init_lora_weights`` of ``peft.LoraConfig``.
        where: Where it stands.
        held: Whether clients hold the backbone, rather than being sent it.

    Raises:
        ConfigurationError: The change is drawn at random or found from data, so that whoever loads
            the adapter has another backbone; or clients hold one, exactly as it is.
    """
    if start in _BESIDE or (start in _OF_WEIGHTS and not held):
        return
    others = "" if held else f", {', '.join(map(repr, _OF_WEIGHTS))}"
    raise ConfigurationError(
        "The adapter would begin with a change of the backbone, which others do not have",
        expected=f"init_lora_weights = true, 'gaussian', 'orthogonal'{others}",
        found=repr(start),
        where=where,
        fix="Whoever loads the adapter puts it on the backbone as it was.",
    )


def saved_whole(model: nn.Module) -> list[str]:
    """The modules that are trained whole beside a model's adapter; none without one."""
    configs = getattr(model, "peft_config", {})
    names: set[str] = set()
    for config in configs.values():
        names |= {*(getattr(config, "modules_to_save", None) or ())}
    return sorted(names)


def modules_of(new: Iterable[str], covered: Collection[str]) -> list[str]:
    """The modules with some tensors, the outermost alone, but for those that are in others.

    Raises:
        ConfigurationError: A tensor is in no module, so that PEFT cannot save it.
    """
    modules = set()
    for name in new:
        module = name.rpartition(".")[0]
        if not module:
            raise ConfigurationError(
                "A weight begins at random that no adapter can save",
                expected="weights in the model's folder for all but whole modules, such as a head",
                found=name,
                where="[model] name",
                fix="Train the model without an adapter, or save it with all its weights first.",
            )
        modules.add(module)
    outer = {one for one in modules if not any(one.startswith(f"{o}.") for o in modules)}
    return sorted(one for one in outer if not _is_inside(one, covered))


def _is_inside(module: str, covered: Collection[str]) -> bool:
    """Whether PEFT takes a module, or one around it, for one of these, by the end of its name."""
    parts = module.split(".")
    around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(path == one or path.endswith(f".{one}") for path in around for one in covered)


@torch.no_grad()
def _with_nothing_twice(adapted: nn.Module, new: Collection[str]) -> nn.Module:
    """The model without what PEFT keeps of the beginning of what is new.

    Nothing uses it as long as there is the adapter; but as a part of the backbone it would be other
    random numbers on every machine that clients are said to hold.
    """
    kept = {name.replace(".original_module.", "."): tensor
            for name, tensor in adapted.state_dict().items()
            if ".original_module." in name}  # fmt: skip
    prefix = "base_model.model."
    for name in new:
        if prefix + name in kept:
            kept[prefix + name].zero_()
    return adapted


def _check_places(folder: Path, own: Mapping[str, Any], beside: Collection[str]) -> None:
    """Raise ValueError unless each tensor of an adapter is in its file, and each in the file in it.

    Args:
        folder: Of the adapter.
        own: Its tensors, named as PEFT saves them.
        beside: Modules that are trained beside it, and that it did not know of.
    """
    found = set(library("peft.utils").load_peft_weights(str(folder), device="cpu"))
    if lost := sorted(found - own.keys()):
        raise ValueError(f"{len(lost)} tensors without a place in this model, such as {lost[0]}")
    prefixes = tuple(f"base_model.model.{module}." for module in beside)
    lacking = sorted(name for name in own.keys() - found if not name.startswith(prefixes))
    if lacking:
        raise ValueError(f"{len(lacking)} tensors are missing, such as {lacking[0]}")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
