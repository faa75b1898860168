"""Models of which only names and shapes matter, and tensors of these shapes, a few at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor, nn

from fedveil.updates import SMALL
from speed.plan import Plan

__all__ = ["COLUMNS", "ROWS", "Matrices", "gpt2", "llama", "matrices", "random_like"]

ROWS: Final = "[out, in]"
"""Storage of `nn.Linear`: a unit is a row."""
COLUMNS: Final = "[in, out]"
"""Storage of `Conv1D`: a unit is a column. Embeddings are [vocabulary, width] in both."""

_POOL_VALUES: Final = 2**26
"""Values of one shape held at a time: more than caches hold, little enough for any machine."""


@dataclass(frozen=True)
class Matrices:
    """All tensors of one shape in a model.

    Attributes:
        shape: as it is stored.
        axis: which axis counts units.
        count: how many there are.
    """

    shape: tuple[int, int]
    axis: int
    count: int

    @property
    def values(self) -> int:
        """Numbers in all of them."""
        return self.shape[0] * self.shape[1] * self.count

    @property
    def held(self) -> int:
        """How many are made: one after the other takes its turn until `count` have had one."""
        size = self.shape[0] * self.shape[1]
        return max(1, min(self.count, -(-_POOL_VALUES // size)))

    def turns(self) -> Iterator[int]:
        """Which of those made takes each turn."""
        return (turn % self.held for turn in range(self.count))

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Random ones."""
        return [random_like(self.shape, dtype, seed) for seed in range(self.held)]


def gpt2(plan: Plan, *, data: bool = True, small: bool = False) -> nn.Module:
    """GPT-2 small, 124.4 million parameters, with random weights; the head is the embedding.

    Args:
        plan: a quick one wants less.
        data: without, there are only names and shapes.
        small: 5.4 million parameters.
    """
    import transformers

    sizes = (50257, 1024, 768, 12)
    if plan.quick:
        sizes = (1000, 64, 128, 2)
    elif small:
        sizes = (8192, 256, 256, 4)
    vocabulary, positions, hidden, layers = sizes
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=hidden, n_layer=layers,
        n_head=hidden // 64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    return _filled(model) if data else model


def llama(plan: Plan) -> nn.Module:
    """The shape of Llama-3.2-1B: 1.24 billion parameters, the head tied. It has no data."""
    import transformers

    sizes = (128, 256, 2, 1000) if plan.quick else (2048, 8192, 16, 128256)
    hidden, inner, layers, vocabulary = sizes
    heads = hidden // 64
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def matrices(model: nn.Module, storage: str) -> list[Matrices]:
    """The tensors of a model that are quantized, all stored in one way, by shape.

    Args:
        model: may be without data.
        storage: `ROWS` or `COLUMNS`.
    """
    counts: Counter[tuple[int, int]] = Counter()
    head = model.get_output_embeddings() if _is_tied(model) else None  # type: ignore[operator]
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if module is not head and weight.dim() == 2 and weight.numel() >= SMALL:
                counts[_stored(module, weight.shape, storage)] += 1
    axis = 0 if storage == ROWS else 1
    return [Matrices(shape, axis, count) for shape, count in counts.items()]


def random_like(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers of size 0.02; the same stretch repeats, starting elsewhere for each seed."""
    source = _noise()
    out = torch.empty(shape, dtype=dtype)
    flat, start = out.view(-1), 7919 * seed % len(source)
    for at in range(0, len(flat), len(source)):
        piece = flat[at : at + len(source)]
        first = min(len(source) - start, len(piece))
        piece[:first] = source[start : start + first]
        piece[first:] = source[: len(piece) - first]
    return out


@cache
def _noise() -> Tensor:
    return torch.randn(2**22 + 3, generator=torch.Generator().manual_seed(0)) * 0.02


def _stored(module: nn.Module, shape: torch.Size, storage: str) -> tuple[int, int]:
    is_columns = type(module).__name__ == "Conv1D"
    turn = not isinstance(module, nn.Embedding) and is_columns != (storage == COLUMNS)
    return (shape[1], shape[0]) if turn else (shape[0], shape[1])


def _is_tied(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "tie_word_embeddings", False))


def _filled(model: nn.Module) -> nn.Module:
    """A model that was made without data, with random weights and its ties."""
    model.to_empty(device="cpu")
    model.tie_weights()  # type: ignore[operator]
    with torch.no_grad():
        for seed, weight in enumerate(model.parameters()):
            weight.copy_(random_like(weight.shape, weight.dtype, seed))
        for buffer in model.buffers():
            buffer.zero_()
    return model
