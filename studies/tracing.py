"""Whose proxy is it? How often leak tracing names the right client, and how often a wrong one.

    python -m studies.tracing                  # 100 leaks of each kind: an hour on one core
    python -m studies.tracing --leaks 4        # whether all of it works: two minutes
    python -m studies.tracing --nets bert --policies grouped

Federations of 20 clients, 10 of them in each of 4 rounds, masks and bits at their defaults.
Of each federation 4 proxies leak, each is altered in every way of `ALTERATIONS`, once with zeros
in its holes and once with holes filled from the public base, which the tracer is then given. Files
that nobody leaked are traced as well. Finished federations are kept in runs/tracing/results.jsonl
and not repeated.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedveil import Federation, FedQSN, ImageClassification, Secret, TextClassification, Training
from fedveil.audit import Evidence, Kept
from fedveil.audit.attacks import impute, pool
from fedveil.audit.tracing import Trace, read_model, trace
from fedveil.quantization import quantize
from fedveil.run import Manifest, Proxy
from fedveil.state import read_state
from fedveil.tasks import Task
from studies.results import Results

State = dict[str, Tensor]
Row = dict[str, Any]
POLICIES = ("sticky", "fresh", "grouped")
CLIENTS, PER_ROUND, ROUNDS, LEAKS = 20, 10, 4, 4


@dataclass(frozen=True)
class Net:
    """A network, its data, and how it is trained."""

    build: Callable[[], nn.Module]
    rows: Callable[[int, int], list[Row]]
    task: Task
    training: Training


class Words:
    """A tokenizer of words that are numbers."""

    pad_token_id = 0

    def __call__(self, batch: list[str], truncation: bool = True, max_length: int = 16) -> Row:
        ids = [[int(word) for word in text.split()][:max_length] for text in batch]
        return {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]}

    def pad(self, batch: list[Row], return_tensors: str = "pt") -> Row:
        return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 3),
    )  # fmt: skip


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=272, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def images(count: int, seed: int) -> list[Row]:
    """Noise [1, 4, 5] with the class in its first pixels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        image = torch.randn(1, 4, 5, generator=generator)
        image[0, 0, number % 3] += 1.5
        rows.append({"image": image, "label": number % 3})
    return rows


def texts(count: int, seed: int) -> list[Row]:
    """Eight words each, three of them from those of the class."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(33, 272, (count, 8), generator=generator)
    for number in range(count):
        words[number, :3] = torch.randint(3, 13, (3,), generator=generator) + 10 * (number % 3)
    return [{"text": " ".join(map(str, w)), "label": n % 3} for n, w in enumerate(words.tolist())]


NETS = {
    "mlp": Net(mlp, images, ImageClassification(num_labels=3), Training(
        steps=5, batch_size=8, learning_rate=0.02, optimizer="sgd", schedule="constant")),
    "bert": Net(bert, texts, TextClassification(Words(), num_labels=3), Training(
        steps=5, batch_size=8, learning_rate=2e-4, schedule="constant")),
}  # fmt: skip


def train(net: Net, state: Mapping[str, Tensor] | None, steps: int, seed: int) -> State:
    """Train on data of one's own; from a new network if no state is given."""
    torch.manual_seed(seed)
    model = net.build()
    if state is not None:
        for name, tensor in read_state(model).items():
            tensor.copy_(state[name])
    data = net.task.prepare(net.rows(64, 9000 + seed))
    optimizer = net.training.build_optimizer(model.parameters())
    for _ in range(steps):
        chosen = torch.randint(0, 64, (net.training.batch_size,)).tolist()
        optimizer.zero_grad()
        loss = net.task.loss(model, net.task.collate(data.select(chosen)))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in read_state(model).items()}


class Opened(Evidence):
    """Messages of small models, each opened once for all the files that are compared with them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._opened: dict[Kept, Proxy] = {}

    def open(self, kept: Kept) -> Proxy:
        if kept not in self._opened:
            self._opened[kept] = super().open(kept)
        return self._opened[kept]


class Scene:
    """One federation that has been run, and what may leak from it."""

    def __init__(self, net: Net, policy: Any, seed: int, folder: Path, **changes: Any) -> None:
        self.net, self.seed = net, seed
        self.base = train(net, None, 100, 10_000 + seed % 5)
        model = net.build()
        for name, tensor in read_state(model).items():
            tensor.copy_(self.base[name])
        clients = {f"clinic-{i}": net.rows(16, 100 * seed + i) for i in range(CLIENTS)}
        federation = Federation(
            model, clients, task=net.task, scheme=FedQSN(policy=policy, **changes),
            training=net.training, secret=Secret(seed.to_bytes(32, "big")), seed=seed,
            clients_per_round=PER_ROUND, out=folder, keep_messages=True,
        )  # fmt: skip
        self.final = dict(federation.run(ROUNDS).global_model.state_dict())
        self.evidence = Opened(folder)

    @property
    def manifest(self) -> Manifest:
        return self.evidence.manifest

    def proxy(self, *numbers: int, holes: Mapping[str, Tensor] | None) -> State:
        """One proxy as a model, or several, the later over the earlier, with their holes filled."""
        sent = [self.evidence.proxies()[number] for number in numbers]
        return impute(pool(self.evidence, sent), self.manifest, holes)

    def all_of(self, number: int) -> list[int]:
        """Numbers of all messages to the client of one."""
        kept = self.evidence.proxies()
        return [n for n, one in enumerate(kept) if one.client == kept[number].client]

    @cached_property
    def leaks(self) -> list[int]:
        """Numbers of the messages that leak, of different clients."""
        order = np.random.default_rng(self.seed).permutation(CLIENTS // 2 * ROUNDS)
        chosen: dict[str, int] = {}
        for number in order.tolist():
            chosen.setdefault(self.evidence.proxies()[number].client, number)
        return list(chosen.values())[:LEAKS]

    def clients_like(self, number: int) -> set[str]:
        """The clients who bear the mask that one message was cut by."""
        kept = self.evidence.proxies()
        units = [
            {n: r.units.tolist() for n, r in self.evidence.open(one).released.items()}
            for one in kept
        ]
        return {one.client for one, held in zip(kept, units, strict=True) if held == units[number]}


def pruned(state: State, scene: Scene) -> State:
    """The smaller half of each matrix is zero."""
    return {
        name: t * (t.abs() >= t.abs().median()) if t.dim() > 1 else t for name, t in state.items()
    }


def requantized(state: State, scene: Scene, bits: int = 4) -> State:
    """In blocks across those of the proxy."""
    return {
        name: quantize(t, bits=bits, axis=1, block=32).dequantize() if t.dim() > 1 else t
        for name, t in state.items()
    }


def noisy(state: State, scene: Scene) -> State:
    """Noise of a fifth of each tensor's spread."""
    generator = torch.Generator().manual_seed(scene.seed)
    return {
        name: t + 0.2 * t.std() * torch.randn(t.shape, generator=generator)
        if t.is_floating_point() and t.numel() > 1
        else t
        for name, t in state.items()
    }


def permuted(state: State, scene: Scene) -> State:
    """Every group's units in a new order: the same function."""
    generator = torch.Generator().manual_seed(scene.seed)
    state = dict(state)
    for group in scene.manifest.groups:
        order = torch.randperm(group.size, generator=generator)
        for part in (part for part in group.slices if part.tensor in state):
            moved = state[part.tensor].clone()
            taken = moved.index_select(part.axis, part.indices(order))
            moved.index_copy_(part.axis, part.indices(torch.arange(group.size)), taken)
            state[part.tensor] = moved
    return state


def cast(dtype: torch.dtype) -> Callable[[State, Scene], State]:
    return lambda state, scene: {n: t.to(dtype) for n, t in state.items()}


def renamed(state: State, scene: Scene) -> State:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def fine_tuned(state: State, scene: Scene) -> State:
    return train(scene.net, state, 50, scene.seed)


ALTERATIONS: dict[str, Callable[[State, Scene], State]] = {
    "as it was sent": lambda state, scene: state,
    "fine-tuned, 50 steps": fine_tuned,
    "half of the weights pruned": pruned,
    "quantized again, 4 bits": requantized,
    "noise of 20 %": noisy,
    "fp16": cast(torch.float16),
    "bf16": cast(torch.bfloat16),
    "npz, other names": renamed,
    "neurons permuted": permuted,
    "fine-tuned, pruned, permuted": lambda state, scene: permuted(
        pruned(fine_tuned(state, scene), scene), scene
    ),
}


def look(scene: Scene, state: State, given: bool, npz: bool = False) -> Trace:
    """Trace a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("leak.npz" if npz else "leak.safetensors")
        if npz:
            arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in state.items()}
            np.savez(path, **arrays)
        else:
            save_file({n: t.contiguous() for n, t in state.items()}, path)
        base = scene.base if given else None
        return trace(scene.evidence, read_model(path), base=base)


def judge(found: Trace, *guilty: set[str]) -> tuple[bool, bool]:
    """Whether all the guilty were named, and whether anybody else was."""
    named = [set(match.clients) for match in found.suspects]
    return all(one in named for one in guilty), any(one not in guilty for one in named)


def leaks(scene: Scene) -> Iterator[tuple[str, tuple[bool, bool]]]:
    """Every alteration of every leak, with its verdict."""
    for number in scene.leaks:
        guilty = scene.clients_like(number)
        for holes, base in (("zeros", None), ("base", scene.base)):
            for name, alter in ALTERATIONS.items():
                state = alter(scene.proxy(number, holes=base), scene)
                found = look(scene, state, base is not None, name.startswith("npz"))
                yield f"{name} | {holes}", judge(found, guilty)
            state = scene.proxy(*scene.all_of(number), holes=base)
            found = look(scene, state, base is not None)
            yield f"newest of all its rounds | {holes}", judge(found, guilty)


def blends(scene: Scene) -> Iterator[tuple[str, tuple[bool, bool]]]:
    """Averages of two and three proxies of different masks."""
    for count in (2, 3):
        for start in range(LEAKS):
            chosen = [scene.leaks[(start + step) % LEAKS] for step in range(count)]
            guilty = {frozenset(scene.clients_like(number)) for number in chosen}
            if len(guilty) < count:
                continue  # of one mask group
            for holes, base in (("zeros", None), ("base", scene.base)):
                states = [scene.proxy(number, holes=base) for number in chosen]
                state = {n: sum((s[n] for s in states), torch.tensor(0)) / count for n in states[0]}
                found = look(scene, state, base is not None)
                yield f"blend of {count} | {holes}", judge(found, *map(set, guilty))


def innocent(scene: Scene) -> Iterator[tuple[str, tuple[bool, bool]]]:
    """Files that come from no proxy."""
    files = {
        "unrelated model": train(scene.net, None, 100, 20_000 + scene.seed),
        "the public base": copy.deepcopy(scene.base),
        "the final global model": {n: scene.final[n] for n in scene.manifest.tensors},
    }
    for number in range(4):
        files[f"trained from the base {number}"] = train(
            scene.net, scene.base, 50, 30_000 + 4 * scene.seed + number
        )
    for name, state in files.items():
        for holes, given in (("zeros", False), ("base", True)):
            yield f"{name.rstrip(' 0123')} | {holes}", judge(look(scene, state, given))


def measure(net: Net, policy: str, seed: int, **changes: object) -> dict[str, list[int]]:
    """Per case of one federation: trials, right ones, and those that named somebody wrongly."""
    counts: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(net, policy, seed, Path(folder), **changes)
        for cases in (leaks, blends, innocent):
            for name, (right, wrong) in cases(scene):
                count = counts.setdefault(name, [0, 0, 0])
                count[0] += 1
                count[1] += right
                count[2] += wrong
    return counts


def show(results: Results) -> str:
    """Leaks of which the right clients were named, of how many; files that named a wrong one."""
    names = results.names()
    totals: dict[str, dict[str, np.ndarray]] = {}
    for name in names:
        for counts in results.of(name):
            for case, count in counts.items():
                row = totals.setdefault(case, {})
                row[name] = row.get(name, np.zeros(3, int)) + np.array(count)
    lines = [["file", "holes", *names, "wrong"], ["---"] * (len(names) + 3)]
    for case, row in totals.items():
        cells = [f"{row[n][1]}/{row[n][0]}" if n in row else "-" for n in names]
        lines.append([*case.split(" | "), *cells, str(sum(count[2] for count in row.values()))])
    every = sum((count for row in totals.values() for count in row.values()), np.zeros(3, int))
    lines.append(["all files", "", *[""] * len(names), f"{every[2]}/{every[0]}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leaks", type=int, default=100, help="of each kind, policy and net")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--out", type=Path, default=Path("runs/tracing"))
    arguments = parser.parse_args()
    results = Results(arguments.out)
    for seed in range(-(-arguments.leaks // LEAKS)):
        for net in arguments.nets:
            for policy in arguments.policies:
                if not results.has(f"{net} {policy}", seed):
                    results.add(f"{net} {policy}", seed, measure(NETS[net], policy, seed))
        print(f"{LEAKS * (seed + 1)} leaks of each kind", flush=True)
    print(show(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
