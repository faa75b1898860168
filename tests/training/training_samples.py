"""Small models, tokenizers and data that the tests of training share."""

from __future__ import annotations

import copy
import random

import torch
from torch import nn

WORDS = ["good", "bad", "film", "plot", "dull", "fine", "great", "poor", "the", "a"]


class Perceptron(nn.Module):
    """Flattens images; dropout makes the seed matter."""

    def __init__(self, *, inputs=16, classes=3, dropout=0.0, norm=False):
        super().__init__()
        self.hidden = nn.Linear(inputs, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(8, classes)

    def forward(self, images):
        hidden = self.norm(self.hidden(images.flatten(1)))
        return self.out(self.dropout(hidden.relu()))


def perceptron(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Perceptron(**options)


def images(count, *, classes=3, seed=0, side=4):
    """Float images whose class shows in the first pixels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        label = number % classes
        image = torch.randn(1, side, side, generator=generator) * 0.3
        image[0, 0, label] += 2.0
        rows.append({"image": image, "label": label})
    return rows


def texts(count, *, seed=0):
    """Sentences of different lengths; "good" in label 1, "bad" in label 0."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = number % 2
        words = draw.choices(WORDS[2:], k=draw.randint(1, 9))
        words.insert(draw.randint(0, len(words)), "good" if label else "bad")
        rows.append({"text": " ".join(words), "label": label})
    return rows


def state(model):
    return copy.deepcopy(model.state_dict())


def same(first, second):
    """Bit-identical state dicts."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
