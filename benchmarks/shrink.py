"""What a client saves by training a network that is physically without its withheld units.

    python benchmarks/shrink.py                   # all models and shares; about half an hour
    python benchmarks/shrink.py gpt2 --shares 0.4 --batch 4 --tokens 32
    python benchmarks/shrink.py gpt2 --shares 0.4 --profile

A client fits the same 4-bit proxy in turns with ``shrink=True`` and with zeros in the place of
withheld units, AdamW in float32 on one thread. ``step`` is an optimizer step, ``rest`` all else
that a client does in a round (decoding the proxy, taking the update): medians in milliseconds of
CPU time, which other processes disturb less than time on the clock. ``floor`` is the share of
multiplications with weights that remain. ``memory`` is the peak of a process of its own beyond the
architecture and the message, as a share of that with zeros. Models have random weights: two layers
of GPT-2 small with a sixth of its vocabulary, so that embedding and head weigh as much as in all
twelve, and MiniLM (six layers of width 384).
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import profile

from fedveil import FedQSN, Secret, Training
from fedveil.schemes.base import LocalRecord
from fedveil.state import architecture_of
from fedveil.tasks import Measure, Prepared
from fedveil.training import LocalRun, Trainer, TrainingRecord
from fedveil.wire import Message

SHARES = (0.0, 0.1, 0.37, 0.4, 0.7)
MODELS = ("gpt2", "gpt2-lm", "minilm")
UNITS = ("neurons", "mlp")


def build(name: str) -> nn.Module:
    """A random model; dropout as configured by default."""
    import transformers

    torch.manual_seed(0)
    if name == "minilm":
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_labels=4
        )
        model: nn.Module = transformers.BertForSequenceClassification(config)
        return model
    settings = {"n_layer": 2, "vocab_size": 50257 // 6, "num_labels": 4, "pad_token_id": 0}
    config = transformers.GPT2Config(**settings, bos_token_id=1, eos_token_id=2)
    if name == "gpt2-lm":
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.GPT2ForSequenceClassification(config)
    return model


class Tokens:
    """Rows of token numbers: to be classified, or each token told from those before it."""

    name = "tokens"

    def validate(self, data: Any) -> None:
        """Everything goes."""

    def prepare(self, data: Any) -> Prepared:
        return data if isinstance(data, Prepared) else Prepared(data)

    def collate(self, rows: Any) -> dict[str, Tensor]:
        return {"tokens": torch.tensor(list(rows))}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        tokens = batch["tokens"]
        logits = model(input_ids=tokens).logits
        if logits.dim() == 3:
            return nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            )
        return nn.functional.cross_entropy(logits, tokens[:, 0] % 4)

    def measure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Measure:
        return Measure(len(batch["tokens"]), float(self.loss(model, batch)), 0)


@dataclass
class Timed:
    """Local training, with how much CPU time a step took."""

    run: LocalRun
    seconds: list[float] = field(default_factory=list)

    def __call__(self, model: nn.Module) -> LocalRecord:
        started = time.process_time()
        record = self.run(model)
        self.seconds.append((time.process_time() - started) / record.steps)
        return record

    def replay(self, model: nn.Module, examples: int) -> Iterator[Mapping[str, Tensor]]:
        return self.run.replay(model, examples)


@dataclass(frozen=True)
class Case:
    """One model, one share of withheld units, one size of batch."""

    model: str
    units: str
    share: float
    batch: int
    tokens: int
    steps: int

    def scheme(self, shrink: bool) -> FedQSN:
        return FedQSN(server_mask=0.0, client_mask=self.share, units=self.units, shrink=shrink)

    def scene(self) -> tuple[nn.Module, Message, Timed]:
        """The bare architecture, a proxy, and training on random tokens."""
        model = build(self.model)
        server = self.scheme(True).server(model, Secret(bytes(32)))
        server.begin_round(1)
        message = Message.from_bytes(server.release("a").to_bytes())
        rows = torch.randint(3, 8000, (4 * self.batch, self.tokens)).tolist()
        training = Training(steps=self.steps, batch_size=self.batch)
        run = LocalRun(Trainer(Tokens(), rows, training), seed=0)
        return architecture_of(model), message, Timed(run)


class Taken(NamedTuple):
    """CPU seconds of a step, and of the rest of a client's round."""

    step: float
    rest: float


def pairs_of(case: Case, repeats: int) -> dict[bool, list[Taken]]:
    """With and without `shrink`, in turn."""
    model, message, trainer = case.scene()
    taken: dict[bool, list[Taken]] = {True: [], False: []}
    for repeat in range(repeats + 1):
        for shrink in (True, False):
            started = time.process_time()
            case.scheme(shrink).client().fit(message, model, trainer)
            whole, step = time.process_time() - started, trainer.seconds.pop()
            if repeat:  # the first one finds caches cold
                taken[shrink].append(Taken(step, whole - step * case.steps))
    return taken


def medians_of(case: Case, repeats: int) -> dict[bool, Taken]:
    """The medians of `pairs_of`."""
    return {
        shrink: Taken(*map(statistics.median, zip(*taken, strict=True)))
        for shrink, taken in pairs_of(case, repeats).items()
    }


def peak_of(case: Case, shrink: bool) -> int:
    """Bytes that a client comes to hold beyond the architecture and the message."""
    torch.set_num_threads(1)
    model, message, trainer = case.scene()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    floor = _status("VmRSS")
    case.scheme(shrink).client().fit(message, model, trainer)
    return _status("VmHWM") - floor


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def peaks(case: Case) -> dict[bool, int]:
    """`peak_of` in a fresh process each."""
    short = replace(case, steps=2)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {shrink: pool.apply(peak_of, (short, shrink)) for shrink in (True, False)}


@dataclass
class Counted:
    """No training: counts the weights that every token is multiplied with."""

    weights: list[int] = field(default_factory=list)

    def __call__(self, model: nn.Module) -> LocalRecord:
        layers: Iterator[Any] = (
            m for m in model.modules() if hasattr(m, "nf") or isinstance(m, nn.Linear)
        )
        self.weights.append(sum(layer.weight.numel() for layer in layers))
        return TrainingRecord(1, 1, 0.0, 0.0)

    def replay(self, model: nn.Module, examples: int) -> Iterator[Mapping[str, Tensor]]:
        return iter(())


def floor_of(case: Case) -> float:
    """Which share of the multiplications with weights is left: what time could at best become."""
    model, message, _ = case.scene()
    counted = Counted()
    for shrink in (True, False):
        case.scheme(shrink).client().fit(message, model, counted)
    return counted.weights[0] / counted.weights[1]


def run(cases: list[Case], repeats: int, console: Console) -> None:
    """Measure every case and print the table."""
    columns = ("step, ms", "zeros, ms", "step ratio", "floor", "rest, ms", "zeros, ms", "memory")
    table = Table("model", "units", "withheld", *columns)
    for case in cases:
        taken, peak = medians_of(case, repeats), peaks(case)
        small, full = taken[True], taken[False]
        cells = (
            f"{1e3 * small.step:.0f}", f"{1e3 * full.step:.0f}",
            f"{small.step / full.step:.2f}", f"{floor_of(case):.2f}",
            f"{1e3 * small.rest:.0f}", f"{1e3 * full.rest:.0f}",
            f"{peak[True] / peak[False]:.2f}",
        )  # fmt: skip
        table.add_row(case.model, case.units, f"{case.share:.0%}", *cells)
        console.print(case.model, case.units, case.share, *cells)
    console.print(table)


def run_profile(case: Case, console: Console) -> None:
    """Print where a step's time goes, by operation, in milliseconds of CPU time."""
    model, message, trainer = case.scene()
    spent: dict[bool, dict[str, float]] = {}
    for shrink in (True, False):
        client = case.scheme(shrink).client()
        client.fit(message, model, trainer)
        with profile() as profiled:
            client.fit(message, model, trainer)
        spent[shrink] = {
            event.key: event.self_cpu_time_total / 1e3 / case.steps
            for event in profiled.key_averages()
        }
    table = Table("operation", "shrunk", "zeros", title=f"{case}, ms per step")
    for name in sorted(spent[False], key=lambda key: -spent[False][key])[:14]:
        table.add_row(name, f"{spent[True].get(name, 0.0):.1f}", f"{spent[False][name]:.1f}")
    table.add_row("all", *(f"{sum(spent[shrink].values()):.1f}" for shrink in (True, False)))
    console.print(table)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, help=" ".join(MODELS))
    parser.add_argument("--units", nargs="+", choices=UNITS, default=["neurons"])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="where the time goes instead")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        Case(model, units, share, asked.batch, asked.tokens, asked.steps)
        for model in asked.models
        for units in asked.units
        for share in asked.shares
    ]
    console = Console(width=120)
    if asked.profile:
        for case in cases:
            run_profile(case, console)
    else:
        run(cases, asked.repeats, console)


if __name__ == "__main__":
    main()
