"""Peak memory of a federation, of checkpoints and of loading, in multiples of fp32 bytes.

    python benchmarks/memory.py                       # a random Llama-like model of 250 million
    python benchmarks/memory.py --millions 60 round-1

Each case runs in a process of its own, which says when its libraries are loaded and its inputs are
there; all that it and its workers come to hold beyond that counts. ``held`` is the sampled peak of
memory that only this run can use (anonymous and shared pages, the latter divided among processes);
``mapped`` adds the file pages that were in memory at that moment, which the system can take back
whenever it wants. The owner's own model counts in the rounds: it is made after the mark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fedveil import Federation, FedQSN, Secret, Training
from fedveil.run.checkpoint import Checkpoint, CheckpointFolder
from fedveil.run.records import RoundRecord
from fedveil.schemes import ServerState
from fedveil.schemes.global_model import GlobalModel
from fedveil.shards import SHARD_BYTES, load_into, save_shards
from fedveil.state import architecture_of, read_state
from fedveil.tasks import Measure, Prepared

MARK = "ready"
_PAUSE = 0.01
_CONFIGURATION = {"benchmark": "memory"}


class NextToken:
    """A causal language model's task on rows of token numbers."""

    name = "next-token"

    def validate(self, data: Any) -> None:
        """Everything goes."""

    def prepare(self, data: Any) -> Prepared:
        return data if isinstance(data, Prepared) else Prepared(data)

    def collate(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor(list(batch))}

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        logits = model(input_ids=batch["tokens"]).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, batch["tokens"][:, 1:].flatten())

    def measure(self, model: nn.Module, batch: Any) -> Measure:
        return Measure(len(batch["tokens"]), float(self.loss(model, batch)), 0)


def llama(millions: int) -> nn.Module:
    """A random model of about so many million parameters in float32, as Llama is built."""
    import transformers

    hidden = 1024 if millions >= 150 else 512
    inner, vocabulary = 11 * hidden // 4, 32_000
    layer = 4 * hidden**2 + 3 * hidden * inner
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=max(1, round((millions * 1e6 - 2 * vocabulary * hidden) / layer)),
        num_attention_heads=hidden // 64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def fp32_bytes(model: nn.Module) -> int:
    return 4 * sum(t.numel() for t in read_state(model).values())


def a_round(
    millions: int, folder: Path, *, workers: int = 1, test: bool = False, mapped: bool = False
) -> int:
    """One round of two clients with one step each, checkpoint included."""
    import transformers

    if mapped:
        _prepare(millions, folder / "model")
    ready()
    if mapped:
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "model")
    else:
        model = llama(millions)
    options = {"copy": False} if mapped else {}
    rows: Any = [[(7 * i + j) % 1000 for j in range(8)] for i in range(2)]
    federation = Federation(
        model,
        {"a": rows, "b": rows},
        task=NextToken(),
        scheme=FedQSN(),
        training=Training(steps=1, batch_size=1),
        test=rows if test else None,
        secret=Secret(bytes(range(32))),
        workers=workers,
        out=folder / "run",
        **options,  # type: ignore[arg-type]
    )
    result = federation.run(1)
    return fp32_bytes(result.global_model)


def a_save(millions: int, folder: Path) -> int:
    """A checkpoint of tensors that are there."""
    model = llama(millions)
    tensors = read_state(model)
    ready()
    _save(tensors, folder)
    return fp32_bytes(model)


def a_resume(millions: int, folder: Path) -> int:
    """A checkpoint read back into a server's working copy."""
    model = llama(millions)
    server = GlobalModel(read_state(model))
    size = fp32_bytes(model)
    _save(read_state(model), folder)
    del model
    ready()
    found = CheckpointFolder(folder).load(_CONFIGURATION)
    assert found is not None
    server.restore(found.state.tensors)
    return size


def a_load(millions: int, folder: Path) -> int:
    """A Hugging Face folder of several shards, as `fedveil run` loads it, and used once."""
    import transformers

    _prepare(millions, folder)
    ready()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for tensor in read_state(model).values():
        tensor.sum()
    return fp32_bytes(model)


def a_result(millions: int, folder: Path) -> int:
    """The tuned model in shards, as `fedveil run` saves it."""
    model: Any = llama(millions)
    ready()
    model.save_pretrained(folder / "model", max_shard_size=SHARD_BYTES)
    return fp32_bytes(model)


def a_plain_load(millions: int, folder: Path) -> int:
    """A folder of shards loaded into a model that was made on the meta device, and read once."""
    model = llama(millions)
    save_shards(read_state(model), folder / "model")
    size, empty = fp32_bytes(model), architecture_of(model, "meta")
    del model
    ready()
    for tensor in read_state(load_into(empty, folder / "model")).values():
        tensor.sum()
    return size


def _prepare(millions: int, folder: Path) -> None:
    """A folder of shards, written by a process of its own."""
    child = [sys.executable, __file__, "--prepare", str(folder), "--millions", str(millions)]
    subprocess.run(child, check=True, stdout=subprocess.DEVNULL)


def _save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    checkpoint = Checkpoint(ServerState(tensors, {"round": 1}), [RoundRecord(1)], _CONFIGURATION)
    CheckpointFolder(folder).save(checkpoint)


CASES: dict[str, tuple[str, Callable[[int, Path], int]]] = {
    "round-1": ("a round, 1 worker", a_round),
    "round-1-test": ("a round, 1 worker, with a test set", partial(a_round, test=True)),
    "round-1-mapped": (
        "a round, 1 worker, model mapped, copy=False",
        partial(a_round, mapped=True),
    ),
    "round-2": ("a round, 2 workers", partial(a_round, workers=2)),
    "round-2-mapped": (
        "a round, 2 workers, model mapped, copy=False",
        partial(a_round, workers=2, mapped=True),
    ),
    "save": ("a checkpoint saved", a_save),
    "resume": ("a checkpoint loaded into the server", a_resume),
    "result": ("a tuned model saved in shards", a_result),
    "load": ("a Hugging Face folder loaded and read once", a_load),
    "load-plain": ("the same into a plain model from the meta device", a_plain_load),
}


def ready() -> None:
    """What is held from now on counts; waits until that is noted."""
    print(MARK, flush=True)
    sys.stdin.readline()


def held(pid: int) -> tuple[int, int]:
    """Bytes that a process and all below it hold: without and with mapped files."""
    own = whole = 0
    for one in (pid, *descendants(pid)):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue  # it has ended
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        own += sizes["Pss_Anon"] + sizes["Pss_Shmem"]
        whole += sizes["Pss"]
    return own, whole


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            yield child
            yield from descendants(child)


class Sampler(threading.Thread):
    """Looks again and again at what a process holds, and keeps the most."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.over = pid, threading.Event()
        self.own = self.whole = 0

    def run(self) -> None:
        while not self.over.is_set():
            started = time.perf_counter()
            own, whole = held(self.pid)
            self.own, self.whole = max(self.own, own), max(self.whole, whole)
            # Whoever is looked at waits for it: half of the time it works.
            time.sleep(max(_PAUSE, time.perf_counter() - started))


def measure(case: str, millions: int) -> dict[str, float]:
    """Peaks of one case, in multiples of the model's fp32 bytes."""
    with tempfile.TemporaryDirectory(prefix="fedveil-memory-") as folder:
        command = [sys.executable, __file__, "--child", folder, "--millions", str(millions), case]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            while (line := process.stdout.readline().strip()) != MARK:
                assert line or process.poll() is None, f"{case} failed"
            before, sampler = held(process.pid), Sampler(process.pid)
            sampler.start()
            process.stdin.write("\n")
            process.stdin.flush()
            size = int(process.stdout.read().split()[-1])
            sampler.over.set()
            sampler.join()
    return {
        "held": (sampler.own - before[0]) / size,
        "mapped": (sampler.whole - before[1]) / size,
        "fp32_bytes": size,
    }


def main() -> None:
    """Measure, print a table, write ``runs/memory/results.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--millions", type=int, default=250, help="parameters of the model")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    if arguments.prepare:
        model: Any = llama(arguments.millions)
        model.save_pretrained(arguments.prepare, max_shard_size="200MB")
        return
    if arguments.child:
        print(CASES[arguments.cases[0]][1](arguments.millions, arguments.child), flush=True)
        return
    table = Table("", "held", "with mapped files", title=f"{arguments.millions} M parameters")
    results = {}
    for case in arguments.cases or CASES:
        results[case] = found = measure(case, arguments.millions)
        table.add_row(CASES[case][0], f"{found['held']:.2f}", f"{found['mapped']:.2f}")
    Console().print(table)
    facts = {"machine": platform.machine(), "torch": torch.__version__}
    path = Path("runs/memory/results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    facts |= {"millions": arguments.millions}
    path.write_text(json.dumps({"facts": facts, "results": results}, indent=1))
    Console().print(f"Multiples of the model's fp32 bytes. Written to {path}")


if __name__ == "__main__":
    main()
