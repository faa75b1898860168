import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from fedveil.audit.attacks import registry
from fedveil.config import load_config
from fedveil.schemes import FedQSN

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_example_files_are_valid(path):
    config = load_config(path)
    assert isinstance(config.scheme, FedQSN)
    assert config.secret_path.parent == EXAMPLES


def test_what_is_public_goes_out_once_and_unmasked():
    config = load_config(EXAMPLES / "bbc-public.toml")
    assert config.scheme == FedQSN.default(of_public=True)
    assert (config.scheme.server_mask, config.scheme.client_mask) == (0, 0)
    assert config.federation.rounds == 1
    assert config.tuning is not None


def test_mnist_example_names_a_function_that_makes_a_model():
    from fedveil.hub.models import load_untouched
    from fedveil.units import find_units

    config = load_config(EXAMPLES / "mnist.toml")
    model: Any = load_untouched(config.model.name, EXAMPLES)
    assert model[-1].out_features == 10
    assert isinstance(config.scheme, FedQSN)
    assert find_units(model, config.scheme.units)


def test_python_example_learns_and_protects(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python_api.py"])
    result = runpy.run_path(str(EXAMPLES / "python_api.py"))["main"]()
    measures = result.rounds[-1].measures
    assert measures["global"]["accuracy"] > result.base["accuracy"] + 10
    assert measures["proxy_after"]["accuracy"] < measures["global"]["accuracy"] - 5
    assert result.mean_bytes_down() < 0.25 * result.parameters_bytes
    assert "global" in capsys.readouterr().out


def test_an_attack_of_ones_own_is_tried_with_the_others(capsys, monkeypatch):
    monkeypatch.setattr(registry, "_ATTACKS", dict(registry._ATTACKS))
    found = runpy.run_path(str(EXAMPLES / "new_attack.py"))["main"]()
    own = [attack for attack in found.attacks if attack.polish == "soup with the public model"]
    assert [(attack.released, attack.attack) for attack in own] == [(True, "pooling")]
    assert {attack.polish for attack in found.attacks} >= {"fine-tuning", "task arithmetic"}
    said = capsys.readouterr().out
    assert f"soup with the public model: {own[0].measures['accuracy']:.1f} %" in said
    assert found.sentence in said


def test_contributors_are_shown_the_example_as_it_is():
    code = (EXAMPLES / "new_attack.py").read_text(encoding="utf-8")
    shown = (EXAMPLES.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    begin, end = code.index("# 1. Say"), code.index("def make_rows")
    assert code[begin:end].strip() in shown
