"""A removal that is not the same as zeros is found before anything is released."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "units"))
from units_families import FAMILIES

from fedveil import FedQSN, shrinking
from fedveil.errors import ConfigurationError
from fedveil.removal import try_removal
from fedveil.units import find_units, tried_units
from toys import federation, gpt2

T5_ATTENTION = {"T5Attention": ("q", "k", "v", "o")}
"""Its position bias has one number per head and is handed on: at another width it does not fit."""


def t5():
    return FAMILIES["t5"].build()


WRONG = {
    "a size that is not changed": (gpt2, "_COUNTS", {}),
    "a block that knows its width": (t5, "_BLOCKS", {**shrinking._BLOCKS, **T5_ATTENTION}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_it_is_refused_with_the_group(kind, monkeypatch):
    make, table, value = WRONG[kind]
    model = make().eval()
    monkeypatch.setattr(shrinking, table, value)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=r"shrink=False") as caught:
        try_removal(model, find_units(model, "neurons"))
    assert "attn" in str(caught.value).lower() or "attention" in str(caught.value).lower()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_so_are_answers_that_differ_by_a_factor():
    """A hook that no trace of the net shows."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    groups = tried_units(model)
    try_removal(model, groups)
    hooked = copy.deepcopy(model)
    hooked[3].register_forward_hook(lambda layer, _, output: output / layer.in_features)
    with pytest.raises(ConfigurationError, match=r"computes something else .*\(in 1\.weight\)"):
        try_removal(hooked, groups)


@pytest.mark.parametrize("shrink", [True, False])
def test_a_federation_refuses_it_where_clients_would_shrink(shrink, monkeypatch):
    model, scheme = gpt2(), FedQSN(units="neurons", shrink=shrink)
    monkeypatch.setattr(shrinking, "_COUNTS", {})
    if shrink:
        with pytest.raises(ConfigurationError, match=r"shrink=False"):
            federation(model, scheme=scheme)
    else:
        federation(model, scheme=scheme)


def test_nothing_is_to_be_tried_where_nothing_shrinks(monkeypatch):
    monkeypatch.setattr(shrinking, "_BLOCKS", {})
    monkeypatch.setattr(shrinking, "_COUNTS", {})
    model = gpt2()
    try_removal(model, find_units(model, "neurons"))
