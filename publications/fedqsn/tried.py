"""Releases that were tried and are in no scheme of fedveil, because they protect nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from fedveil.schemes import FedAvg
from fedveil.schemes.fedavg import FedAvgServer
from fedveil.secret import Secret
from fedveil.state import StateDict
from fedveil.wire import Dense, Message, Sections

__all__ = ["Distorted", "Lagging"]


@dataclass(frozen=True)
class Distorted(FedAvg):
    """Each client gets the model with noise of its own, the same in every round.

    The noise does not go into the model: updates are added to what the owner holds.

    Attributes:
        noise: Its standard deviation, next to that of the values of the tensor in the base.
    """

    noise: float = 0.5

    def server(self, model: nn.Module, secret: Secret) -> FedAvgServer:
        """See `Scheme.server`."""
        return _DistortingServer(self, model, secret)


class _DistortingServer(FedAvgServer):
    def __init__(self, scheme: Distorted, model: nn.Module, secret: Secret) -> None:
        super().__init__(scheme, model)
        self._secret = secret
        self._noise = {
            name: scheme.noise * tensor.std()
            for name, tensor in self._global.floating()
            if tensor.ndim > 1
        }

    def release(self, client: str) -> Message:
        message = super().release(client)
        noisy = {}
        for name, tensor in self._global.export().items():
            if name in self._noise:
                tensor = tensor + self._noise[name] * self._draw(client, name, tensor)
            noisy[name] = Dense(tensor)
        return replace(message, sections=Sections(noisy))

    def _draw(self, client: str, name: str, like: torch.Tensor) -> torch.Tensor:
        (seed,) = self._secret.words(1, "distortion", client, name) >> 1
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(int(seed)))


@dataclass(frozen=True)
class Lagging(FedAvg):
    """Clients get the base with only a part of what the federation has added to it.

    Attributes:
        shown: That part; 0 sends the base in every round.
    """

    shown: float = 0.5

    def server(self, model: nn.Module, secret: Secret) -> FedAvgServer:
        """See `Scheme.server`."""
        return _LaggingServer(self, model)


class _LaggingServer(FedAvgServer):
    def __init__(self, scheme: Lagging, model: nn.Module) -> None:
        super().__init__(scheme, model)
        self._shown, self._base = scheme.shown, self._global.export()

    def begin_round(self, number: int) -> None:
        super().begin_round(number)
        now = self._global.export()
        self._sections = Sections({n: Dense(self._at(n, now)) for n in now})

    def _at(self, name: str, now: StateDict) -> torch.Tensor:
        if not now[name].is_floating_point():
            return now[name]
        return torch.lerp(self._base[name], now[name], self._shown)
