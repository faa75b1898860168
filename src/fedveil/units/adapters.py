"""What PEFT puts on, around and beside a layer that is cut: cut with it, or refused by name.

An adapter may hold something of every unit of its layer: a row of LoRA's B, a factor of IA3, the
norm that DoRA learns. Only what this file knows is cut. Everything else of PEFT that touches a cut
layer is an error, and so is an adapter that a later PEFT brings; on layers that no unit cuts any
adapter may stay. PEFT is known by the names of its classes, since the core does not import it.

    on a cut layer                                      cut
    LoRA of a Linear, Conv1D or Conv layer              rows of B where units are computed, columns
                                                        of A where they are read
    LoRA of an Embedding                                rows of lora_embedding_B
    modules_to_save                                     every copy of the layer, like the layer

A unit without its row of B and its column of A has no part in B A x, so that zeros there are the
same as its absence. The rest of A and B belongs to all units together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from fedveil.errors import ConfigurationError
from fedveil.units.group import Slice
from fedveil.units.layers import bare_slices, input_slice, output_slices, tensors_of, unit_width

__all__ = [
    "cut_inputs",
    "cut_outputs",
    "is_adapted",
    "is_idle",
    "plain_layer",
    "refuse_hidden",
    "refuse_prompts",
]

Modules = Mapping[str, nn.Module]
State = Mapping[str, Tensor]

_LORA = tuple(
    f"peft.tuners.lora.layer.{layer}"
    for layer in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")
)
_COPIES = "peft.utils.other.ModulesToSaveWrapper"
_LORA_TENSORS: Mapping[str, tuple[str, ...]] = {
    "lora_A": ("weight",),
    "lora_B": ("weight", "bias"),
    "lora_embedding_A": ("",),
    "lora_embedding_B": ("",),
}
"""What plain LoRA holds: by its attribute, the names of the tensors of each adapter in it."""
_TUNERS = ("peft.tuners.tuners_utils.BaseTuner",
           "peft.tuners.adaption_prompt.model.AdaptionPromptModel",
           "peft.peft_model.PeftModel",
           "peft.mixed_model.PeftMixedModel")  # fmt: skip
"""Classes that hold a whole model, and change nothing but the layers that they wrap."""
_MODELS = ("base_model", "model", "lora_model")
"""Where those have that model ..."""
_LORA_TUNERS = ("peft.tuners.lora.model.LoraModel", "peft.tuners.mixed.model.MixedModel")
"""... and which of them leave a layer with LoRA its own forward. X-LoRA does not."""
_INPUT_PROMPTS = ("PromptEmbedding", "PromptEncoder", "MultitaskPromptEmbedding", "CPTEmbedding")
"""Prompts that stand before the words, and have nothing in attention heads."""


def cut_outputs(
    name: str, modules: Modules, state: State, size: int, fused: int | Sequence[int] = 1
) -> tuple[Slice, ...]:
    """Slices for all that a layer, and an adapter on it, hold per output position.

    Args:
        name: the layer as it is named without adapters, or a bare parameter.
        modules: all modules of the model by name.
        state: the model's state_dict.
        size: the number of units; the output axis holds `fused` runs of them.
        fused: the number of equal parts of the output axis, or their sizes next to each other.

    Raises:
        ConfigurationError: the layer has an adapter that is not known to be cut right, or a layout
            that is not known, or its axis does not fall into `size` units.
    """
    layers, beside = _taken_apart(_outermost(name, modules), modules, state)
    slices = [
        cut
        for layer in layers
        for cut in output_slices(layer, modules.get(layer), state, size, fused)
    ]
    for key in beside:
        if _part(key) in ("lora_B", "lora_embedding_B"):
            slices += bare_slices(key, 0, state, size, fused)
    return tuple(slices)


def cut_inputs(name: str, modules: Modules, state: State, size: int) -> tuple[Slice, ...]:
    """Slices for all that a layer, and an adapter on it, hold per input position.

    Args and errors are those of `cut_outputs`.
    """
    layers, beside = _taken_apart(_outermost(name, modules), modules, state)
    reads = [input_slice(layer, modules.get(layer), state, size) for layer in layers]
    for key in (key for key in beside if _part(key) == "lora_A"):
        reads.append(Slice(key, 1, unit_width(key, state[key], 1, size), scaled=True))
    return tuple(reads)


def plain_layer(name: str, modules: Modules, state: State) -> str:
    """The name of the layer itself, below adapters that are known.

    Raises:
        ConfigurationError: the layer has an adapter that is not known to be cut right.
    """
    return _taken_apart(_outermost(name, modules), modules, state)[0][0]


def is_adapted(name: str, modules: Modules) -> bool:
    """Whether a layer is, or is below, what PEFT has put in a layer's place."""
    return _outermost(name, modules) != name or _is_adapter(modules.get(name))


def is_idle(tensor: str, modules: Modules) -> bool:
    """Whether a tensor is of an adapter or a copy that PEFT holds, and does not use now."""
    for above in _above(tensor):
        module = modules.get(above)
        if module is not None and _is_adapter(module):
            active = getattr(module, "active_adapters", [])
            part, _, rest = tensor.removeprefix(f"{above}.").partition(".")
            if part == "original_module":
                return bool(active)
            if part in ("modules_to_save", *_LORA_TENSORS) and rest.split(".")[0] not in active:
                return True
    return False


def refuse_hidden(block: str, output: str, modules: Modules) -> None:
    """Refuse an adapter that stands between a block and the layer that a rule names in it.

    Raises:
        ConfigurationError: there is one. The rule would find no layer behind it, and the block
            would be left whole without a word.
    """
    steps = output.split(".")[:-1]
    for count in range(len(steps) + 1):
        name = ".".join([block, *steps[:count]])
        module = modules.get(name)
        if module is not None and _is_adapter(module):
            raise _refused(name, module)


def refuse_prompts(kind: str, slices: Sequence[Slice], modules: Modules) -> None:
    """Refuse trained prompts that hold something of the units of a group.

    A prefix is keys and values of every attention head; a prompt may begin as a copy of words'
    embeddings.

    Raises:
        ConfigurationError: the group is of heads and there is a prefix, or it cuts an embedding
            and there is a prompt.
    """
    owners = (modules.get(cut.tensor.rpartition(".")[0]) for cut in slices)
    embeds = any(isinstance(owner, nn.Embedding) for owner in owners)
    for name, prompt in _prompts(modules):
        if embeds or (kind == "heads" and type(prompt).__name__ not in _INPUT_PROMPTS):
            raise _refused(name, prompt)


def _taken_apart(name: str, modules: Modules, state: State) -> tuple[list[str], list[str]]:
    """The plain layers that a layer's name stands for, and the tensors of LoRA beside them."""
    module = modules.get(name)
    if module is None or not _is_peft(module):
        return [name], []
    if _full_name(module) == _COPIES:
        return _copies(name, module, modules, state)
    if _full_name(module) not in _LORA:
        raise _refused(name, module)
    if variant := _variant(name, module, modules):
        raise _refused(name, module, variant)
    layers, beside = _taken_apart(f"{name}.base_layer", modules, state)
    for leaf in tensors_of(name, state):
        if not leaf.startswith("base_layer."):
            part, _, rest = leaf.partition(".")
            if rest.partition(".")[2] not in _LORA_TENSORS.get(part, ()):
                raise _refused(name, module, part)
            beside.append(f"{name}.{leaf}")
    return layers, beside


def _copies(
    name: str, module: nn.Module, modules: Modules, state: State
) -> tuple[list[str], list[str]]:
    """The same for a layer of which PEFT trains a copy for each adapter."""
    trained = f"{name}.modules_to_save"
    copies = [f"{name}.original_module"]
    copies += [f"{trained}.{copy}" for copy, _ in modules[trained].named_children()]
    known = tuple(f"{copy.removeprefix(f'{name}.')}." for copy in copies)
    if not all(leaf.startswith(known) for leaf in tensors_of(name, state)):
        raise _refused(name, module)
    layers, beside = list[str](), list[str]()
    for copy in copies:
        below = _taken_apart(copy, modules, state)
        layers += below[0]
        beside += below[1]
    return layers, beside


def _variant(name: str, module: nn.Module, modules: Modules) -> str:
    """What makes a LoRA layer something else than B A x; "" if nothing does."""
    if isinstance(variants := getattr(module, "lora_variant", None), dict) and variants:
        # DoraLinearVariant of PEFT is what its users call DoRA.
        names = {type(variant).__name__ for variant in variants.values()}
        return " and ".join(sorted("DoRA" if n.startswith("Dora") else n for n in names))
    if any(getattr(module, "use_dora", {}).values()):
        return "DoRA"
    tuners = (modules[above] for above in _above(name) if _is_a(modules[above], _TUNERS[:1]))
    return next((_label(tuner) for tuner in tuners if _full_name(tuner) not in _LORA_TUNERS), "")


def _outermost(name: str, modules: Modules) -> str:
    """The name of what PEFT has put around a layer, which a rule may name by its inner parts.

    Raises:
        ConfigurationError: the layer is of a network that PEFT has put beside the model, and which
            may hold copies of the model's own layers.
    """
    for above in _above(name):
        beside = name.removeprefix(f"{above}." if above else "").partition(".")[0]
        if _is_a(modules[above], _TUNERS) and beside not in _MODELS:
            raise _refused(name, modules[above])
    return next((above for above in _above(name) if _is_adapter(modules.get(above))), name)


def _is_adapter(module: nn.Module | None) -> bool:
    """Whether a module is of PEFT, and more than what holds a whole model."""
    return module is not None and _is_peft(module) and not _is_a(module, _TUNERS)


def _prompts(modules: Modules) -> Iterator[tuple[str, nn.Module]]:
    """What PEFT learns in the place of a prompt, by name."""
    for name, module in modules.items():
        if name.rpartition(".")[0].rpartition(".")[2] == "prompt_encoder" and _is_peft(module):
            yield name, module


def _above(name: str) -> list[str]:
    """The names of all modules around another, the outermost first; "" is the model."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def _part(key: str) -> str:
    """Which attribute of a LoRA layer a tensor is in."""
    return next((part for part in reversed(key.split(".")) if part in _LORA_TENSORS), "")


def _is_peft(module: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "peft" for cls in type(module).__mro__)


def _is_a(module: nn.Module, classes: tuple[str, ...]) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" in classes for cls in type(module).__mro__)


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _label(module: nn.Module) -> str:
    """What users of PEFT call the kind of adapter that a module is part of."""
    folder = _full_name(module).removeprefix("peft.tuners.").partition(".")[0]
    return _LABELS.get(folder, type(module).__name__ if folder == "peft" else folder)


def _refused(name: str, module: nn.Module, adapter: str = "") -> ConfigurationError:
    return ConfigurationError(
        "units are withheld of a layer that has an adapter of a kind that cannot be cut",
        expected="plain LoRA on it, or none",
        found=f"{adapter or _label(module)} ({_full_name(module)})",
        where=name,
        fix="Use peft.LoraConfig without variants, leave the layer out of target_modules, choose "
        "units that do not cut it, or merge the adapter first with merge_and_unload().",
    )


_LABELS = {
    "adalora": "AdaLoRA", "ia3": "IA3", "vera": "VeRA", "loha": "LoHa", "lokr": "LoKr",
    "oft": "OFT", "boft": "BOFT", "hra": "HRA", "vblora": "VB-LoRA", "fourierft": "FourierFT",
    "lora": "LoRA", "miss": "MiSS", "ln_tuning": "LN tuning", "prefix_tuning": "prefix tuning",
    "prompt_tuning": "prompt tuning", "p_tuning": "p-tuning", "xlora": "X-LoRA",
    "adaption_prompt": "adaption prompt", "trainable_tokens": "trainable tokens",
}  # fmt: skip
"""How the users of PEFT write what it calls by the name of a folder; others go by that name."""
