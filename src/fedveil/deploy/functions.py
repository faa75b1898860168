"""Whether clients get what they should of a model that is drawn, or made by a function."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fedveil.config import Config
from fedveil.drawing import KeyedDraws
from fedveil.errors import ConfigurationError
from fedveil.hub.models import load_model
from fedveil.hub.settings import is_function
from fedveil.secret import Secret
from fedveil.state import read_state

__all__ = ["check_function"]


def check_function(config: Config, model: nn.Module) -> None:
    """Make the model under another secret, too, and see what of it is the same.

    Where clients are sent proxies of a model that a function makes, they have the function: what it
    makes of itself, whoever calls it, they have before the first message. Where clients hold what
    is not sent, nothing of that may be drawn: they would hold something else.

    Args:
        config: The owner's.
        model: What proxies are of.

    Raises:
        ConfigurationError: Most weights follow from the function; or clients are to hold what it
            draws, which comes out as something else on every machine.
    """
    holds, made = config.scheme.clients_hold_rest, is_function(config.model.name)
    if config.model.public is not None or not (holds or made):
        return
    labels = config.data.labels or []
    with KeyedDraws(Secret.generate(), "another model"):
        again = load_model(config.model, config.data.task, labels, config.path.parent, seed=0)
    mine, other = read_state(model), read_state(again)
    if holds:
        _check_held(mine, other, config.scheme.tensors(model), config)
        return
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    varied = {n: t for n, t in mine.items() if n in trained and _varies(t)}
    alike = sum(int((tensor == other[name]).sum()) for name, tensor in varied.items())
    whole = sum(tensor.numel() for tensor in varied.values())
    if 2 * alike > whole:
        raise ConfigurationError(
            "Clients would have your model's weights before the first message",
            expected="a function that draws weights by PyTorch's samplers",
            found=f"{alike:,} of {whole:,} numbers that come out the same under every secret",
            where=f"{config.path.name}: [model] {config.model.name}",
            fix="It goes to clients as it is. Let it draw its weights, or save the model as a "
            "folder for transformers, of which clients get the architecture alone.",
        )


def _check_held(
    mine: Mapping[str, Tensor], other: Mapping[str, Tensor], sent: Collection[str], config: Config
) -> None:
    for name, tensor in mine.items():
        if name not in sent and not torch.equal(tensor, other[name]):
            raise ConfigurationError(
                "Clients are to hold what begins at random, which is another thing for each",
                expected="a backbone whose weights all come with it",
                found=f"{config.model.name}, of which {name} is drawn",
                where=f"{config.path.name}: [model]",
                fix="Save the model with all its weights, and hand that out; or take a scheme that "
                "sends the backbone, such as fedqsn.",
            )


def _varies(tensor: Tensor) -> bool:
    """Whether not all numbers are one: zeros and ones are nobody's secret."""
    return tensor.numel() > 1 and bool((tensor != tensor.flatten()[0]).any())
