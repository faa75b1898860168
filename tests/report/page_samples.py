"""Runs and audits of several sizes, as realistic as figures made up by a formula can be."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import torch
from torch import nn

from fedveil import Evaluation, Federation, FedQSN, ImageClassification, Secret, Training
from fedveil.run import Attacked, Audit, Checked, ClientExposure, Manifest, RoundRecord, UpdateGuess
from fedveil.run.manifest import TensorInfo

ATTACKS = ("latest", "pooling", "averaging", "distillation of answers")
LIMITS = (
    "Attacks that nobody has thought of yet.",
    "What clients learn from one another outside of the federation.",
    "Values on a test set of another kind than the owner's.",
)
SCHEME = {
    "name": "fedqsn", "server_mask": 0.1, "client_mask": 0.3, "bits": 4, "units": "mlp",
    "policy": "fresh", "aggregation": {"name": "mean"}, "update_bits": None, "block": 192,
}  # fmt: skip


def client_names(count):
    return [f"client-{number:02d}" for number in range(count)]


def audit(
    clients=3, rounds=2, *, attacks=2, alarms=(), seed=0, strongest=82.0, scheme=SCHEME, base=54.0
):
    """An audit in which attackers get better with rounds and coalitions, up to `strongest`."""
    dice = random.Random(seed)
    names = client_names(clients)
    final, own = 88.4 + 0.3 * seed, 60.0 + dice.uniform(-1, 1)
    sizes = sorted({1, min(2, clients), min(5, clients), clients})
    tried = [
        Attacked("fine-tuning", tuple(names[:size]), 0, False, "base", "", measures(own))
        for size in sizes
    ]
    for strength, name in enumerate(ATTACKS[:attacks], start=1):
        for polish in ("", "fine-tuning")[: 1 + (attacks > 2)]:
            top = strongest - 4 * (attacks - strength) - (0 if polish or attacks <= 2 else 2)
            for size in sizes:
                for seen in sorted({1, min(2, rounds), rounds}):
                    reached = top - 14 / size / seen
                    tried.append(attacked(name, names[:size], seen, polish, reached, own, final))
    exposure = {name: exposed(rounds, random.Random(f"{seed}{name}")) for name in names}
    return Audit(
        sentence=(
            f"The strongest attack with what {clients} clients were sent reaches "
            f"{strongest:.1f} %; your model reaches {final:.1f} %, and without a released byte "
            f"the attacker reaches {own:.1f} %."
        ),
        scheme=scheme,
        rounds=rounds,
        metric="accuracy",
        models={
            "base": measures(base), "public": measures(21.5), "global": measures(final),
            "server_model": measures(final + 0.7),
        },
        attacks=tried,
        checks=[
            Checked("withheld-units", "sound", "No message holds a withheld unit: 45 were read."),
            Checked("masks", "not applicable", "The scheme does not say how it draws masks."),
            *(Checked(check, "alarm", found) for check, found in alarms),
            Checked("secret", "sound", "The secret is in no message."),
        ],
        exposure=exposure,
        coalitions={size: 1 - 0.37 ** size for size in sizes},
        inferred=[UpdateGuess(names[0], n, 0.3 + 0.02 * n, 0.61) for n in range(1, rounds)],
        bytes_down=dict.fromkeys(names, 10500000 * rounds),
        full=attacks > 2,
        seconds=12.5 * attacks,
        not_protected=LIMITS,
    )  # fmt: skip


def measures(accuracy):
    return {"accuracy": accuracy, "loss": 4 - accuracy / 25}


def attacked(name, clients, rounds, polish, reached, own, final):
    return Attacked(
        name, tuple(clients), rounds, True, "public" if polish else "zeros", polish,
        measures(reached), (reached - own) / (final - own), (reached - 54) / (final - 54),
        0.092 / rounds, None if rounds > 3 else 1.0 / rounds,
        "Holes hold what the public model has there." if polish else "",
    )  # fmt: skip


def exposed(rounds, dice):
    """Sent something in most rounds; each time a part of what is missing is shown."""
    after, share = {}, 0.0
    for number in range(1, rounds + 1):
        if dice.random() < 0.8 or number == rounds:
            share += (0.9 - share) * dice.uniform(0.05, 0.7) * min(1, 8 / rounds)
            after[number] = share
    return ClientExposure(share, 4.4 * share, after, 0.3 * (0.9 - share))


def in_nats(found):
    """The same audit of a language model: losses are lower where accuracies are higher."""
    return dataclasses.replace(
        found,
        metric="loss",
        models={name: of_language(one) for name, one in found.models.items()},
        attacks=[
            dataclasses.replace(one, measures=of_language(one.measures)) for one in found.attacks
        ],
    )


def of_language(measures):
    return {**measures, "perplexity": math.exp(measures["loss"])}


def spoken(lines):
    """The same rounds of a language model."""
    return [
        dataclasses.replace(
            one, measures={view: of_language(reached) for view, reached in one.measures.items()}
        )
        for one in lines
    ]


def records(clients=3, rounds=2, *, measured=True, failures=0, final=88.4):
    found = []
    for number in range(1, rounds + 1):
        names = random.Random(number).sample(client_names(clients), max(1, 4 * clients // 5))
        progress = final - 34 * (0.6**number - 0.6**rounds)
        views = {"global": progress, "server_model": progress - 1.2} if measured else {}
        if measured and (number == rounds or number % 3 == 0):
            views |= {"proxy_before": progress - 17, "proxy_after": progress - 19}
        found.append(RoundRecord(
            number,
            bytes_down={name: 10_500_000 + 1000 * i for i, name in enumerate(names)},
            bytes_up=dict.fromkeys(names[failures:], 32000000),
            failed=dict.fromkeys(names[:failures], "The loss is not finite: found nan."),
            examples=dict.fromkeys(names[failures:], 40),
            loss_first=dict.fromkeys(names, 1.6 * 0.8 ** number),
            loss_last=dict.fromkeys(names, 1.4 * 0.8 ** number),
            measures={view: measures(value) for view, value in views.items()},
            metrics={"clients": len(names), "update_norm": 0.5 / number},
            seconds=3.2,
        ))  # fmt: skip
    return found


def write_run(folder, clients=3, rounds=2, *, found=None, lines=None, seed=0, **configuration):
    """The folder of a run: run.json, metrics.jsonl and, if `found`, audit.json."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "scheme": dict(SCHEME) if found is None else dict(found.scheme),
        "training": {"steps": 10, "batch_size": 8, "learning_rate": 5e-5, "frozen": ["embed*"]},
        "clients": dict.fromkeys(client_names(clients), 40),
        "clients_per_round": max(1, 4 * clients // 5),
        "releases": None,
        "seed": seed,
        "secret": "d888c75fc366bb75",
        "model": "343936f1d5c31f7cc4dc933c5e14d807",
        **configuration,
    }
    tensors = {
        "layer.weight": TensorInfo("float32", (5_676, 4_000)),
        "layer.bias": TensorInfo("float32", (4_000,)),
    }
    Manifest(settings, tensors).write(folder)
    lines = records(clients, rounds) if lines is None else lines
    text = "".join(json.dumps(record.to_json()) + "\n" for record in lines)
    (folder / "metrics.jsonl").write_text(text)
    if found is not None:
        found.write(folder)
    return folder


def hostile(text):
    """An audit with a text wherever a text may be."""
    plain = audit(3, 2, alarms=[("check", "found")])
    return dataclasses.replace(
        plain,
        sentence=text,
        scheme={"name": text, "note": text},
        attacks=[
            dataclasses.replace(
                one, attack=text, holes=text, polish=text, note=text, clients=(text,)
            )
            for one in plain.attacks
        ],
        checks=[Checked(text, outcome, text) for outcome in ("alarm", "sound", "not applicable")],
        exposure={text: plain.exposure["client-00"]},
        not_protected=[text],
    )  # fmt: skip


def real_run(folder: Path, *, rounds=2, clients=3, test=True, scheme=None):
    """A small federation that really ran."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    rows = [{"image": torch.randn(1, 4, 5), "label": j % 3} for j in range(8)]
    federation = Federation(
        net,
        dict.fromkeys(client_names(clients), rows),
        task=ImageClassification(num_labels=3),
        scheme=scheme or FedQSN(policy="fresh", units="neurons"),
        training=Training(steps=1, batch_size=4),
        secret=Secret(bytes(32)),
        test=rows if test else None,
        evaluation=Evaluation(proxies_every=1),
        out=folder,
        keep_messages=True,
    )
    federation.run(rounds)
    return folder
