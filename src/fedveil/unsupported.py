"""Models that cannot take part as they are, and what to do about each kind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import Buffer, UninitializedBuffer, UninitializedParameter

from fedveil.errors import ConfigurationError

__all__ = ["check_supported", "refuse_foreign_state"]

_PLAIN = (Tensor, nn.Parameter, Buffer)

_WRAPPERS = {
    "OptimizedModule": ("compiled", "_orig_mod"),
    "DataParallel": ("wrapped to run on several devices", "module"),
    "DistributedDataParallel": ("wrapped to run on several devices", "module"),
    "FullyShardedDataParallel": ("wrapped to run on several devices", "module"),
}
"""By class: in words, and the attribute that holds the model itself. By name, as importing some of
these classes takes seconds."""

_NOT_SENT = (torch.complex32, torch.complex64, torch.complex128, torch.uint64)


def check_supported(model: nn.Module, sent: Callable[[nn.Module], Collection[str]]) -> None:
    """Refuse a model that would fail later, or would be trained otherwise than it seems.

    Args:
        model: Of the owner. It is not changed.
        sent: Finds the names of the tensors that clients are sent, as
            :meth:`fedveil.schemes.Scheme.tensors` does.

    Raises:
        ConfigurationError: It says what is in the way, and what to do.
    """
    for name, module in model.named_modules():
        _check_module(name or "the model", module)
    _check_hidden(model)
    for name, tensor in _tensors(model):
        _check_kind(name, tensor)
    names = sent(model)
    for name, tensor in _tensors(model):
        _check_type(name, tensor, is_sent=name in names)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, also those that are not saved."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _check_module(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if kind in _WRAPPERS:
        words, inner = _WRAPPERS[kind]
        raise ConfigurationError(
            f"A model that is {words} has other names for its tensors than the model itself",
            expected="the model itself",
            found=kind,
            where=name,
            fix=f"Hand over its attribute {inner!r}.",
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ConfigurationError(
            "A model of TorchScript cannot be copied without its weights",
            expected="an nn.Module of Python",
            found=kind,
            where=name,
            fix="Hand over the model that the script was made of.",
        )
    if getattr(module, "is_quantized", False) is True:
        raise _quantized(name, kind)
    if any(cls.__module__.startswith("peft.") for cls in type(module).__mro__):
        _check_adapter(name, module)


def _check_hidden(model: nn.Module) -> None:
    """Refuse layers that PyTorch does not see: nobody trains them, and a copy would hold them."""
    registered = set(model.modules())
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else value
            # What begins with "_" is PyTorch's own.
            if attribute.startswith("_") or not isinstance(value, dict | list | tuple):
                continue
            for layer in held:
                if isinstance(layer, nn.Module) and layer not in registered:
                    raise ConfigurationError(
                        "Layers in a plain list or dictionary are no part of the model",
                        expected="nn.ModuleList, nn.ModuleDict, or attributes of their own",
                        found=type(layer).__name__,
                        where=f"{name}.{attribute}".lstrip("."),
                        fix="Hold them in nn.ModuleList or nn.ModuleDict, or take them out of the "
                        "model: they would be neither trained nor sent, and copied to clients.",
                    )


def _check_adapter(name: str, layer: nn.Module) -> None:
    """Refuse adapters that the model does not compute with: nothing would be trained."""
    merged = getattr(layer, "merged", False) is True
    if merged or getattr(layer, "disable_adapters", False) is True:
        raise ConfigurationError(
            "The model has adapters that it does not compute with, so that they cannot be trained",
            expected="adapters that are in use",
            found="adapters that are merged" if merged else "adapters that are disabled",
            where=name,
            fix="With PEFT: unmerge_adapter(), or merge_and_unload() for a model without them."
            if merged
            else "With PEFT: base_model.enable_adapter_layers(), or unload() for a model without "
            "them. With transformers' own: enable_adapters().",
        )


def _check_kind(name: str, tensor: Tensor) -> None:
    """Refuse what is no ordinary tensor."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        raise ConfigurationError(
            "A lazy layer does not know its shape yet",
            expected="parameters with shapes",
            found=type(tensor).__name__,
            where=name,
            fix="Run one batch through the model first.",
        )
    if tensor.is_meta:
        raise ConfigurationError(
            "A tensor has no data", where=name, fix="Load the model off the meta device."
        )
    integer = isinstance(tensor, nn.Parameter) and not (
        tensor.is_floating_point() or tensor.is_complex()
    )
    if integer or tensor.is_quantized or type(tensor) not in _PLAIN:
        plain = type(tensor) in _PLAIN
        other = (
            "Numbers that are no weights are a buffer: register_buffer."
            if plain
            else f"If it is not quantized: hold a plain tensor in the place of {type(tensor)}."
        )
        found = str(tensor.dtype) if plain else type(tensor).__name__
        raise _quantized(name, found, other)
    if tensor.layout is not torch.strided:
        raise ConfigurationError(
            "A tensor is sparse", expected="a dense one", found=str(tensor.layout), where=name,
            fix="Call its to_dense().",
        )  # fmt: skip


def _check_type(name: str, tensor: Tensor, *, is_sent: bool) -> None:
    """Refuse numbers that cannot be trained, or not sent."""
    if tensor.is_floating_point() and tensor.itemsize < 2:
        raise ConfigurationError(
            "Floats of 8 bits can be neither trained nor sent",
            expected="float32 or bfloat16",
            found=str(tensor.dtype),
            where=name,
            fix="Convert it: tensor.bfloat16().",
        )
    trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
    if tensor.dtype in _NOT_SENT and (is_sent or trained):
        real = "Hold its real view: torch.view_as_real(tensor)." if tensor.is_complex() else ""
        raise ConfigurationError(
            "Tensors of this type are not sent",
            expected="real numbers",
            found=str(tensor.dtype),
            where=name,
            fix=real or "Convert it to int64.",
        )


def refuse_foreign_state(model: nn.Module) -> None:
    """Refuse a state dict that is not the model's parameters and buffers, all of them.

    What a state leaves out is in no message, and would be copied to clients as it is.

    Raises:
        ConfigurationError: It names what is neither, or what is missing.
    """
    own = dict(_tensors(model))
    for name, value in model.state_dict(keep_vars=True).items():
        if own.get(name) is not value:
            raise ConfigurationError(
                "The model's state holds what is neither a parameter nor a buffer",
                expected="tensors that are parameters or buffers",
                found=f"{type(value).__name__}, as get_extra_state or a hook of state_dict gives",
                where=name,
                fix="Make it a buffer (register_buffer), or an attribute that is not in the state.",
            )
    held = {id(value) for value in model.state_dict(keep_vars=True).values()}
    for name, tensor in _saved(model):
        if id(tensor) not in held:
            raise ConfigurationError(
                "The model's state leaves out one of its tensors, which would not travel",
                expected="a state dict with all parameters and buffers in it",
                found="none of this name",
                where=name,
                fix="Do not change state_dict(). A buffer that is nobody's secret and need not "
                "travel is register_buffer(..., persistent=False).",
            )


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and buffers that are to be saved."""
    yield from model.named_parameters(remove_duplicate=False)
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), buffer


def _quantized(name: str, found: str, other: str = "") -> ConfigurationError:
    problem = "A model whose weights are quantized already cannot take part"
    return ConfigurationError(
        problem if not other else f"{problem}, nor one with parameters that are no real numbers",
        expected="float32 or bfloat16",
        found=found.removeprefix("torch."),
        where=name,
        fix="Load it without quantization (no quantization_config), or dequantize it: schemes "
        f"quantize what they send by themselves. {other}".strip(),
    )
