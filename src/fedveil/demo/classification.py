"""The demo: an owner's text classifier, ten clients' private documents, four schemes side by side.

Everything is real and installs from packages: MiniLM-L6 (22.7 million parameters) and BBC News.
The same numbers come out every time.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from fedveil.audit import Evidence, audit
from fedveil.demo.setting import fast_matmul, offline
from fedveil.engine import Evaluation, Observer
from fedveil.engine.crew import threads
from fedveil.engine.in_process import start_importing
from fedveil.federation import Federation, Result, Tuning
from fedveil.hub import bbc_news, minilm_folder, partition
from fedveil.hub.models import quiet_transformers
from fedveil.report import summarize, write_summary
from fedveil.report.console import ConsoleProgress, table
from fedveil.report.page import write_page
from fedveil.report.pictures import plot
from fedveil.run.folder import RunFolder
from fedveil.schemes import FedAvg, FedQSN, Scheme
from fedveil.screen import PlainConsole
from fedveil.secret import Secret
from fedveil.shards import whole_folder
from fedveil.tasks import Prepared, TextClassification
from fedveil.training import Trainer, Training

__all__ = [
    "SCHEMES",
    "Scene",
    "Setting",
    "build_federation",
    "own_data_alone",
    "prepare",
    "run_demo",
]

SCHEMES: Mapping[str, Scheme] = {
    "fedavg": FedAvg(),
    "fedqsn-paper": FedQSN.paper(),
    "fedqsn": FedQSN(),
    "fedqsn-regmean": FedQSN.once(),
    "fedqsn-public": FedQSN.once(server_mask=0.0),
}
SHOWN = ("fedavg", "fedqsn-paper", "fedqsn-regmean", "fedqsn-public")
"""Schemes that the demo runs, the last of which is the one to be preferred."""
RELEASED_ONCE = ("fedqsn-regmean", "fedqsn-public")
"""Schemes that release one proxy per client, and let the clients do all their work on that."""
OF_PUBLIC = ("fedqsn-public",)
"""Schemes that release the public model, and nothing of the owner's, which was tuned from it."""
AUDITED = ("fedqsn-paper", "fedqsn-public")
"""Schemes whose bytes are kept, and attacked at the end: as published, and ours."""

_AUDIT_THREADS = 2
"""Always as many, for the same figures; the workers are gone by then."""

_WORKER_MODULES = ("transformers.models.bert.modeling_bert", "fedveil.training")
_OWNER_TRAINING = Training(steps=24, learning_rate=1e-4)
# Embeddings are half of the model: leaving them alone saves time and bytes on the way up.
_TRAINING = Training(steps=10, batch_size=8, learning_rate=2e-4, frozen=("*.embeddings.*",))


@dataclass(frozen=True)
class Setting:
    """All numbers of the demo.

    Attributes:
        seed: Decides splits, the new head, sampling, batch order and dropout.
        owner_documents: Documents on which the owner tunes the public model beforehand.
        judging_documents: More of the owner's, not tuned on: where clients train the public model,
            they say what the owner's is to be made of. With 0 those say it that were tuned on, and
            clients have as many more.
        test_documents: The owner's test set.
        clients: Partners; classes are skewed by Dirichlet(alpha).
        rounds: Rounds of each scheme.
        clients_per_round: Partners that take part in a round.
        max_length: Tokens of a document that the classifier reads.
        owner_training: How the owner tunes beforehand, and on what clients taught the public model.
        training: How a client trains in a round.
        total_steps: Steps of a client in all rounds together, on average: what it takes as well if
            it tunes the base on its own data alone, or is sent a single proxy.
        measured_proxies: Clients of the last round whose proxies are measured.
        releases: How many proxies a client may be sent at most; None for any number.
    """

    seed: int = 0
    owner_documents: int = 60
    judging_documents: int = 60
    test_documents: int = 400
    clients: int = 10
    alpha: float = 0.3
    rounds: int = 5
    clients_per_round: int = 8
    max_length: int = 24
    owner_training: Training = _OWNER_TRAINING
    training: Training = _TRAINING
    total_steps: int = 40
    measured_proxies: int = 2
    releases: int | None = None

    def at_once(self) -> Setting:
        """One round of all clients, in which each takes all its steps."""
        return replace(
            self,
            rounds=1,
            releases=1,
            clients_per_round=self.clients,
            measured_proxies=self.clients,
            training=replace(self.training, steps=self.total_steps),
        )


@dataclass(frozen=True)
class Scene:
    """The base, rows that it was tuned on, the owner's others, the clients', and a public model."""

    base: nn.Module
    public: nn.Module
    tokenizer: Any
    task: TextClassification
    tuned: Prepared
    owner: Prepared
    clients: Mapping[str, Prepared]
    test: Prepared


def run_demo(
    out: Path, workers: int, console: Console | None = None, setting: Setting | None = None
) -> None:
    """Run the demo and write ``summary.json``, ``summary.png`` and the tuned model into ``out``.

    Args:
        out: The run folder; earlier demo runs in it are overwritten.
        workers: Client processes.
        console: Where to show progress and the table.
        setting: Other numbers than the demo's own.
    """
    console, setting = console or PlainConsole(), setting or Setting()
    RunFolder(out).check(("summary.json", "summary.png", "model"))
    with offline(), fast_matmul(), ConsoleProgress(console) as progress:
        console.print(
            f"The owner tunes MiniLM (22.7 M parameters) on {setting.owner_documents} documents of "
            f"its own; {setting.clients} clients hold the others, each mostly of few classes.",
            soft_wrap=True,
        )
        if workers > 1:
            start_importing(_WORKER_MODULES)
        scene = prepare(setting)
        own = Text("own data alone", "bold") + ": each client tunes the base by itself"
        console.print()
        console.print(own)
        base, own_data = own_data_alone(scene, setting, workers, progress)
        schemes = {}
        for name in SHOWN:
            at = setting.at_once() if name in RELEASED_ONCE else setting
            console.print()
            console.print(Text(name, "bold") + f": {_work(at)}")
            started = time.perf_counter()
            federation = build_federation(
                scene, at, SCHEMES[name], workers, out / name, progress,
                keep=name in AUDITED, public=name in OF_PUBLIC,
            )  # fmt: skip
            result = federation.run(at.rounds, overwrite=True)
            seconds = time.perf_counter() - started
            schemes[name] = summarize(name, result, seconds=seconds, base=base, own_data=own_data)
            if name in AUDITED:
                _audit(out / name, federation, scene, console)
    _report(out, result, schemes, scene, console)


def prepare(setting: Setting) -> Scene:
    """Split the documents, and let the owner tune the public model on its own."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    documents = bbc_news().shuffle(seed=setting.seed)
    sizes = (setting.test_documents, setting.owner_documents, setting.judging_documents)
    ends = (*accumulate(sizes), len(documents))
    test, tuned, judging, others = (documents.select(range(*part)) for part in pairwise((0, *ends)))
    clients = partition(
        others,
        setting.clients,
        how="dirichlet",
        alpha=setting.alpha,
        min_size=20,
        seed=setting.seed,
    )
    torch.manual_seed(setting.seed)  # the classification head starts at random
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
        model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=5)
    task = TextClassification(tokenizer, num_labels=5, max_length=setting.max_length)
    public = copy.deepcopy(model)
    with threads(1):
        Trainer(task, tuned, setting.owner_training).train(model, seed=setting.seed)
    own = task.prepare(tuned)
    return Scene(
        model, public, tokenizer, task,
        tuned=own,
        owner=task.prepare(judging) if setting.judging_documents else own,
        clients={name: task.prepare(data) for name, data in clients.items()},
        test=task.prepare(test),
    )  # fmt: skip


def own_data_alone(
    scene: Scene, setting: Setting, workers: int, observer: Observer | None = None
) -> tuple[float, float]:
    """Accuracy, in percent, of the base, and of the clients' models if each tunes it by itself.

    The latter is a mean over clients. That is one round of FedAvg that is never averaged: what each
    client holds after training.
    """
    evaluation = Evaluation(received=False)  # everyone receives the base
    federation = build_federation(
        scene, setting.at_once(), FedAvg(), workers, None, observer, evaluation
    )
    result = federation.run(1)
    assert result.base is not None
    alone_after = result.rounds[-1].measures["proxy_after"]
    return result.base["accuracy"], alone_after["accuracy"]


def build_federation(
    scene: Scene,
    setting: Setting,
    scheme: Scheme,
    workers: int,
    out: Path | None = None,
    observer: Observer | None = None,
    evaluation: Evaluation | None = None,
    *,
    keep: bool = False,
    public: bool = False,
) -> Federation:
    """The scene's clients under one scheme, which releases the owner's model or the public one."""
    return Federation(
        scene.base,
        scene.clients,
        task=scene.task,
        scheme=scheme,
        public=scene.public if public else None,
        owner=scene.owner if public else None,
        tuning=Tuning(scene.tuned, setting.owner_training) if public else None,
        # With few classes each, they would teach a model that is merged once to forget the others.
        training=replace(setting.training, own_classes=public),
        test=scene.test,
        evaluation=evaluation or Evaluation(proxies=setting.measured_proxies, base=False),
        clients_per_round=setting.clients_per_round,
        releases=setting.releases,
        # Published here, so no secret at all: the demo must print the same numbers every time.
        secret=Secret(hashlib.sha256(b"fedveil demo").digest()),
        seed=setting.seed,
        workers=workers,
        out=out,
        keep_messages="proxies" if keep else False,
        observer=observer,
    )


def _audit(folder: Path, federation: Federation, scene: Scene, console: Console) -> None:
    """What attackers make of what was sent, in a sentence; the page tells the rest."""
    with console.status("audit") as status, threads(_AUDIT_THREADS):
        found = audit(Evidence(folder), federation.stage(scene.public), tell=status.update)
    RunFolder(folder).claim("audit.json")
    found.write(folder)
    page = write_page(folder)
    console.print(Text(found.sentence, style="bold"), soft_wrap=True)
    console.print(Text(f"audit, {found.seconds:.0f} s: {page}"), soft_wrap=True)


def _work(setting: Setting) -> str:
    rounds = "1 round" if setting.rounds == 1 else f"{setting.rounds} rounds"
    clients, steps = setting.clients_per_round, setting.training.steps
    return f"{rounds} of {clients} clients, {steps} steps each"


def _report(
    out: Path,
    result: Result,
    schemes: Mapping[str, dict[str, Any]],
    scene: Scene,
    console: Console,
) -> None:
    summary = {"fp32_bytes": result.parameters_bytes, "schemes": schemes}
    place = RunFolder(out)
    place.claim("summary.json")
    path = write_summary(out, result.parameters_bytes, schemes)
    plot(summary, place.claim("summary.png"))
    with quiet_transformers(), whole_folder(place.claim("model")) as folder:
        result.global_model.save_pretrained(folder)  # type: ignore[operator]
        scene.tokenizer.save_pretrained(folder)
    console.print()
    console.print(table(summary))
    console.print()
    for line in (
        f"figures: {path}",
        f"picture: {out / 'summary.png'}",
        f"the owner's tuned model, which no client ever received: {out / 'model'}",
    ):
        console.print(Text(line), soft_wrap=True)
