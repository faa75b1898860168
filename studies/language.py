"""Language models: what schemes cost in loss, in time and in memory.

    python -m studies.language losses              # the second demo by more schemes; 25 minutes
    python -m studies.language losses --seeds 3    # with other headlines, clients and adapters
    python -m studies.language audit               # what attackers get of two of them
    python -m studies.language speed               # training with LoRA beside plain PEFT
    python -m studies.language large               # a round of models of 1.2 and 1.6 billion

With a GPU: ``speed --device cuda --dtype bfloat16 --batch-size 64`` and ``large --device cuda``.
Every measurement of speed and memory is a process of its own, one after the other in one run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fedveil
from fedveil.audit import Evidence, audit
from fedveil.demo.generation import GenerationSetting, prepare
from fedveil.demo.setting import fast_matmul, offline
from fedveil.engine import Evaluation
from fedveil.engine.in_process import Workplace
from fedveil.hub.models import add_adapter, quiet_transformers
from fedveil.schemes import FedAvg, FedLPP, FedQSN, Scheme
from fedveil.tasks import CausalLM, Prepared
from fedveil.training import LocalRun, Training
from fedveil.wire import Message

ONCE: dict[str, Any] = {"backbone": "once", "adapter_bits": 4}
LOSSES: dict[str, Scheme] = {
    "FedAvg, LoRA": FedLPP(bits=None),
    "FedLPP, 4 bit": FedLPP(bits=4),
    "FedLPP, 3 bit": FedLPP(bits=3),
    "FedLPP, 2 bit": FedLPP(bits=2),
    "FedQSN + LoRA, 8 bit, no masks": FedQSN(server_mask=0, client_mask=0, bits=8, **ONCE),
    "FedQSN + LoRA, 8 bit, 2 and 5 %": FedQSN(server_mask=0.02, client_mask=0.05, bits=8, **ONCE),
    "FedQSN + LoRA, 8 bit, 5 and 10 %": FedQSN(server_mask=0.05, client_mask=0.1, bits=8, **ONCE),
    "FedQSN + LoRA, 4 bit, 2 and 5 %": FedQSN(server_mask=0.02, client_mask=0.05, block=64, **ONCE),
    "FedQSN + LoRA, 4 bit, 10 and 30 %": FedQSN(server_mask=0.1, client_mask=0.3, block=64, **ONCE),
}
AUDITED = ("FedLPP, 2 bit", "FedQSN + LoRA, 8 bit, 2 and 5 %")
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
SPEED: dict[str, Scheme | None] = {
    "plain PEFT": None,
    "FedAvg, LoRA": FedLPP(bits=None),
    "FedLPP, 3 bit": FedLPP(bits=3),
    "FedQSN + LoRA": FedQSN(**ONCE),
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2 XL": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "Llama 1B": (
        "llama",
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": ("llama", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                       "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}),
}  # fmt: skip
LARGE: dict[str, Scheme] = {"FedAvg": FedAvg(), "FedQSN": FedQSN(), "FedQSN + LoRA": FedQSN(**ONCE)}
SECRET = fedveil.Secret(hashlib.sha256(b"fedveil demo").digest())


class Tokens:
    """Stands for a tokenizer where rows are tokens already."""

    pad_token_id = eos_token_id = bos_token_id = 0


def losses(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Loss of base, global model and proxies, and bytes, over seeds."""
    rows = []
    for seed in range(options.seeds):
        setting = GenerationSetting(seed=seed)
        with offline(), fast_matmul():
            model, task, clients, test, _ = prepare(setting)
            for name, scheme in LOSSES.items():
                federation = fedveil.Federation(
                    model, clients, task=task, scheme=scheme, training=setting.training, test=test,
                    evaluation=Evaluation(proxies_every=setting.rounds, proxies=1, base=False),
                    secret=SECRET, seed=seed, workers=options.workers, copy=False,
                )  # fmt: skip
                result = federation.run(setting.rounds)
                measures = result.rounds[-1].measures
                row = {"scheme": name, "seed": seed}
                for view in ("global", "proxy_before", "proxy_after"):
                    row[view] = measures[view]["loss"]
                first, last = (mean(result.rounds[at].bytes_down.values()) for at in (0, -1))
                rows.append({**row, "first": first / 1e6, "later": last / 1e6})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def audits(options: argparse.Namespace) -> None:
    """The sentence of an audit of some schemes, for one client and three."""
    setting = GenerationSetting()
    with offline(), fast_matmul():
        model, task, clients, test, _ = prepare(setting)
        for name in AUDITED:
            with tempfile.TemporaryDirectory() as folder:
                federation = fedveil.Federation(
                    model, clients, task=task, scheme=LOSSES[name], training=setting.training,
                    test=test, secret=SECRET, workers=options.workers, copy=False, out=folder,
                    keep_messages="proxies", evaluation=Evaluation(every=0),
                )  # fmt: skip
                federation.run(setting.rounds)
                found = audit(Evidence(folder), federation.stage())
            print(f"{name}: {found.sentence}", flush=True)


def losses_table(rows: list[dict[str, Any]]) -> Table:
    keys = ("global", "proxy_before", "proxy_after", "first", "later")
    table = Table("scheme", "global", "proxy received", "trained", "MB down, round 1", "later")
    for name in LOSSES:
        own = [row for row in rows if row["scheme"] == name]
        cells = []
        for key in keys:
            values = [row[key] for row in own]
            spread = f" ({min(values):.2f}–{max(values):.2f})" if len(own) > 1 else ""
            cells.append(
                f"{mean(values):.2f}{spread}" if key in keys[:3] else f"{mean(values):.2f}"
            )
        table.add_row(name, *cells)
    return table


def speed(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Tokens per second of training, and peak memory, of one scheme or of a plain loop."""
    dtype, device = getattr(torch, options.dtype), options.device
    setting = GenerationSetting(rows=options.batch_size)
    with offline(), fast_matmul():
        model, task, clients, _, _ = prepare(setting, dtype=dtype)
        data = clients["client-00"]
        tokens = sum(data.lengths or ()) * options.steps
        training = Training(
            steps=options.steps, batch_size=options.batch_size, learning_rate=1e-4, device=device
        )
        scheme = SPEED[name]
        with peak(device) as memory:
            if scheme is None:
                seconds = plain(model, task, data, training)
            else:
                federation = fedveil.Federation(
                    model, {"a": data}, task=task, scheme=scheme, training=training,
                    secret=SECRET, copy=False,
                )  # fmt: skip
                seconds = federation.run(1).rounds[0].seconds
    return {"tokens": tokens / seconds, "seconds": seconds, **memory}


def plain(model: Any, task: CausalLM, data: Prepared, training: Training) -> float:
    """The same steps as anybody would write them with PEFT alone; how long they take."""
    device = training.device or "cpu"
    started = time.perf_counter()
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=training.learning_rate,
        fused=True,
    )
    rows: Any = data.rows
    batch = {name: tensor.to(device) for name, tensor in task.collate(rows).items()}
    for _ in range(training.steps or 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return time.perf_counter() - started


def speed_table(rows: dict[str, dict[str, float]]) -> Table:
    table = Table("scheme", "tokens/s", "of plain PEFT", "peak memory, GB", "on the device, GB")
    reference = rows["plain PEFT"]["tokens"]
    for name, row in rows.items():
        table.add_row(
            name, f"{row['tokens']:.0f}", f"{row['tokens'] / reference:.2f}",
            f"{row['host']:.1f}", f"{row['device']:.1f}",
        )  # fmt: skip
    return table


def large(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Seconds of each part of a round of one client, one step, and peak memory."""
    shape, scheme_name = name.split("/")
    kind, sizes = SHAPES[shape]
    scheme, device = LARGE[scheme_name], options.device
    with quiet_transformers() as transformers, peak(device) as memory:
        config = transformers.AutoConfig.for_model(kind, **sizes, use_cache=False)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, options.dtype)
        )
        count = sum(parameter.numel() for parameter in model.parameters())
        if "LoRA" in scheme_name:
            targets = ["c_attn"] if kind == "gpt2" else LORA["target_modules"]
            model = add_adapter(model, "causal-lm", {**LORA, "target_modules": targets})
        rows = [{"input_ids": [1 + n % 100 for n in range(options.length)]}] * options.batch_size
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
        task = CausalLM(Tokens(), max_length=options.length)
        training = Training(
            steps=1, batch_size=options.batch_size, device=device, optimizer=options.optimizer,
            gradient_checkpointing=True,
        )  # fmt: skip
        federation = fedveil.Federation(
            model, {"a": Prepared(rows)}, task=task, scheme=scheme, training=training,
            secret=SECRET, copy=False,
        )  # fmt: skip
        place = federation.workplace()
        took: dict[str, float] = {"parameters": count / 1e9}
        server = timed(took, "server", lambda: scheme.server(model, SECRET))
        timed(took, "begin", lambda: server.begin_round(1))
        sent = timed(took, "release", lambda: server.release("a").to_bytes())
        run = LocalRun(place.trainers["a"], seed=0)
        reply = timed(took, "client", lambda: answer(place, sent, run))
        timed(took, "absorb", lambda: server.absorb("a", Message.from_bytes(reply), 1.0))
        timed(took, "end", server.end_round)
    return {**took, "down": len(sent) / 1e6, "up": len(reply) / 1e6, **memory}


def answer(place: Workplace, sent: bytearray, run: LocalRun) -> bytearray:
    """The client's half of a round, from bytes to bytes."""
    message = Message.from_bytes(sent)
    return place.side.fit(message, place.architecture, run, {}).to_bytes()


def timed(took: dict[str, float], name: str, what: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = what()
    took[name] = time.perf_counter() - started
    return result


def large_table(rows: dict[str, dict[str, float]]) -> Table:
    parts = ("server", "begin", "release", "client", "absorb", "end")
    table = Table(
        "model, scheme", *(f"{part}, s" for part in parts), "MB down", "MB up",
        "peak memory, GB", "on the device, GB",
    )  # fmt: skip
    for name, row in rows.items():
        table.add_row(
            f"{name.replace('/', ', ')} ({row['parameters']:.2f} G)",
            *(f"{row[part]:.1f}" for part in parts),
            f"{row['down']:.0f}", f"{row['up']:.0f}", f"{row['host']:.1f}", f"{row['device']:.1f}",
        )  # fmt: skip
    return table


@contextmanager
def peak(device: str | None) -> Iterator[dict[str, float]]:
    """Peak memory of this process and of its device, in GB, once the context has ended."""
    found: dict[str, float] = {}
    yield found
    on_gpu = device is not None and device.startswith("cuda")
    found["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    found["device"] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0


def in_processes(options: argparse.Namespace, names: list[str]) -> dict[str, dict[str, float]]:
    """Each measurement in a process of its own; one that was killed for its memory is left out."""
    rows = {}
    for name in names:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--only", name], capture_output=True, text=True
        )
        if done.returncode == -signal.SIGKILL:
            print(f"{name}: killed, for want of memory", file=sys.stderr, flush=True)
            continue
        if done.returncode:
            sys.exit(f"{name}: {done.stderr}")
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, rows[name], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure what is asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("what", choices=("losses", "audit", "speed", "large"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16"))
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "sgd"))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens, of large")
    parser.add_argument("--models", nargs="*", default=["GPT-2 XL", "Llama 1B"], choices=SHAPES)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.what == "large" else "float32")
    if options.only is not None:
        print(json.dumps({"speed": speed, "large": large}[options.what](options, options.only)))
        return
    console = Console(width=160)
    if options.what == "losses":
        console.print(losses_table(losses(options)))
    elif options.what == "audit":
        audits(options)
    elif options.what == "speed":
        console.print(speed_table(in_processes(options, list(SPEED))))
    else:
        names = [f"{shape}/{scheme}" for shape in options.models for scheme in LARGE]
        console.print(large_table(in_processes(options, names)))


if __name__ == "__main__":
    main()
