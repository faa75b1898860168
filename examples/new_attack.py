"""An attack of one's own: one function, which the audit tries as soon as it is registered.

This one asks whether a release is worth more with a little of the public model in it: quantization
errors of both are averaged, as in model soups (Wortsman et al. 2022, arXiv 2203.05482).
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import fedveil
from fedveil.audit import Evidence, audit
from fedveil.audit.attacks import Coalition, Stolen, interpolate, register_attack
from fedveil.run import Audit


# 1. Say what it is. `begins` says what it is given: "messages", or a "model" made of them.
@register_attack(
    "soup with the public model",
    title="averaged with the public model",
    does="averages the stolen model and the public one",
    source="model soups: Wortsman et al. 2022, arXiv 2203.05482",
    begins="model",
)
def soup(coalition: Coalition) -> Iterator[Stolen]:
    """Halfway between the public and the stolen model; nothing where nothing is public."""
    # 2. Use what attackers have: `Coalition` lists it. Without what you need, yield nothing.
    public = coalition.stage.public
    if public is not None:
        # 3. Yield each model that you make. The audit measures it and writes it down.
        yield Stolen(interpolate(public, coalition.start, 0.5))


def make_rows(count: int, seed: int) -> list[dict]:
    """Noisy 8 x 8 images whose class (0, 1 or 2) is the row that is brighter."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        image = 0.5 * torch.randn(1, 8, 8, generator=generator)
        image[0, 2 * (number % 3) + 1] += 0.5
        rows.append({"image": image, "label": number % 3})
    return rows


def main() -> Audit:
    """Run a small federation, keep what clients were sent, and attack it with everything."""
    torch.manual_seed(0)
    public = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 3))
    with tempfile.TemporaryDirectory() as folder:
        federation = fedveil.Federation(
            public,
            clients={f"clinic-{number}": make_rows(15, seed=number) for number in range(4)},
            task=fedveil.ImageClassification(num_labels=3),
            scheme=fedveil.FedQSN(),
            training=fedveil.Training(epochs=5, learning_rate=3e-3),
            test=make_rows(300, seed=99),
            keep_messages=True,
            out=Path(folder),
        )
        federation.run(3)
        # 4. Audit: a full one tries every attack, a quick one those that are registered as quick.
        found = audit(Evidence(folder), federation.stage(public), full=True, coalitions=[1])
    for attack in found.attacks:
        if attack.polish == "soup with the public model":
            print(f"{attack.polish}: {attack.measures['accuracy']:.1f} %")
    print(found.sentence)
    return found


if __name__ == "__main__":
    main()
