"""Small models, data and federations that tests share. Every model has a tensor of 4096 or more
numbers, since smaller ones travel dense. Models are typed as Any, as of an attribute of a module
PyTorch only says that it is a tensor or a module."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedveil import Federation, ImageClassification, Secret, Training
from fedveil.state import read_state, wipe
from fedveil.tasks import Measure, Prepared, Task, TextClassification
from fedveil.training import TrainingRecord
from fedveil.units import find_units
from fedveil.wire import Message

SECRET = Secret(bytes(range(32)))
FAST = Training(steps=2, batch_size=4, learning_rate=0.1, optimizer="sgd", schedule="constant")
CHOICES = ("neurons", "mlp", "columns")
NO_MASK: dict[str, Any] = {"server_mask": 0.0, "client_mask": 0.0, "bits": None}


def mlp(seed: int = 0) -> Any:
    """The middle weight [64, 96] is cut along both axes."""
    return _randomised(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(16, 96),
            nn.ReLU(),
            nn.Linear(96, 64),
            nn.ReLU(),
            nn.Linear(64, 3),
        ),
        seed,
    )


def convnet(seed: int = 0) -> Any:
    """Batch norm: running statistics belong to units; the second kernel is cut along both axes."""
    return _randomised(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3),
        ),
        seed,
    )  # fmt: skip


def bert(seed: int = 0) -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=272, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=264, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return _randomised(transformers.BertForSequenceClassification(config), seed)


def gpt2(seed: int = 0, *, tied: bool = True) -> Any:
    """A language model whose head is its token embedding."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=272, n_embd=16, n_layer=1, n_head=4, n_inner=264, n_positions=16,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return _randomised(transformers.GPT2LMHeadModel(config), seed)


MODELS: dict[str, Callable[..., Any]] = {"mlp": mlp, "convnet": convnet, "bert": bert}


def _randomised(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in read_state(model).items():
        if tensor.is_floating_point():
            tensor.copy_(torch.empty_like(tensor).normal_(0.0, 0.3, generator=generator))
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return model


def rows(count: int, seed: int = 0) -> list[dict]:
    """Float images [1, 4, 4] whose class shows in the first pixels."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for number in range(count):
        image = torch.randn(1, 4, 4, generator=generator) * 0.3
        image[0, 0, number % 3] += 2.0
        result.append({"image": image, "label": number % 3})
    return result


def texts(count: int, seed: int = 0) -> list[dict]:
    """Texts of numbers below 272, which `NumberTokenizer` reads as tokens."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(3, 272, (count, 6), generator=generator).tolist()
    return [{"text": " ".join(map(str, d)), "label": n % 3} for n, d in enumerate(draws)]


class NumberTokenizer:
    """Words are numbers, numbers are tokens."""

    pad_token_id = 0

    def __call__(self, batch, truncation=True, max_length=16):
        ids = [[int(word) for word in text.split()][:max_length] for text in batch]
        return {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]}

    def pad(self, batch, return_tensors="pt"):
        return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}


class NextToken:
    """A causal language model's task, as small as a task can be."""

    name = "next-token"

    def validate(self, data):
        """Everything goes."""

    def prepare(self, data):
        return data if isinstance(data, Prepared) else Prepared(data)

    def collate(self, batch):
        return {"labels": torch.tensor([[int(w) for w in row["text"].split()] for row in batch])}

    def loss(self, model, batch):
        logits = model(input_ids=batch["labels"]).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits.float(), batch["labels"][:, 1:].flatten())

    def measure(self, model, batch):
        return Measure(len(batch["labels"]), float(self.loss(model, batch)), 0)


def federation(model: nn.Module, *, clients: Any = None, task: Any = None, **changes):
    """Three clients with 6, 8 and 10 examples of what the model reads."""
    kind: Task
    if hasattr(model, "config"):
        lm = type(model).__name__.endswith("LMHeadModel")
        data, kind = texts, NextToken() if lm else TextClassification(NumberTokenizer())
    else:
        data, kind = rows, ImageClassification()
    settings = {"secret": SECRET, "training": FAST, "seed": 3, **changes}
    partners = {f"partner-{i}": data(6 + 2 * i, seed=i) for i in range(3)}
    return Federation(model, clients or partners, task=task or kind, **settings)


@dataclass(frozen=True)
class Nudge:
    """Training without data: adds noise to every weight and statistic, withheld ones included."""

    seed: int = 0
    size: float = 0.1
    examples: int = 5

    def __call__(self, model: nn.Module) -> TrainingRecord:
        generator = torch.Generator().manual_seed(self.seed)
        for tensor in read_state(model).values():
            if tensor.is_floating_point():
                noise = torch.empty(tensor.shape).normal_(generator=generator)
                tensor += (self.size * noise).to(tensor.dtype)
        return TrainingRecord(self.examples, 1, 1.0, 0.5)

    def replay(self, model: nn.Module, examples: int):
        """There are no data to look at."""
        return iter(())


@dataclass(frozen=True)
class TrainBy:
    """Training by a function, without data."""

    function: Callable[[nn.Module], TrainingRecord]

    def __call__(self, model: nn.Module) -> TrainingRecord:
        return self.function(model)

    def replay(self, model: nn.Module, examples: int):
        return iter(())


def reply_of(scheme, message: Message, model: nn.Module, trainer=None) -> Message:
    """What an honest client answers, through bytes both ways."""
    received = Message.from_bytes(message.to_bytes())
    reply = scheme.client().fit(received, model, trainer or Nudge())
    return Message.from_bytes(reply.to_bytes())


def play(scheme, model: nn.Module, rounds: int = 1, clients: int = 3, secret: Secret = SECRET):
    """Rounds without an engine, trained by `Nudge`; returns the server."""
    server, workplace = scheme.server(model, secret), bare(model)
    for number in range(1, rounds + 1):
        server.begin_round(number)
        for index in range(clients):
            nudge = Nudge(seed=10 * number + index, examples=3 + index)
            name = f"partner-{index}"
            reply = reply_of(scheme, server.release(name), workplace, nudge)
            server.absorb(name, reply, float(nudge.examples))
        server.end_round()
    return server


def bare(model: nn.Module) -> Any:
    """The architecture alone."""
    empty = copy.deepcopy(model)
    wipe(empty)
    return empty


def snapshot(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return snapshot(read_state(model))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Equal names, dtypes, shapes and values."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


def withheld(message: Message, model: nn.Module, choice: str) -> dict[str, Tensor]:
    """True where the unit indices of a proxy say that an element was not sent."""
    state = read_state(model)
    hidden = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in state.items()}
    for group in find_units(model, choice):
        index = message.sections[f"units/{group.name}"]
        gone = sorted(set(range(index.size)) - set(index.released.tolist()))
        for cut in (cut for cut in group.slices if cut.tensor in state):
            for unit in gone:
                start = cut.offset + unit * cut.width
                hidden[cut.tensor].narrow(cut.axis, start, cut.width).fill_(True)
    return hidden


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder by their relative names."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without how long anything took."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def digest(state: Mapping[str, Tensor]) -> str:
    """Equal for bit-identical float32 states only."""
    whole = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        whole.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()
