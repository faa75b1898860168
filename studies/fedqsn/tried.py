"""What was tried and is in no scheme of fedveil: it protects nothing, or costs too much."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fedveil.masking import Masks
from fedveil.schemes import FedAvg, FedQSN
from fedveil.schemes.base import Metrics
from fedveil.schemes.fedavg import FedAvgServer
from fedveil.schemes.fedqsn import FedQSNServer
from fedveil.secret import Secret
from fedveil.state import StateDict
from fedveil.units import UnitGroup
from fedveil.wire import Dense, Message, Sections

__all__ = ["Deepening", "Distorted", "Held", "Lagging", "Ternary", "WithOptimizer"]


@dataclass(frozen=True)
class _Altered(FedAvg):
    """Clients get something else than the model; their updates are added to the model itself."""

    @abstractmethod
    def altered(self, client: str, now: StateDict, base: StateDict, secret: Secret) -> StateDict:
        """What a client gets in the place of the model ``now``, which began as ``base``."""

    def server(self, model: nn.Module, secret: Secret) -> _AlteringServer:
        """See `Scheme.server`."""
        return _AlteringServer(self, model, secret)

    def is_trained(self, name: str) -> bool:
        """Whether updates of this tensor are added."""
        return True


class _AlteringServer(FedAvgServer):
    def __init__(self, scheme: _Altered, model: nn.Module, secret: Secret) -> None:
        super().__init__(scheme, model)
        self._altered, self._secret, self._base = scheme, secret, self._global.export()

    def release(self, client: str) -> Message:
        message = super().release(client)
        shown = self._altered.altered(client, self._global.export(), self._base, self._secret)
        return replace(message, sections=Sections({n: Dense(t) for n, t in shown.items()}))

    def step(self, name: str) -> Tensor | None:
        return super().step(name) if self._altered.is_trained(name) else None


@dataclass(frozen=True)
class Distorted(_Altered):
    """Each client gets the model with noise of its own, the same in every round.

    Attributes:
        noise: Its standard deviation, next to that of the values of the tensor in the base.
    """

    noise: float = 0.5

    def altered(self, client: str, now: StateDict, base: StateDict, secret: Secret) -> StateDict:
        """See `_Altered.altered`."""
        return {
            name: tensor + self.noise * base[name].std() * _drawn(secret, client, name, tensor)
            if _is_matrix(tensor) else tensor
            for name, tensor in now.items()
        }  # fmt: skip


@dataclass(frozen=True)
class Lagging(_Altered):
    """Clients get the base with only a part of what the federation has added to it.

    Attributes:
        shown: That part; 0 sends the base in every round.
    """

    shown: float = 0.5

    def altered(self, client: str, now: StateDict, base: StateDict, secret: Secret) -> StateDict:
        """See `_Altered.altered`."""
        return {
            name: torch.lerp(base[name], tensor, self.shown)
            if tensor.is_floating_point() else tensor
            for name, tensor in now.items()
        }  # fmt: skip


@dataclass(frozen=True)
class Ternary(_Altered):
    """Matrices are sent in 1.58 bits: a sign or 0, times their mean (Ma et al., 2402.17764)."""

    def altered(self, client: str, now: StateDict, base: StateDict, secret: Secret) -> StateDict:
        """See `_Altered.altered`."""
        return {n: _ternary(tensor) if _is_matrix(tensor) else tensor for n, tensor in now.items()}


@dataclass(frozen=True)
class Held(_Altered):
    """Some layers stay on the server: clients get random ones in their place, ever the same.

    What clients do to those is not added; the owner's stay as they are.

    Attributes:
        layers: Patterns (as in the shell) of the names of tensors.
    """

    layers: tuple[str, ...] = ()

    def altered(self, client: str, now: StateDict, base: StateDict, secret: Secret) -> StateDict:
        """See `_Altered.altered`."""
        return {
            name: tensor if self.is_trained(name)
            else base[name].std() * _drawn(secret, "everybody", name, tensor)
            for name, tensor in now.items()
        }  # fmt: skip

    def is_trained(self, name: str) -> bool:
        """See `_Altered.is_trained`."""
        return not any(fnmatchcase(name, pattern) for pattern in self.layers)


@dataclass(frozen=True)
class Deepening(FedQSN):
    """Server mask rates rise from layer to layer: from 0 to twice ``server_mask``."""

    def server(self, model: nn.Module, secret: Secret) -> FedQSNServer:
        """See `Scheme.server`."""
        return _DeepeningServer(self, model, secret)


class _DeepeningServer(FedQSNServer):
    def __init__(self, scheme: Deepening, model: nn.Module, secret: Secret) -> None:
        super().__init__(scheme, model, secret)
        self._masks = _DeepeningMasks(self.groups, scheme.masking, secret)


class _DeepeningMasks(Masks):
    def _draw_server(self, group: UnitGroup) -> Tensor:
        words = self._secret.words(group.size, "server mask", group.name)
        depth = self.groups.index(group) / max(len(self.groups) - 1, 1)
        return self._keep(torch.arange(group.size), words, 2 * self.masking.server * depth)


@dataclass(frozen=True)
class WithOptimizer(FedQSN):
    """The server takes the mean update for a gradient (FedOpt; Reddi et al., 2003.00295).

    Attributes:
        optimizer: "momentum" (FedAvgM) or "adam" (FedAdam).
    """

    optimizer: Literal["momentum", "adam"] = "momentum"

    def server(self, model: nn.Module, secret: Secret) -> FedQSNServer:
        """See `Scheme.server`."""
        return _OptimizingServer(self, model, secret)


_OPTIMIZERS: Mapping[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {
    "momentum": partial(torch.optim.SGD, lr=1.0, momentum=0.5),
    "adam": partial(torch.optim.Adam, lr=0.01, betas=(0.9, 0.99), eps=1e-3),
}


class _OptimizingServer(FedQSNServer):
    def __init__(self, scheme: WithOptimizer, model: nn.Module, secret: Secret) -> None:
        super().__init__(scheme, model, secret)
        tensors = [tensor for _, tensor in self._global.floating()]
        self._optimizer = _OPTIMIZERS[scheme.optimizer](tensors)

    def end_round(self) -> Metrics:
        before = {name: tensor.clone() for name, tensor in self._global.floating()}
        metrics = super().end_round()
        for name, tensor in self._global.floating():
            tensor.grad = before[name] - tensor
            tensor.copy_(before[name])
        self._optimizer.step()
        return metrics


def _drawn(secret: Secret, client: str, name: str, like: Tensor) -> Tensor:
    """Standard normal."""
    (seed,) = secret.words(1, "distortion", client, name) >> 1
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(int(seed)))


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 1


def _ternary(tensor: Tensor) -> Tensor:
    scale = tensor.abs().mean().clamp(min=1e-8)
    return (tensor / scale).round().clamp(-1, 1) * scale
