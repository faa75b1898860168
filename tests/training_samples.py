"""Small models, tokenizers and data that the tests of tasks and of training share."""

from __future__ import annotations

import copy
import random

import pytest
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


# Fixtures: see conftest.py of tasks and of training --------------------------------------------


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return transformers.BertTokenizerFast(str(folder / "vocab.txt"))


@pytest.fixture
def bert(tokenizer):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=2,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config)
