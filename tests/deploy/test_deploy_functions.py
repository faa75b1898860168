"""A function that makes the owner's model goes to clients: nothing of its weights may be in it."""

import pytest
import torch

from fedveil import ConfigurationError
from fedveil.config import load_config
from fedveil.deploy import Address, write_deployment

ADDRESS = Address("127.0.0.1", 9099)
HEAD = """
import numpy
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 3))

"""
SEEDED = """
def build():
    torch.manual_seed(0)
    return plain()
"""
ELSEWHERE = """
def build():
    dice, model = numpy.random.default_rng(0), plain()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(dice.normal(size=tuple(parameter.shape))))
    return model
"""
WRITTEN = """
def build():
    model = plain()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return model
"""
LOADED = """
from pathlib import Path

def build():
    model = plain()
    model.load_state_dict(torch.load(Path(__file__).with_name("weights.pt")))
    return model
"""
PARTLY = """
def build():
    model = plain()
    model.steps = nn.Parameter(torch.linspace(0, 1, 9))
    return model
"""


def deployment(folder, code):
    (folder / "net.py").write_text(HEAD + code)
    (folder / "federation.toml").write_text(
        (folder / "federation.toml").read_text().replace("net:build", f"{folder.name}_net:build")
    )
    (folder / "net.py").rename(folder / f"{folder.name}_net.py")
    return write_deployment(load_config(folder / "federation.toml"), ADDRESS, folder / "deployment")


@pytest.mark.parametrize("code", [SEEDED, PARTLY], ids=["seeded", "partly fixed"])
def test_weights_that_are_drawn_are_the_secrets(code, folder):
    assert len(deployment(folder, code)) == 3


@pytest.mark.parametrize("code", [ELSEWHERE, WRITTEN, LOADED], ids=["numpy", "written", "loaded"])
def test_weights_that_the_function_has_are_not_given_away(code, folder):
    torch.manual_seed(0)
    names = {"1.weight": (256, 16), "1.bias": (256,), "3.weight": (3, 256), "3.bias": (3,)}
    torch.save({n: torch.randn(shape) for n, shape in names.items()}, folder / "weights.pt")
    with pytest.raises(ConfigurationError, match="before the first message") as caught:
        deployment(folder, code)
    assert "4,867 of 4,867" in str(caught.value) or "5,123 of 5,123" in str(caught.value)
    assert not (folder / "deployment").exists()
