"""Zeros in all slices of a unit equal the network that never had it, for every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from units_families import FAMILIES, WIDTH, Family, randomise
from units_removal import (
    Scatter,
    WideNorm,
    drop_heads,
    drop_inputs,
    drop_outputs,
    masks,
    others,
    plain_state,
    replace_module,
    scatter_outputs,
    zeroed,
)

from fedveil.units import find_units

HIDDEN_UNITS = {"heads": [1], "neurons": [0, 3], "columns": [1, 2]}

every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: randomise(family.build()) for name, family in FAMILIES.items()}


def run(model: nn.Module, family: Family) -> Tensor:
    with torch.no_grad():
        return model(**family.inputs()).logits


def without_neurons(model: nn.Module, family: Family) -> nn.Module:
    """The model without the hidden heads and neurons, which are deleted by hand."""
    model = copy.deepcopy(model)
    for block in family.blocks(model):
        for outputs, reader in family.heads(block):
            drop_heads(outputs, reader, family.units, HIDDEN_UNITS["heads"])
        for outputs, reader in family.mlp(block):
            for layer in outputs:
                length = layer.weight.shape[1 if type(layer).__name__ == "Conv1D" else 0]
                keep = others(length, HIDDEN_UNITS["neurons"])
                drop_outputs(layer, keep)
            drop_inputs(reader, keep)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if type(module).__name__ == "GPT2Attention":
            module.split_size = module.c_attn.nf // 3
        if type(module).__name__ == "T5Attention":
            module.n_heads -= len(HIDDEN_UNITS["heads"])
            if module.has_relative_attention_bias:
                # Shared by all blocks: only a model that drops head h everywhere may drop it too.
                shared = module.relative_attention_bias
                drop_outputs(shared, others(family.units, HIDDEN_UNITS["heads"]))
    return model


def without_columns(model: nn.Module, family: Family) -> nn.Module:
    """The model whose layers do not compute the hidden columns; the stream reads zeros there."""
    model, hidden = copy.deepcopy(model), HIDDEN_UNITS["columns"]
    for block in family.blocks(model):
        for _, layer in [*family.heads(block), *family.mlp(block)]:
            scatter_outputs(model, layer, hidden)
    if family.embedding is not None:
        _drop_embedding(model, family.embedding(model), hidden)
    return model


def _drop_embedding(model: nn.Module, layer: Any, hidden: list[int]) -> None:
    if isinstance(layer, nn.Embedding):
        scatter_outputs(model, layer, hidden)
    elif hasattr(layer, "cls_token"):
        keep = others(WIDTH, hidden)
        drop_outputs(layer.patch_embeddings.projection, keep)
        for name in ("cls_token", "position_embeddings"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[..., keep]))
        replace_module(model, layer, Scatter(layer, keep, WIDTH))
    else:
        norm, width = layer.LayerNorm, len(layer.LayerNorm.weight)
        keep = others(width, hidden)
        layer.LayerNorm = Scatter(WideNorm(norm, keep), keep, width)
        for child in list(layer.children()):
            if isinstance(child, nn.Embedding):
                scatter_outputs(layer, child, hidden)


REMOVALS = {"neurons": without_neurons, "columns": without_columns}
every_choice = pytest.mark.parametrize("choice", REMOVALS)


@every_family
@every_choice
def test_zeros_equal_a_network_without_the_units(
    models: dict[str, nn.Module], name: str, choice: str
) -> None:
    model, family = models[name], FAMILIES[name]
    covered = masks(find_units(model, choice), model.state_dict(), HIDDEN_UNITS)
    hidden = run(zeroed(model, covered), family)
    torch.testing.assert_close(
        hidden, run(REMOVALS[choice](model, family), family), rtol=1e-5, atol=1e-5
    )
    assert (hidden - run(model, family)).abs().max() > 1e-3


@every_family
@every_choice
def test_slices_cover_exactly_what_is_removed(
    models: dict[str, nn.Module], name: str, choice: str
) -> None:
    model = models[name]
    covered = masks(find_units(model, choice), model.state_dict(), HIDDEN_UNITS)
    removed = plain_state(REMOVALS[choice](model, FAMILIES[name]))
    for tensor, whole in model.state_dict().items():
        if "relative_attention_bias" not in tensor:  # see without_neurons
            assert torch.equal(whole[~covered[tensor]], removed[tensor].flatten()), tensor


@every_family
@every_choice
def test_nothing_about_a_hidden_unit_remains(
    models: dict[str, nn.Module], name: str, choice: str
) -> None:
    model, family = models[name], FAMILIES[name]
    covered = masks(find_units(model, choice), model.state_dict(), HIDDEN_UNITS)
    garbled = zeroed(model, covered, value=7.0)
    removal = REMOVALS[choice]
    torch.testing.assert_close(
        run(removal(garbled, family), family), run(removal(model, family), family)
    )


@every_family
def test_scaled_slices_multiply_a_neuron_or_head_once(
    models: dict[str, nn.Module], name: str
) -> None:
    model, family = models[name], FAMILIES[name]
    scaled, factors = _scaled(model, "neurons")

    def scale_input(count: int, kind: str):
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            width = args[0].shape[-1] // count
            return (args[0] * factors[kind, count].repeat_interleave(width),)

        return hook

    hooked = copy.deepcopy(model)
    for block in family.blocks(hooked):
        for _, reader in family.heads(block):
            reader.register_forward_pre_hook(scale_input(family.units, "heads"))
        for outputs, reader in family.mlp(block):
            size = outputs[0].weight.shape[1 if type(reader).__name__ == "Conv1D" else 0]
            reader.register_forward_pre_hook(scale_input(size, "neurons"))
    torch.testing.assert_close(run(scaled, family), run(hooked, family), rtol=1e-4, atol=1e-5)


@every_family
def test_scaled_slices_multiply_a_column_once(models: dict[str, nn.Module], name: str) -> None:
    model, family = models[name], FAMILIES[name]
    scaled, factors = _scaled(model, "columns")

    def scale_output(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output * factors["columns", output.shape[-1]]

    hooked = copy.deepcopy(model)
    sites = [
        layer for b in family.blocks(hooked) for _, layer in [*family.heads(b), *family.mlp(b)]
    ]
    sites += [family.embedding(hooked)] if family.embedding else []
    for site in sites:
        site.register_forward_hook(scale_output)
    torch.testing.assert_close(run(scaled, family), run(hooked, family), rtol=1e-4, atol=1e-5)


def _scaled(model: nn.Module, choice: str) -> tuple[nn.Module, dict[tuple[str, int], Tensor]]:
    """A copy with all scaled slices multiplied, by one factor per kind, size and unit."""
    model = copy.deepcopy(model)
    state, factors = model.state_dict(), {}
    for group in find_units(model, choice):
        key = (group.kind, group.size)
        factors.setdefault(key, torch.linspace(0.5, 2.0, group.size))
        for cut in group.slices:
            if cut.scaled:
                shape = [1] * state[cut.tensor].dim()
                shape[cut.axis] = -1
                state[cut.tensor].mul_(factors[key].repeat_interleave(cut.width).view(shape))
    return model, factors


@every_family
@pytest.mark.parametrize("choice", ["columns", "neurons", "mlp"])
def test_heads_and_tied_embeddings_are_never_cut(
    models: dict[str, nn.Module], name: str, choice: str
) -> None:
    groups = find_units(models[name], choice)
    tensors = {cut.tensor for group in groups for cut in group.slices}
    forbidden = ("lm_head", "classifier", "score", "pooler", "cls.")
    assert not [tensor for tensor in tensors if tensor.startswith(forbidden)]
    if choice != "columns" or FAMILIES[name].embedding is None:
        assert not [t for t in tensors if "embed" in t or "wte" in t or "shared" in t]


@every_family
def test_groups_are_in_model_order_with_unique_names(
    models: dict[str, nn.Module], name: str
) -> None:
    model = models[name]
    order = list(model.state_dict())
    for choice in ("columns", "neurons", "mlp"):
        groups = find_units(model, choice)
        firsts = [order.index(group.slices[0].tensor) for group in groups]
        assert firsts == sorted(firsts)
        assert len({group.name for group in groups}) == len(groups)
        assert groups == find_units(copy.deepcopy(model), choice)


def test_mlp_is_neurons_without_heads(models: dict[str, nn.Module]) -> None:
    groups = find_units(models["bert"], "neurons")
    assert {group.kind for group in groups} == {"neurons", "heads"}
    assert find_units(models["bert"], "mlp") == tuple(g for g in groups if g.kind != "heads")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "gpt2-lm", "llama", "t5"])
def test_half_precision_has_the_same_units(
    models: dict[str, nn.Module], name: str, dtype: torch.dtype
) -> None:
    half = copy.deepcopy(models[name]).to(dtype)
    for choice in ("columns", "neurons"):
        groups = find_units(half, choice)
        assert groups == find_units(models[name], choice)
    covered = masks(groups, half.state_dict(), HIDDEN_UNITS)
    family = FAMILIES[name]
    hidden, removed = zeroed(half, covered), without_neurons(half, family)
    assert all(
        torch.equal(tensor[~covered[key]], removed.state_dict()[key].flatten())
        for key, tensor in hidden.state_dict().items()
        if "relative_attention_bias" not in key
    )


def test_grouped_query_heads_take_all_their_queries(models: dict[str, nn.Module]) -> None:
    heads = next(g for g in find_units(models["qwen3"]) if g.kind == "heads")
    widths = {cut.tensor.split(".")[-2]: cut.width for cut in heads.slices}
    assert widths == {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}
    assert heads.size == 2
