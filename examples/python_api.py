"""A federation in Python: a small network, four clients, generated data. Runs in seconds."""

import torch
from torch import nn

import fedveil


def make_rows(count: int, seed: int) -> list[dict]:
    """Noisy 8 x 8 images whose class (0, 1 or 2) is the row that is brighter."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        label = number % 3
        image = 0.5 * torch.randn(1, 8, 8, generator=generator)
        image[0, 2 * label + 1] += 1.0
        rows.append({"image": image, "label": label})
    return rows


def main() -> fedveil.Result:
    """Fine-tune the network without showing it to a client, nor the data to the server."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 3))
    federation = fedveil.Federation(
        model,
        clients={f"clinic-{number}": make_rows(60, seed=number) for number in range(4)},
        task=fedveil.ImageClassification(num_labels=3),
        scheme=fedveil.FedQSN(server_mask=0.1, client_mask=0.3, bits=4),
        training=fedveil.Training(epochs=1, learning_rate=3e-3),
        test=make_rows(300, seed=99),
        evaluation=fedveil.Evaluation(proxies_every=1),
    )
    result = federation.run(rounds=5)
    assert result.base is not None
    print(f"base model     {result.base['accuracy']:5.1f} %")
    for name, measure in result.rounds[-1].measures.items():
        print(f"{name:<14} {measure['accuracy']:5.1f} %")
    share = result.mean_bytes_down() / result.parameters_bytes
    print(f"a proxy is {100 * share:.1f} % of the model's bytes in float32")
    return result


if __name__ == "__main__":
    main()
