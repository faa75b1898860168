"""The second demo: clients teach an owner's language model to write headlines, by three methods.

SmolLM2-135M-Instruct with LoRA, and the lead sentences and headlines of BBC News. The same numbers
come out every time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch import nn

from fedveil.demo.setting import fast_matmul, offline
from fedveil.engine import Evaluation
from fedveil.engine.crew import threads
from fedveil.errors import CheckpointError
from fedveil.federation import Federation, Result
from fedveil.files import write_whole
from fedveil.hub import bbc_headlines, smollm2_folder
from fedveil.hub.models import add_adapter, quiet_transformers
from fedveil.report.console import ConsoleProgress
from fedveil.report.words import DASH, human_bytes
from fedveil.schemes import FedLPP, FedQSN, Scheme
from fedveil.screen import PlainConsole
from fedveil.secret import Secret
from fedveil.shards import whole_folder
from fedveil.tasks import CausalLM, Prepared
from fedveil.training import Training, evaluate, generate

__all__ = ["GENERATION_SCHEMES", "GenerationSetting", "prepare", "run_generation_demo"]

GENERATION_SCHEMES: Mapping[str, Scheme] = {
    "fedavg-lora": FedLPP(bits=None),
    "fedlpp": FedLPP(bits=2),
    "fedqsn-lora": FedQSN(
        server_mask=0.02, client_mask=0.05, bits=8, backbone="once", adapter_bits=4
    ),
}
_TRAINING = Training(steps=8, batch_size=4, learning_rate=2e-3)
_GENERATING_THREADS = 2
"""Always as many, for the same words."""


@dataclass(frozen=True)
class GenerationSetting:
    """All numbers of the demo.

    Attributes:
        seed: Decides splits, the adapter's start, batch order and dropout.
        test_rows: The owner's test set.
        clients: Partners.
        rows: Headlines that each of them has.
        rounds: Rounds of each scheme; all clients take part in each.
        max_length: Tokens of a lead sentence and its headline.
        lora: Of ``peft.LoraConfig``.
        training: How a client trains in a round.
        shown: Headlines to be written by each model.
    """

    seed: int = 0
    test_rows: int = 48
    clients: int = 4
    rows: int = 64
    rounds: int = 3
    max_length: int = 80
    lora: Mapping[str, Any] = field(
        default_factory=lambda: {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    )
    training: Training = _TRAINING
    shown: int = 3


def run_generation_demo(
    out: Path,
    workers: int,
    console: Console | None = None,
    setting: GenerationSetting | None = None,
) -> None:
    """Run the demo; ``results.json`` and each method's adapter are written into ``out``.

    Args:
        out: The run folder; earlier demo runs in it are overwritten.
        workers: Client processes.
        console: Where to show progress and the results.
        setting: Other numbers than the demo's own.
    """
    console, setting = console or PlainConsole(), setting or GenerationSetting()
    with offline(), fast_matmul(), ConsoleProgress(console) as progress:
        with console.status("SmolLM2 is unpacked (once) and loaded"):
            model, task, clients, test, shown = prepare(setting)
        console.print(
            f"The owner has SmolLM2 (135 M parameters); {setting.clients} clients have "
            f"{setting.rows} headlines each, and teach it to write them.",
            soft_wrap=True,
        )
        with threads(_GENERATING_THREADS):
            base = evaluate(model, task, test, batch_size=16)["loss"]
        figures: dict[str, dict[str, Any]] = {}
        texts = {"as it was": _headlines(model, task, shown)}
        for name, scheme in GENERATION_SCHEMES.items():
            console.print()
            console.print(Text(name, "bold") + f": {_work(setting)}")
            started = time.perf_counter()
            federation = Federation(
                model,
                clients,
                task=task,
                scheme=scheme,
                training=setting.training,
                test=test,
                evaluation=Evaluation(proxies_every=setting.rounds, proxies=1, base=False),
                # Published here, so no secret at all: the same numbers every time.
                secret=Secret(hashlib.sha256(b"fedveil demo").digest()),
                seed=setting.seed,
                workers=workers,
                out=out / name,
                observer=progress,
                copy=False,
            )
            result = federation.run(setting.rounds, overwrite=True)
            figures[name] = _figures(result, base, time.perf_counter() - started)
            texts[name] = _headlines(result.global_model, task, shown)
            with quiet_transformers(), whole_folder(out / name / "adapter") as folder:
                result.global_model.save_pretrained(folder)  # type: ignore[operator]
    found = {"schemes": figures, "headlines": texts}
    write_whole(out / "results.json", json.dumps(found, indent=1), CheckpointError)
    _report(console, figures, texts, shown)
    console.print(f"figures: {out / 'results.json'}", soft_wrap=True)


def prepare(
    setting: GenerationSetting, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, CausalLM, dict[str, Prepared], Prepared, Sequence[Any]]:
    """Model with its adapter, task, clients' rows, test set, and the rows that are shown."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = bbc_headlines().shuffle(seed=setting.seed)
    folder = smollm2_folder()
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        backbone = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        model = add_adapter(backbone, "causal-lm", setting.lora)
    task = CausalLM(tokenizer, max_length=setting.max_length)
    test = rows.select(range(setting.test_rows))
    clients = {}
    for number in range(setting.clients):
        start = setting.test_rows + number * setting.rows
        clients[f"client-{number:02d}"] = task.prepare(
            rows.select(range(start, start + setting.rows))
        )
    return model, task, clients, task.prepare(test), list(test.select(range(setting.shown)))


def _headlines(model: nn.Module, task: CausalLM, rows: Sequence[Any]) -> list[str]:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=16, do_sample=False, no_repeat_ngram_size=4)
    with threads(_GENERATING_THREADS):
        return [text.split("\n")[0] for text in generate(model, task, rows, config=config)]


def _work(setting: GenerationSetting) -> str:
    steps = setting.training.steps
    return f"{setting.rounds} rounds of {setting.clients} clients, {steps} steps each"


def _figures(result: Result, base: float, seconds: float) -> dict[str, Any]:
    measures = result.rounds[-1].measures
    first, last = (_mean(result.rounds[place].bytes_down) for place in (0, -1))
    return {
        "base": base,
        **{view: measures[view]["loss"] if view in measures else None
           for view in ("global", "proxy_before", "proxy_after")},
        "bytes_down_first": first,
        "bytes_down_later": last,
        "bytes_up": result.mean_bytes_up(),
        "seconds": seconds,
    }  # fmt: skip


def _mean(sizes: Mapping[str, int]) -> float:
    return sum(sizes.values()) / max(1, len(sizes))


def _report(
    console: Console,
    figures: Mapping[str, Mapping[str, Any]],
    texts: Mapping[str, Sequence[str]],
    shown: Sequence[Any],
) -> None:
    headers = (
        "scheme\n", "base\n", "global\n", "proxy\nreceived", "proxy\ntrained", "down,\nround 1",
        "down,\nlater", "up\n",
    )  # fmt: skip
    table = Table(
        *(Column(header, no_wrap=True) for header in headers),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="loss in nats per token of a headline, lower is better; bytes per client and round",
        caption_justify="left",
    )
    for name, values in figures.items():
        losses = (values[view] for view in ("base", "global", "proxy_before", "proxy_after"))
        sizes = (values[key] for key in ("bytes_down_first", "bytes_down_later", "bytes_up"))
        table.add_row(
            name,
            *(DASH if loss is None else f"{loss:.2f}" for loss in losses),
            *map(human_bytes, sizes),
        )
    console.print()
    console.print(table)
    for number, row in enumerate(shown):
        console.print()
        console.print(Text(row["prompt"].splitlines()[0], "dim"), soft_wrap=True)
        console.print(f"  the editor:  {row['completion'].strip()}", soft_wrap=True)
        for name, written in texts.items():
            console.print(f"  {name}:  {written[number]}", soft_wrap=True)
    console.print()
