"""Batches of another shape than units were found for: an error while training, before any harm."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedveil
from fedveil.errors import ConfigurationError
from fedveil.units import Pattern, Rule, find_units
from fedveil.units.rows import rows_checked


class View(nn.Module):
    """A convolution whose output is seen as rows of a size that is written in the code."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv, self.read, self.size = nn.Conv2d(1, 4, 3), nn.Linear(size, 3), size

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.conv(x).relu().view(-1, self.size))


def norm() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def prelu() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3))


def flat() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))


def norms_of_images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3)
    )


RIGHT = {
    "rows": (norm, (5, 4)),
    "rows and slopes": (prelu, (5, 4)),
    "images": (flat, (5, 1, 5, 5)),
    "norms": (norms_of_images, (5, 1, 5, 5)),
    "a view": (lambda: View(36), (5, 1, 5, 5)),
    "tokens without a norm": (
        lambda: nn.Sequential(*list(norm())[::2], nn.Linear(6, 3)),
        (5, 6, 4),
    ),
}
WRONG = {
    "tokens": (norm, (5, 6, 4)),
    "tokens and slopes": (prelu, (5, 6, 4)),
    "one image without a batch": (flat, (1, 8, 8)),
    "a view of each channel": (lambda: View(36), (5, 1, 8, 8)),
}


def proxy_of(net: nn.Module, shrink: bool):
    scheme = fedveil.FedQSN(server_mask=0.5, client_mask=0.0, bits=None, units="mlp", shrink=shrink)
    server = scheme.server(net, fedveil.Secret.generate())
    server.begin_round(1)
    return server.release("a"), scheme.client()


class Trainer:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.x, self.replay = torch.randn(shape), None

    def __call__(self, model: nn.Module) -> SimpleNamespace:
        model(self.x).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad)
        return SimpleNamespace(examples=len(self.x), steps=1, loss_first=1.0, loss_last=1.0)


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("kind", WRONG)
def test_training_on_batches_that_units_were_not_found_for_is_refused(
    kind: str, shrink: bool
) -> None:
    make, shape = WRONG[kind]
    net = make()
    net(torch.randn(shape))  # it runs, so that nothing else would tell
    message, client = proxy_of(net, shrink)
    with pytest.raises(ConfigurationError, match="do not lie where they were found"):
        client.fit(message, net, Trainer(shape))


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("kind", RIGHT)
def test_training_on_other_batches_goes_on(kind: str, shrink: bool) -> None:
    make, shape = RIGHT[kind]
    net = make()
    if shrink and kind == "a view":
        assert find_units(net)  # its size is written down: it stays full of zeros
    message, client = proxy_of(net, shrink)
    assert client.fit(message, net, Trainer(shape)).sections


class Turned(nn.Module):
    """Tokens whose features are normalised, and positions of an image that are read as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.conv, self.read = nn.Conv2d(1, 5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.one(x).transpose(1, 2)).transpose(1, 2)
        positions = self.conv(x[:, None]).flatten(2).transpose(1, 2)
        return self.two(tokens).mean(1) + self.read(positions).mean(1)


@pytest.mark.parametrize("choice", ["neurons", "channels"])
def test_nets_that_turn_tokens_around_go_on_with_a_rule_of_their_own(choice: str) -> None:
    net = Turned()
    pattern = {
        "neurons": Pattern("neurons", ("one", "norm"), ("two",)),
        "channels": Pattern("channels", ("conv",), ("read",)),
    }[choice]
    groups = find_units(net, "mlp", rule=Rule(("Turned",), (pattern,)))
    with rows_checked(net, groups):
        net(torch.randn(5, 7, 4))


def test_nothing_is_looked_at_after() -> None:
    net = norm()
    with rows_checked(net, find_units(net)), pytest.raises(ConfigurationError):
        net(torch.randn(5, 6, 4))
    net(torch.randn(5, 6, 4))


def test_where_nothing_is_withheld_nothing_is_checked() -> None:
    net = norm()
    scheme = fedveil.FedQSN(server_mask=0.0, client_mask=0.0, bits=None)
    server = scheme.server(net, fedveil.Secret.generate())
    server.begin_round(1)
    assert scheme.client().fit(server.release("a"), net, Trainer((5, 6, 4))).sections  # type: ignore[arg-type]
