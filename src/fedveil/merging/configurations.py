"""Whether models compute the same, as far as their configurations say: shapes alone do not tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fedveil.errors import ConfigurationError
from fedveil.state import read_state

__all__ = ["check_configurations", "remarks_on_configurations"]

# Where a model comes from, and what wrote it.
_SILENT = (
    "_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "architectures",
    "auto_map", "dtype", "torch_dtype", "model_name",
)  # fmt: skip
# Of training, of the form of outputs and of kernels: nothing that a trained model computes depends
# on them.
_OF_NO_OUTPUT = (
    "*dropout*", "*drop_path*", "*layerdrop", "*_pdrop", "initializer_*", "init_std", "use_cache",
    "gradient_checkpointing", "output_*", "return_dict*", "use_return_dict", "problem_type",
    "_attn_implementation*", "attn_implementation", "chunk_size_feed_forward", "pretraining_tp",
    "task_specific_params", "finetuning_task", "tokenizer_class", "generation_config",
    "label_smoothing*", "mask_time_*", "mask_feature_*", "apply_spec_augment",
    "router_aux_loss_coef", "*_loss_reduction",
)  # fmt: skip
# What heads are for; the head of a model, and what its classes are called, are looked at elsewhere.
_HEADS = ("id2label", "label2id", "num_labels")
# Sizes that may differ where the tensors of that size stay each model's own.
_SIZES = {
    "vocab_size": ("*embed*", "*wte*", "*lm_head*", "*decoder*", "*shared*", "*cls*"),
    "max_position_embeddings": ("*position*", "*wpe*"),
    "n_positions": ("*position*", "*wpe*"),
    "n_ctx": ("*position*", "*wpe*"),
    "type_vocab_size": ("*token_type*",),
}
_OF_ADAPTER = (
    "inference_mode", "revision", "auto_mapping", "peft_version", "task_type", "lora_dropout",
    "init_lora_weights", "base_model_name_or_path", "runtime_config", "loftq_config", "eva_config",
    "corda_config", "ephemeral_gpu_offload",
)  # fmt: skip
_ABSENT = object()


def check_configurations(
    models: Sequence[nn.Module], kept: Sequence[str], names: Sequence[str] = ()
) -> None:
    """Make sure that models of the same tensors compute the same with them.

    Compared are transformers' configurations, the nested ones too, and those of PEFT's adapters.
    Keys that a configuration class does not know, and those that no output depends on, may differ.

    Args:
        models: At least two; those without a configuration are taken as they are.
        kept: Tensors that stay each model's own.
        names: What the models are called; numbers by default.

    Raises:
        ConfigurationError: They differ, naming the keys and both values.
    """
    names = names or [f"model {number}" for number in range(1, len(models) + 1)]
    for model, name in zip(models[1:], names[1:], strict=True):
        where = f"{names[0]} and {name}"
        first, other = _settings(models[0]), _settings(model)
        if first is None or other is None:
            continue
        odd = [key for key in _differing(first, other) if _matters(key, models[0], kept)]
        if odd:
            raise _differ("architectures", where, odd, first, other)
        _check_adapters(models[0], model, where)
        _check_classes(models[0], model, kept, where)


def remarks_on_configurations(models: Sequence[nn.Module]) -> list[str]:
    """What differs though no output depends on it."""
    settings = [s for s in map(_settings, models) if s is not None]
    generations = [s for s in map(_generation, models) if s is not None]
    remarks = []
    for what, found in (("configurations", settings), ("generation settings", generations)):
        odd = {
            key: _values(key, found[0], other)
            for other in found[1:]
            for key in _differing(found[0], other)
            if not _is(key, _SILENT) and not _is(key, _HEADS) and key not in _SIZES
        }
        if odd:
            named = ", ".join(f"{key} ({values})" for key, values in sorted(odd.items()))
            remarks.append(
                f"the models' {what} differ in what no output of a trained model depends on: "
                f"{named}. A result has those of the model that it is a copy of."
            )
    return remarks


def _settings(model: nn.Module) -> dict[str, Any] | None:
    return _flat_dict(getattr(model, "config", None))


def _generation(model: nn.Module) -> dict[str, Any] | None:
    return _flat_dict(getattr(model, "generation_config", None))


def _flat_dict(config: Any) -> dict[str, Any] | None:
    to_dict = getattr(config, "to_dict", None)
    return dict(_flat("", to_dict())) if callable(to_dict) else None


def _flat(prefix: str, values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted names; class names stay whole."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and str(key) not in _HEADS:
            yield from _flat(f"{name}.", value)
        else:
            yield name, list(value) if isinstance(value, tuple) else value


def _differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    names = sorted(first.keys() | other.keys())
    return [name for name in names if not _equal(first.get(name), other.get(name))]


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _matters(key: str, model: nn.Module, kept: Sequence[str]) -> bool:
    if any(_is(key, keys) for keys in (_SILENT, _OF_NO_OUTPUT, _HEADS)):
        return False
    if any(fnmatchcase(name, pattern) for pattern in _SIZES.get(_leaf(key), ()) for name in kept):
        return False
    return "." in key or _is_known(key, model)


def _is_known(key: str, model: nn.Module) -> bool:
    """Whether a configuration's class declares a key; a note that somebody left is none."""
    config: Any = model.config
    try:
        return key in type(config)().to_dict()
    except Exception:  # whatever a stranger's class does without arguments
        return True


def _is(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(_leaf(key), pattern) for pattern in patterns)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _values(key: str, first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    one, two = (_shown(settings.get(key, _ABSENT)) for settings in (first, other))
    return f"{one} and {two}"


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)[:60]


def _differ(
    what: str,
    where: str,
    keys: Sequence[str],
    first: Mapping[str, Any],
    other: Mapping[str, Any],
) -> ConfigurationError:
    shown = [f"{key} is {_values(key, first, other)}" for key in keys[:6]]
    more = [f"{len(keys) - 6} more"] if len(keys) > 6 else []
    return ConfigurationError(
        f"The models have {what} that differ",
        expected="the same settings, as the same weights compute something else with others",
        found="; ".join(shown + more),
        where=where,
        fix="Only models that were fine-tuned from the same one can be merged. If a configuration "
        "was altered by mistake, correct it.",
    )


def _check_adapters(first: nn.Module, other: nn.Module, where: str) -> None:
    """Factors of other ranks, scales or places are not factors of one product."""
    configs = [_adapters(model) for model in (first, other)]
    flat = [dict(_flat("", own)) for own in configs]
    odd = [key for key in _differing(*flat) if not _is(key, _OF_ADAPTER)]
    if odd:
        raise _differ("adapters", where, odd, *flat)
    bases = [key for key in _differing(*flat) if _leaf(key) == "base_model_name_or_path"]
    if bases and not _same_base(first, other):
        raise _differ("adapters of bases", where, bases, *flat)


def _adapters(model: nn.Module) -> dict[str, Any]:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return {}
    plain: dict[str, Any] = {}
    for name, config in configs.items():
        values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        plain[str(name)] = {
            key: sorted(map(str, value)) if isinstance(value, set | frozenset) else value
            for key, value in values.items()
        }
    return plain


def _same_base(first: nn.Module, other: nn.Module) -> bool:
    """Whether all that is no part of an adapter is equal, wherever it was loaded from."""
    states = [
        {n: t for n, t in read_state(model).items() if ".lora_" not in n and "modules_to" not in n}
        for model in (first, other)
    ]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(tensor.cpu(), states[1][name].cpu()) for name, tensor in states[0].items()
    )


def _check_classes(first: nn.Module, other: nn.Module, kept: Sequence[str], where: str) -> None:
    """A head cannot be merged if a class has one place in one model and another in another."""
    heads, own, classes = _heads_of(first, kept), _classes(first), _classes(other)
    moved = sorted(name for name, place in classes.items() if own.get(name, place) != place)
    if heads and moved:
        raise ConfigurationError(
            "The models have their classes in another order",
            expected="each class at the same place (id2label)",
            found="; ".join(f"{name} is {own[name]} and {classes[name]}" for name in moved[:5]),
            where=where,
            fix="Train one with the other's order, or keep the heads as each model's own: "
            f"--keep {heads[0].split('.')[0]}.*",
        )


def _heads_of(model: nn.Module, kept: Sequence[str]) -> list[str]:
    """Tensors outside of the body of a model that have an output per class, and are merged."""
    prefix, classes = getattr(model, "base_model_prefix", ""), len(_classes(model))
    return [
        name
        for name, tensor in read_state(model).items()
        if prefix and name not in kept and tensor.dim() and len(tensor) == classes
        and not name.removeprefix("base_model.model.").startswith(f"{prefix}.")
    ]  # fmt: skip


def _classes(model: nn.Module) -> dict[str, int]:
    """Place of each class by its name, however it is spelled in capitals."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    return {str(name).strip().casefold(): int(place) for place, name in labels.items()}
