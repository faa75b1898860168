"""A small convolutional network, named in mnist.toml as "mnist_model:build"."""

from torch import nn


def build(num_labels: int = 10) -> nn.Module:
    """Make the network for images of 28 x 28 grey pixels.

    Args:
        num_labels: Number of classes; fedveil passes what the file or the data say.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, num_labels),
    )
