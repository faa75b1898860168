"""A federation in Python: a small network, eight clinics, generated data. Runs in seconds."""

import copy
from typing import Any

import torch
from torch import nn

import fedveil
from fedveil.training import Trainer


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Noisy 8 x 8 images whose class (0, 1 or 2) is the row that is brighter."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        label = number % 3
        image = 0.5 * torch.randn(1, 8, 8, generator=generator)
        image[0, 2 * label + 1] += 0.5
        rows.append({"image": image, "label": label})
    return rows


def main() -> fedveil.Result:
    """Fine-tune the owner's network without showing it to a client, nor the data to the server."""
    task = fedveil.ImageClassification(num_labels=3)
    torch.manual_seed(0)
    public = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 3))
    tuned, others = make_rows(9, seed=50), make_rows(30, seed=51)

    # The owner's model, made of one that anybody can have with rows that only the owner has.
    tuning = fedveil.Training(epochs=10, batch_size=10, learning_rate=3e-3)
    model = copy.deepcopy(public)
    Trainer(task, task.prepare(tuned), tuning).train(model, seed=1)

    federation = fedveil.Federation(
        model,
        clients={f"clinic-{number}": make_rows(15, seed=number) for number in range(8)},
        task=task,
        public=public,  # this is what clients are sent
        owner=others,  # these say how much the owner's model learns of what they teach it
        tuning=fedveil.Tuning(tuned, tuning),  # and this is done once more
        training=fedveil.Training(epochs=10, learning_rate=3e-3),
        test=make_rows(300, seed=99),
        evaluation=fedveil.Evaluation(proxies_every=1),
    )
    result = federation.run()  # one round
    assert result.base is not None
    print(f"base model     {result.base['accuracy']:5.1f} %")
    for name, measure in result.rounds[-1].measures.items():
        print(f"{name:<14} {measure['accuracy']:5.1f} %")
    share = result.mean_bytes_down() / result.parameters_bytes
    print(f"a proxy is {100 * share:.1f} % of the model's bytes in float32")
    return result


if __name__ == "__main__":
    main()
