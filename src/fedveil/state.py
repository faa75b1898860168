"""State dicts: a model's tensors by name, each tied tensor once."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fedveil.errors import ConfigurationError
from fedveil.ties import refuse_overlaps, tie_key

__all__ = [
    "StateDict",
    "architecture_of",
    "check_trainable",
    "copy_of",
    "fingerprint",
    "load_state",
    "read_state",
    "wipe",
    "with_state",
    "working_copy",
]

StateDict = dict[str, Tensor]


def read_state(model: nn.Module) -> StateDict:
    """A model's parameters and persistent buffers, tied tensors under their first name only.

    The tensors are the model's own (no copy); whoever keeps them copies them.
    """
    seen: set[object] = set()
    state: StateDict = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # Tied parameters are one tensor under two names; empty tensors all share address 0.
        key = tie_key(tensor)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        state[name] = tensor.detach()
    return state


def working_copy(state: Mapping[str, Tensor]) -> StateDict:
    """The server's copy: contiguous, floating-point tensors in float32 (or float64).

    Adding small updates to half-precision weights would lose them.
    """
    return {
        name: tensor.detach().to(
            _working_dtype(tensor.dtype), copy=True, memory_format=torch.contiguous_format
        )
        for name, tensor in state.items()
    }


@torch.no_grad()
def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into a model's tensors, cast to the model's own dtypes; ties stay tied."""
    own = read_state(model)
    for name, tensor in state.items():
        own[name].copy_(tensor)


@torch.no_grad()
def wipe(model: nn.Module) -> None:
    """Set every parameter and persistent buffer to zero: an architecture without its weights."""
    for tensor in read_state(model).values():
        tensor.zero_()


def architecture_of(
    model: nn.Module,
    device: torch.device | str | None = None,
    zero: Collection[str] | None = None,
) -> nn.Module:
    """A model of the same architecture whose parameters and persistent buffers are zero.

    The model's weights are never copied on the way, nor is what is computed from them and kept as
    an attribute, such as the weight of an old-style weight norm. Ties stay ties; buffers that are
    not saved, and everything else about the model, are copied.

    Args:
        model: Perhaps on the meta device itself: its tensors have no data then.
        device: Where the zeros are: the meta device for a model that takes no memory; each tensor's
            own by default.
        zero: Names of those tensors that are zero, as :func:`read_state` has them, if others are
            public and copied.
    """

    def make(name: str | None, tensor: Tensor) -> Tensor:
        if zero is None or name is None or name in zero:
            return torch.zeros_like(tensor, device=device or tensor.device)
        return tensor.to(device or tensor.device, copy=True)

    return _rebuilt(model, make)


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of a model that shares no memory with it. Ties stay ties, whichever way they are."""
    return _rebuilt(model, lambda _, tensor: tensor.clone())


def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A model of the same architecture around other tensors, named as :func:`read_state` does.

    It takes over every tensor that has the device, dtype and layout of the model's own, so that
    only the others are copied: whoever hands ``state`` in gives it away. What ``state`` lacks is
    copied from the model.
    """

    def take(name: str | None, own: Tensor) -> Tensor:
        if name is None or name not in state:
            return own.clone()
        given = state[name].detach()
        if given.stride() == own.stride() and given.shape == own.shape:
            return given.to(own.device, own.dtype)
        return torch.empty_like(own).copy_(given)

    built = _rebuilt(model, take)
    _derive(built)
    return built


@torch.no_grad()
def _rebuilt(model: nn.Module, make: Callable[[str | None, Tensor], Tensor]) -> nn.Module:
    """A copy of a model with ``make(name, tensor)`` in the place of each tensor of its state.

    The name is None for what is computed from such tensors, and stands in a module as an attribute.

    Raises:
        ConfigurationError: Two tensors share memory without being one: no copy could keep that; or
            the model cannot be copied.
    """
    refuse_overlaps(model)
    own = model.state_dict(keep_vars=True)
    made: dict[object, Tensor] = {}
    memo: dict[int, Tensor] = {}
    for name, tensor in own.items():
        key = tie_key(tensor) if tensor.numel() else name
        if key not in made:
            made[key] = _as(tensor, make(name, tensor.detach()))
        # Two parameters of one memory stay two, but on the meta device only one can tell of it.
        memo.setdefault(
            id(tensor), made[key] if made[key].is_meta else _as(tensor, made[key].detach())
        )
    for buffer in model.buffers():
        # One that is not saved may be a second name of a tensor that is.
        if id(buffer) not in memo and buffer.numel() and tie_key(buffer) in made:
            memo[id(buffer)] = made[tie_key(buffer)].detach()
    stores = {tensor.untyped_storage().data_ptr() for tensor in own.values() if tensor.numel()}
    for tensor, is_derived in _attributes(model):
        key = tie_key(tensor)
        if tensor.numel() and key in made:
            memo.setdefault(id(tensor), made[key].detach())
        elif is_derived or (tensor.numel() and tensor.untyped_storage().data_ptr() in stores):
            memo.setdefault(id(tensor), make(None, tensor.detach()))
    try:
        # What deepcopy finds in its memo it does not copy, wherever in the model it stands.
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ConfigurationError(
            "The model cannot be copied",
            expected="a model that copy.deepcopy can copy",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            where=type(model).__name__,
            fix="Take out of its modules what holds open files, threads, or tensors with a "
            "gradient.",
        ) from error


def _attributes(model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """Tensors that stand in modules as plain attributes, and whether they are computed of others:
    by a hook, or with a gradient, which nothing that can be copied has.
    """
    for module in model.modules():
        derived = {name for name, _ in _derivations(module)}
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield value, name in derived or not value.is_leaf


@torch.no_grad()
def _derive(model: nn.Module) -> None:
    """Compute anew what hooks keep as attributes, as a forward pass would."""
    for module in model.modules():
        for name, compute in _derivations(module):
            setattr(module, name, compute(module))


def _derivations(module: nn.Module) -> Iterator[tuple[str, Callable[[nn.Module], Tensor]]]:
    """What old-style norms and pruning compute of a module's tensors, by the attribute's name."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield hook.name, hook.compute_weight
        elif isinstance(hook, SpectralNorm):
            yield hook.name, partial(hook.compute_weight, do_power_iteration=False)
        elif isinstance(hook, BasePruningMethod):
            yield hook._tensor_name, hook.apply_mask


def _as(like: Tensor, tensor: Tensor) -> Tensor:
    """A parameter, if the other one is."""
    parameter = isinstance(like, nn.Parameter)
    return nn.Parameter(tensor, like.requires_grad) if parameter else tensor


def fingerprint(model: nn.Module) -> str:
    """A digest of a model: names, shapes, dtypes and weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in read_state(model).items():
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        raw = tensor.detach().cpu().contiguous().flatten()
        digest.update(raw.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_trainable(state: Mapping[str, Tensor]) -> None:
    """Refuse a model that cannot be fine-tuned as it is.

    Raises:
        ConfigurationError: If a weight is NaN or infinite, if a tensor is on the meta device, or if
            there is no floating-point tensor at all.
    """
    if not any(tensor.is_floating_point() for tensor in state.values()):
        raise ConfigurationError("The model has no floating-point tensors to fine-tune")
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ConfigurationError(
                "A tensor has no data", where=name, fix="Load the model off the meta device."
            )
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise ConfigurationError(
                "A weight is NaN or infinite", where=name, fix="Start from an intact model."
            )


def _is_finite(tensor: Tensor) -> bool:
    # Both extremes are NaN if anything is; a mask of the finite ones would be a copy of its own.
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # nothing is computed of 8-bit floats
    return not tensor.numel() or all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist()))


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
