"""What several models have in common, and what stays each model's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError
from fedveil.state import StateDict, check_trainable, read_state
from fedveil.ties import refuse_overlaps, tied_names

__all__ = ["Common", "in_common", "uncompiled", "widened"]

# Where torch.compile keeps what it was given.
_COMPILED = "_orig_mod"

# A counter that batch norm keeps for itself; no output depends on it as a rule.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Common:
    """Which tensors of some models are merged. A tied tensor goes by its first name.

    Attributes:
        merged: Floating-point tensors that all models have, in the same shape.
        kept: Tensors that stay each model's own, of whichever model: not all models have them in
            the same shape, or a pattern asks for it.
    """

    merged: tuple[str, ...]
    kept: tuple[str, ...]


def in_common(models: Sequence[nn.Module], keep: Sequence[str] = ()) -> Common:
    """Decide for each tensor whether it is merged.

    Args:
        models: At least two.
        keep: Patterns (as in the shell, case-sensitive) of tensors to keep as each model's own. A
            tied tensor is kept if any of its names matches.

    Raises:
        ConfigurationError: The models have little in common, tie different tensors, hold integers
            that differ, or a weight that is NaN or infinite; or a pattern matches nothing.
    """
    states = _read_all(models)
    models = [uncompiled(model) for model in models]
    _check_compiled(states)
    _check_ties(models)
    asked = _matching(models, keep)
    merged, kept = [], []
    for name in dict.fromkeys(name for state in states for name in state):
        tensors = [state[name] for state in states if name in state]
        if name in asked or len(tensors) < len(models) or not _alike(tensors):
            kept.append(name)
        elif tensors[0].is_floating_point():
            merged.append(name)
        else:
            _check_equal(name, tensors)
    _check_enough(states, merged, asked)
    return Common(tuple(merged), tuple(kept))


def _read_all(models: Sequence[nn.Module]) -> list[StateDict]:
    if isinstance(models, nn.Module) or len(models) < 2:
        found = "1 model" if isinstance(models, nn.Module) else str(len(models))
        raise ConfigurationError("There is nothing to merge", expected="2 models", found=found)
    states = []
    for number, model in enumerate(models, start=1):
        if not isinstance(model, nn.Module):
            raise ConfigurationError(
                "This is not a model",
                expected="torch.nn.Module",
                found=type(model).__name__,
                where=f"model {number}",
            )
        states.append(read_state(uncompiled(model)))
        try:
            refuse_overlaps(model)
            check_trainable(states[-1])
        except ConfigurationError as error:
            raise error.within(f"model {number}") from error
    return states


def uncompiled(model: nn.Module) -> nn.Module:
    """What a model was compiled from: the same tensors, by the names that they had."""
    inner = getattr(model, _COMPILED, model)
    return inner if isinstance(inner, nn.Module) else model


def widened(tensor: Tensor) -> Tensor:
    """Floating-point numbers on the CPU, in which sums of them lose nothing: float32 or float64."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.cpu().to(wide)


def _check_compiled(states: Sequence[StateDict]) -> None:
    """A part that was compiled in some models only has other names there."""
    names = [{name.replace(f"{_COMPILED}.", "") for name in state} for state in states]
    for number, (state, plain) in enumerate(zip(states[1:], names[1:], strict=True), start=2):
        if state.keys() != states[0].keys() and plain == names[0]:
            odd = min(state.keys() ^ states[0].keys())
            raise ConfigurationError(
                "A part of one model is compiled, and that of another is not",
                expected=f"the names of model 1 in model {number}",
                found=f"{_COMPILED} in names",
                where=odd,
                fix=f"Put back what it was compiled from: model.part = model.part.{_COMPILED}",
            )


def _alike(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    return all(
        t.shape == first.shape and t.is_floating_point() == first.is_floating_point()
        for t in tensors[1:]
    )


def _check_equal(name: str, tensors: Sequence[Tensor]) -> None:
    first = tensors[0].cpu()
    if name.endswith(_COUNTER) or all(torch.equal(first, t.cpu()) for t in tensors[1:]):
        return
    raise ConfigurationError(
        "Integers cannot be merged, and the models hold different ones",
        expected="the same values in all models",
        found=f"different {first.dtype}".replace("torch.", ""),
        where=name,
        fix="If they are quantized weights, load the models in full precision; if each model needs "
        f"its own, keep them: {name!r}.",
    )


def _check_enough(states: Sequence[StateDict], merged: Iterable[str], asked: Iterable[str]) -> None:
    """Models that share little by chance (a bias, a norm) were not fine-tuned from the same one."""
    shared = sum(states[0][name].numel() for name in merged)
    whole = min(_count(state, set(asked)) for state in states)
    if shared and 2 * shared >= whole:
        return
    raise ConfigurationError(
        "The models have too little in common to be merged",
        expected=f"names and shapes alike for at least half of {whole:,} numbers",
        found=f"{shared:,}",
        fix="Only models that were fine-tuned from the same one can be merged. Leave tensors that "
        "each must keep (a resized embedding) out of this count by naming them in `keep`.",
    )


def _count(state: StateDict, without: set[str]) -> int:
    return sum(
        t.numel() for name, t in state.items() if t.is_floating_point() and name not in without
    )


def _ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    return tied_names(model.state_dict(keep_vars=True))


def _check_ties(models: Sequence[nn.Module]) -> None:
    shapes = [{n: t.shape for n, t in model.state_dict().items()} for model in models]
    common = {n for n, s in shapes[0].items() if all(other.get(n) == s for other in shapes[1:])}
    first, *others = (
        {name: frozenset(group) & common for name, group in _ties(model).items() if name in common}
        for model in models
    )
    for number, ties in enumerate(others, start=2):
        odd = sorted(name for name in common if ties[name] != first[name])
        if odd:
            raise ConfigurationError(
                "The models tie different tensors",
                expected=_tie(odd[0], first),
                found=f"{_tie(odd[0], ties)} in model {number}",
                where=odd[0],
                fix="Load all with the same setting for tied weights (tie_word_embeddings).",
            )


def _tie(name: str, ties: Mapping[str, frozenset[str]]) -> str:
    others = sorted(ties[name] - {name})
    return f"tied to {', '.join(others)}" if others else "not tied"


def _matching(models: Sequence[nn.Module], keep: Sequence[str]) -> set[str]:
    if isinstance(keep, str) or not all(isinstance(pattern, str) for pattern in keep):
        # A lone string would be taken apart into one pattern per letter.
        raise ConfigurationError(
            "keep is impossible", expected='patterns, such as ("classifier.*",)', found=repr(keep)
        )
    aliases = [_ties(model) for model in models]
    kept: set[str] = set()
    for pattern in keep:
        matching = {
            alias
            for groups in aliases
            for name, group in groups.items()
            if fnmatchcase(name, pattern)
            for alias in group
        }
        if not matching:
            names = ", ".join([*aliases[0]][-3:])
            raise ConfigurationError(
                "A pattern of what to keep matches no tensor",
                expected=f"a pattern for names such as {names}",
                found=repr(pattern),
            )
        kept |= matching
    return kept
