"""Small language models, and federations that teach them to count, to be attacked."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import transformers

import fedveil
import toys
from fedveil.state import copy_of
from fedveil.tasks import CausalLM
from fedveil.training import Trainer, Training

MODULUS = 23
END, PAD = MODULUS, MODULUS + 1
STEPS = (1, 2, 3, 4)
"""What is counted up by; each client knows two of them."""
KNOWN = (1, 6, 7)
"""What the base has begun to count up by."""
LEARNING = Training(steps=10, batch_size=16, learning_rate=1e-2)
SHORT = Training(steps=3, batch_size=16, learning_rate=1e-2)


class Numbers:
    """A tokenizer whose words are numbers, and whose numbers are tokens."""

    bos_token_id, eos_token_id, pad_token_id = None, END, PAD

    def __call__(self, text, add_special_tokens=True):
        return transformers.BatchEncoding({"input_ids": [int(word) for word in text.split()]})


WORDS = Numbers()
TASK = CausalLM(WORDS, max_length=12)


def rows(count, seed, steps=STEPS):
    """Two numbers, and the three that come next: each some more than the last."""
    generator, found = torch.Generator().manual_seed(seed), []
    for number in range(count):
        first = int(torch.randint(MODULUS, (), generator=generator))
        step = steps[number % len(steps)]
        words = [str((first + k * step) % MODULUS) for k in range(5)]
        found.append({"prompt": " ".join(words[:2]), "completion": " ".join(words[2:])})
    return found


TEST = rows(120, 99)


def untaught(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=MODULUS + 2, n_embd=64, n_layer=1, n_head=2, n_positions=12,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@functools.cache
def _taught():
    model = untaught()
    Trainer(TASK, rows(400, 50, KNOWN), replace(LEARNING, steps=20)).train(model, seed=0)
    return model


def base():
    """Has begun to learn to count, by other steps than the clients know."""
    return copy_of(_taught())


def adapted(backbone=None):
    """The same, or another model, with a new LoRA adapter, the only thing that is trained."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["c_attn", "c_fc", "c_proj"], task_type="CAUSAL_LM",
        fan_in_fan_out=True,
    )  # fmt: skip
    return peft.get_peft_model(backbone or base(), config)


def federation(model, scheme, out=None, count=4, **changes):
    """Up to four clients, each of whom knows two steps."""
    clients = {f"c{i}": rows(48, i, (STEPS[i], STEPS[(i + 1) % 4])) for i in range(count)}
    settings = {
        "task": TASK, "scheme": scheme, "training": LEARNING, "test": TEST,
        "secret": toys.SECRET, "out": out, "keep_messages": out is not None, **changes,
    }  # fmt: skip
    return fedveil.Federation(model, clients, **settings)
