"""What each form of Gram costs, and what it gives: docs/regmean.md has the tables.

    python -m studies.grams accuracy      # seeds 0 1 2 on the demo's task; about 10 minutes
    python -m studies.grams cost          # one layer of each width; a few minutes
    python -m studies.grams reveals       # which words a client's first Gram gives away

`accuracy` trains every client once per seed, takes all forms of Grams of the same trained models,
and merges each by itself. `reveals` guesses from the Gram of the first layer which tokens are in
a client's documents; 50 is chance. `cost` runs each width in a process of its own, to see its
memory.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import statistics
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fedveil.aggregation import Mean, Observed, RegMean, RegMeanSums, Replay
from fedveil.aggregation.gram import Moments
from fedveil.aggregation.linear import linear_layers
from fedveil.demo import Scene, Setting, fast_matmul, prepare
from fedveil.schemes import FedQSN
from fedveil.secret import Secret
from fedveil.selection import Selection
from fedveil.state import load_state, read_state
from fedveil.tasks import Prepared
from fedveil.training import LocalRun, Trainer, evaluate
from fedveil.wire import Message
from studies.results import Results

FORMS: dict[str, Mean | RegMean] = {
    "mean (no Grams)": Mean(),
    "whole, float32": RegMean(bits=None),
    "whole, 8 bit (default)": RegMean(),
    "whole, 4 bit": RegMean(bits=4),
    "blocks of 512": RegMean(size=512),
    "blocks of 128": RegMean(size=128),
    "low rank 128": RegMean(form="low-rank", size=128),
    "low rank 32": RegMean(form="low-rank", size=32),
    "low rank 8": RegMean(form="low-rank", size=8),
    "off-diagonals x 1": RegMean(off_diagonal=1.0),
    "off-diagonals x 0.5": RegMean(off_diagonal=0.5),
    "diagonal only": RegMean(off_diagonal=0.0),
    "32 examples": RegMean(examples=32),
    "without the first layer": RegMean(exclude=("*.layer.0.*",)),
    "clip 1, noise 0.001": RegMean(clip=1.0, noise=0.001),
    "clip 1, noise 0.01": RegMean(clip=1.0, noise=0.01),
}
WIDTHS = (768, 1536, 3072, 4096)
WIDE = 11008


@dataclass
class AllForms:
    """Takes Grams in every form from one trained model, and sends none."""

    observed: dict[str, Observed] = field(default_factory=dict)

    def observe(
        self, model: nn.Module, replay: Replay, changed: Collection[str], selection: Selection
    ) -> Observed:
        """See `fedveil.aggregation.Aggregation`."""
        taken: dict[Mean | RegMean, Observed] = {}
        for name, form in FORMS.items():
            # These two are used by the server only.
            same = form
            if isinstance(form, RegMean):
                same = replace(form, off_diagonal=0.9, ridge=1e-3)
            if same not in taken:
                taken[same] = form.observe(model, replay, changed, selection)
            self.observed[name] = taken[same]
        return Observed()


def accuracies(scene: Scene, setting: Setting) -> dict[str, dict[str, float]]:
    """Accuracy of the global and the server model by form, and megabytes of Grams per client."""
    secret, at = Secret(bytes(32)), setting.at_once()
    schemes = {
        n: FedQSN(client_mask=0.0, aggregation=form, block=64, shrink=False)
        for n, form in FORMS.items()
    }
    servers = {name: scheme.server(scene.base, secret) for name, scheme in schemes.items()}
    for server in servers.values():
        server.begin_round(1)
    forms, sizes = AllForms(), dict[str, list[int]]()
    # A client only observes.
    side = replace(
        FedQSN(client_mask=0.0, shrink=False).client(),
        aggregation=forms,  # type: ignore[arg-type]
    )
    model = copy.deepcopy(scene.base)
    for number, (client, data) in enumerate(sorted(scene.clients.items())):
        trainer = Trainer(scene.task, data, at.training)
        proxies = [server.release(client) for server in servers.values()]
        update = side.fit(proxies[0], model, LocalRun(trainer, seed=number))
        for name, server in servers.items():
            observed = forms.observed[name]
            reply = Message(
                "update", "fedqsn", 1, client, {**update.sections, **observed.sections},
                {**update.scalars, **observed.scalars},
            )  # fmt: skip
            sizes.setdefault(name, []).append(len(reply.to_bytes()) - len(update.to_bytes()))
            server.absorb(client, reply, float(trainer.examples))
    values = {}
    for name, server in servers.items():
        server.end_round()
        values[name] = {"megabytes": statistics.mean(sizes[name]) / 1e6}
        for view in server.views:
            load_state(model, server.view(view))
            values[name][view] = evaluate(model, scene.task, scene.test)["accuracy"]
    return values


def run_accuracy(seeds: list[int], results: Results, console: Console) -> None:
    """Run the seeds that are missing and print the table."""
    for seed in seeds:
        setting = replace(Setting(judging_documents=0), seed=seed)
        if not all(results.has(name, seed) for name in FORMS):
            for name, values in accuracies(prepare(setting), setting).items():
                if not results.has(name, seed):
                    results.add(name, seed, values)
                    console.print(f"seed {seed}, {name}: {values}", soft_wrap=True)
    table = Table("Grams", "seeds", "global", "range", "server model", "MB up for Grams")
    for name in FORMS:
        rows = results.of(name)
        finals = [row["global"] for row in rows]
        table.add_row(
            name, str(len(rows)), f"{statistics.mean(finals):.1f}",
            f"{min(finals):.1f} to {max(finals):.1f}",
            f"{statistics.mean(row['server_model'] for row in rows):.1f}",
            f"{statistics.mean(row['megabytes'] for row in rows):.2f}",
        )  # fmt: skip
    console.print(table)


def cases() -> Iterator[tuple[str, int, int, RegMean]]:
    """Name, outputs, inputs and form of each layer whose cost is measured."""
    for width in WIDTHS:
        yield f"{width}, whole", width, width, RegMean(size=width)
        yield f"{width}, blocks of 512", width, width, RegMean(size=512)
        yield f"{width}, low rank 128", width, width, RegMean(form="low-rank", size=128)
    for form in (
        RegMean(size=WIDE),
        RegMean(),
        RegMean(size=512),
        RegMean(form="low-rank", size=128),
    ):
        word = "whole" if form.size == WIDE else f"{form.form} {form.size}"
        yield f"{WIDE}, {word}", 4096, WIDE, form


def cost(outputs: int, inputs: int, form: RegMean) -> dict[str, float]:
    """Seconds and megabytes for one layer: taking, sending, adding and solving, two clients."""
    torch.set_num_threads(1)
    linear = nn.Linear(inputs, outputs, bias=False)
    layer = nn.Sequential(linear)
    everything, layers = Selection((), {}, {}), linear_layers(layer)
    shapes = {"0.weight": linear.weight.shape}
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1024, inputs, generator=generator)
    update = torch.randn(outputs, inputs, generator=generator)
    floor = _resident()
    took = {}

    started = time.perf_counter()
    moments = Moments(inputs, form.form, form.size, torch.device("cpu"))
    moments.add(rows)
    gram = moments.gram(1024, None)
    took["take"] = time.perf_counter() - started
    observed = form.codec.encode({"0.weight": gram}, {"0.weight": "0.weight"})
    data = Message("update", "cost", 1, "client", observed.sections, observed.scalars).to_bytes()
    del gram, moments, observed
    took["client peak MB"] = (_peak() - floor) / 1e6

    sums = RegMeanSums(shapes, layers, form)
    started = time.perf_counter()
    for _ in range(2):
        _, grams = sums.read(Message.from_bytes(data), everything)
        sums.add({"0.weight": update}, everything, 1.0, grams)
    took["add one client"] = (time.perf_counter() - started) / 2
    del grams
    started = time.perf_counter()
    sums.mean("0.weight")
    took["solve"] = time.perf_counter() - started
    took["peak MB"] = (_peak() - floor) / 1e6
    return {**took, "MB up": len(data) / 1e6, "update MB": 4e-6 * outputs * inputs}


def first_inputs(scene: Scene) -> Iterator[torch.Tensor]:
    """What the first layer would see of every token, [tokens, inputs], place after place."""
    base: Any = scene.base
    embeddings = base.bert.embeddings.eval()
    tokens = torch.arange(base.config.vocab_size)[:, None]
    for place in range(1, Setting().max_length - 1):
        with torch.no_grad():
            yield embeddings(input_ids=tokens, position_ids=torch.full_like(tokens, place))[:, 0]


def reveals(documents: int, form: RegMean, scene: Scene, inputs: list[torch.Tensor]) -> float:
    """How well tokens that occur in a client's documents are told from others, as AUC in percent.

    Whoever knows the embeddings knows what the first layer would see of each token at each place.
    Those that are in the data lie in directions where the Gram is large.
    """
    client = max(scene.clients, key=lambda name: len(scene.clients[name]))
    rows = scene.clients[client].select(range(documents))
    trainer = Trainer(scene.task, Prepared(rows), Setting().training)
    name, everything = "bert.encoder.layer.0.attention.self.query.weight", Selection((), {}, {})
    observed = form.observe(scene.base, trainer.replay, {name}, everything)
    reply = Message("update", "x", 1, "client", observed.sections, observed.scalars)
    shapes = {key: tensor.shape for key, tensor in read_state(scene.base).items()}
    _, grams = form.codec.decode(reply, linear_layers(scene.base), shapes, everything)
    blocks = grams[name].dense(1.0, 1e-3)
    gram = torch.block_diag(*blocks).double()  # type: ignore[no-untyped-call]
    half = torch.linalg.inv(torch.linalg.cholesky(_lifted(gram))).float()
    far = torch.stack([(seen @ half.t()).square().sum(dim=1) for seen in inputs]).amin(dim=0)
    present = torch.zeros(len(far), dtype=torch.bool)
    for row in rows:
        present[list(row["input_ids"])[1:-1]] = True
    ranks = torch.empty(len(far), dtype=torch.float64)
    ranks[far.argsort(descending=True)] = torch.arange(1, len(far) + 1, dtype=torch.float64)
    inside = int(present.sum())
    above = float(ranks[present].sum()) - inside * (inside + 1) / 2
    return 100 * above / (inside * (len(far) - inside))


def _lifted(gram: torch.Tensor) -> torch.Tensor:
    """The nearest matrix, or so, that noise has not made negative."""
    values, vectors = torch.linalg.eigh(gram)
    floor = 1e-4 * float(gram.diagonal().mean())
    lifted: torch.Tensor = (vectors * values.clamp_min(floor)) @ vectors.t()
    return lifted


def run_reveals(console: Console) -> None:
    """Print how much is recognised, by form and number of documents."""
    scene, counts = prepare(Setting(judging_documents=0)), (1, 4, 16, 64)
    inputs = list(first_inputs(scene))
    table = Table("Gram of the first layer", *(f"{count} documents" for count in counts))
    for name in (
        "whole, float32",
        "whole, 8 bit (default)",
        "low rank 32",
        "clip 1, noise 0.001",
        "clip 1, noise 0.01",
    ):
        form = FORMS[name]
        assert isinstance(form, RegMean)
        aucs = [reveals(count, form, scene, inputs) for count in counts]
        table.add_row(name, *(f"{auc:.1f}" for auc in aucs))
    console.print(table)


def _peak() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return float(fields[1]) * resource.getpagesize()


def run_cost(console: Console) -> None:
    """Measure every case in a fresh process and print the table."""
    columns = ("take", "add one client", "solve", "client peak MB", "peak MB", "MB up", "update MB")
    table = Table("layer, Gram", *columns)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, outputs, inputs, form in cases():
            took = pool.apply(cost, (outputs, inputs, form))
            table.add_row(name, *(f"{took[column]:.2f}" for column in columns))
            console.print(name, {k: round(v, 3) for k, v in took.items()}, soft_wrap=True)
    console.print(table)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("accuracy", "cost", "reveals"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/grams"))
    arguments = parser.parse_args()
    if arguments.what == "cost":
        run_cost(Console(width=200))
    elif arguments.what == "reveals":
        run_reveals(Console(width=120))
    else:
        run_accuracy(arguments.seeds, Results(arguments.out), Console(width=120))


if __name__ == "__main__":
    with fast_matmul():  # as the demo
        main()
