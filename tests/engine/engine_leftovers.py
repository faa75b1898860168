"""Models that training leaves something in, beside what travels."""

import torch
from torch import nn


class Counting(nn.Module):
    """What it computes depends on how often it was called, in all ways that a module can count."""

    state: torch.Tensor

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(16, 3)
        self.calls, self.seen, self.known = 0, [], {}
        self.same_as_seen = self.seen
        self.memory = torch.ones(1)
        self.register_buffer("state", torch.ones(1), persistent=False)

    def forward(self, images):
        self.calls += 1
        self.seen.append(self.calls)
        self.known[self.calls] = True
        self.memory += 0.1
        self.state = self.state * 1.1
        many = self.calls + len(self.seen) + len(self.known)
        return self.last(images.flatten(1)) * self.memory * self.state * (1 + 0.1 * many)


def _net(first):
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(8, 3))


def _frozen(model):
    model[:-1].requires_grad_(False)
    return model


class Drifting(nn.Module):
    """A frozen weight that follows its inputs, as in momentum encoders; a frozen flag, too."""

    def __init__(self):
        super().__init__()
        self.slow, self.last = nn.Linear(16, 8), nn.Linear(8, 3)
        self.slow.requires_grad_(False)

    def forward(self, images):
        flat = images.flatten(1)
        with torch.no_grad():
            self.slow.weight.data.mul_(0.9).add_(0.1 * flat.mean(0))
        return self.last(self.slow(flat))


KINDS = {
    "counting": Counting,
    "spectral frozen": lambda: _frozen(_net(nn.utils.spectral_norm(nn.Linear(16, 8)))),
    "norm frozen": lambda: _frozen(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    ),
    "drifting frozen": Drifting,
    "norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)
    ),
}


def make(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return KINDS[kind]()
