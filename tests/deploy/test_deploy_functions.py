"""A function that makes the owner's model goes to clients: nothing of its weights may be in it."""

import tomllib

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


def test_what_clients_would_draw_is_trained_and_travels(tmp_path):
    """A pooler that the folder lacks would be another one at each client that was to hold it."""
    import transformers

    from fedveil.hub import minilm_folder

    sizes = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    config = transformers.BertConfig(vocab_size=len(tokenizer), num_labels=2, **sizes)
    (tmp_path / "test.csv").write_text("text,label\na,x\nb,y\n")
    for name, kind in (
        ("lacking", transformers.BertForMaskedLM),
        ("whole", transformers.BertForSequenceClassification),
    ):
        kind(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / f"{name}.toml").write_text(
            f'[model]\nname = "{name}"\n[model.lora]\nr = 2\ntarget_modules = ["query"]\n'
            '[data]\ntask = "text-classification"\ntest = "test.csv"\nlabels = ["x", "y"]\n'
            "max_length = 32\n"
            f'[scheme]\nname = "fedlpp"\n[partners]\nnames = ["a"]\nkeys = "d-{name}/owner/keys"\n'
        )
    trained = {}
    for name in ("lacking", "whole"):
        folder = tmp_path / f"d-{name}"
        assert len(write_deployment(load_config(tmp_path / f"{name}.toml"), ADDRESS, folder)) == 2
        partner = tomllib.loads((folder / "a" / "partner.toml").read_text())
        trained[name] = partner["model"]["lora"].get("modules_to_save", [])
    assert any("pooler" in module for module in trained["lacking"])
    assert not any("pooler" in module for module in trained["whole"])
