"""Plain nets: what can be cut is cut like a smaller net, and the rest is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from units_families import randomise
from units_removal import Scatter, drop_inputs, drop_outputs, masks, others, zeroed

from fedveil.errors import UnknownArchitectureError
from fedveil.units import find_units

HIDDEN = {"neurons": [1, 2], "channels": [0, 2], "columns": [0, 2]}


def cnn(activation: nn.Module | None = None) -> Any:
    """Conv-BN-PReLU-pool, depthwise-BN, Conv, flatten-BN-Linear, Linear; 3 class logits."""
    layers = [
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.PReLU(4),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.BatchNorm2d(4),
        activation or nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.PReLU(),
        nn.Flatten(),
        nn.BatchNorm1d(12),
        nn.Dropout(),
        nn.Linear(12, 5),
        activation or nn.Sigmoid(),
        nn.Linear(5, 3),
    ]
    return randomise(nn.Sequential(*layers))


def images(channels: int = 2) -> Tensor:
    return torch.randn(3, channels, 6, 6, generator=torch.Generator().manual_seed(2))


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def smaller_cnn(net: Any) -> Any:
    net = copy.deepcopy(net)
    keep = others(4, HIDDEN["channels"])
    for layer in (0, 1, 2, 4, 5):
        drop_outputs(net[layer], keep)
    net[2].num_parameters = net[4].in_channels = net[4].groups = len(keep)
    drop_inputs(net[7], keep)
    drop_outputs(net[7], others(3, HIDDEN["channels"]))
    flat = others(12, HIDDEN["channels"], width=4)
    drop_outputs(net[10], flat)
    drop_inputs(net[12], flat)
    drop_outputs(net[12], others(5, HIDDEN["neurons"]))
    drop_inputs(net[14], others(5, HIDDEN["neurons"]))
    return net


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.Softplus(), nn.GELU()])
def test_zeros_equal_a_smaller_cnn(activation: nn.Module, training: bool) -> None:
    net = cnn(activation)
    net[11].p = 0.0  # dropout draws other numbers for other widths
    groups = find_units(net)
    assert [(g.name, g.kind, g.size) for g in groups] == [
        ("0", "channels", 4),
        ("7", "channels", 3),
        ("12", "neurons", 5),
    ]
    covered = masks(groups, net.state_dict(), HIDDEN)
    hidden, small = zeroed(net, covered), smaller_cnn(net)
    for key, whole in net.state_dict().items():
        if "num_batches" not in key:
            assert torch.equal(whole[~covered[key]], small.state_dict()[key].flatten()), key
    before = run(net.train(training), images())
    after = run(hidden.train(training), images())
    torch.testing.assert_close(after, run(small.train(training), images()), rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_columns_stop_at_the_layer_itself() -> None:
    net = randomise(
        nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5), nn.Linear(5, 2)
        )
    )
    groups = find_units(net, "columns")
    cut = {(s.tensor, s.axis): s.scaled for g in groups for s in g.slices}
    assert cut == {
        ("0.weight", 0): False,
        ("0.bias", 0): False,
        ("1.weight", 0): True,
        ("1.bias", 0): True,
        ("1.running_mean", 0): False,
        ("1.running_var", 0): False,
        ("3.weight", 0): True,
        ("3.bias", 0): True,
    }
    hidden = zeroed(net, masks(groups, net.state_dict(), HIDDEN))
    small = copy.deepcopy(net)
    keep = others(6, HIDDEN["columns"])
    drop_outputs(small[0], keep)
    drop_outputs(small[1], keep)
    small[1] = Scatter(small[1], keep, 6)
    drop_outputs(small[3], others(5, HIDDEN["columns"]))
    small[3] = Scatter(small[3], others(5, HIDDEN["columns"]), 5)
    x = torch.randn(3, 4)
    torch.testing.assert_close(run(hidden, x), run(small, x))


class Tutorial(nn.Module):
    def __init__(self, flatten: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 2)
        self.fc1 = nn.Linear(6 if flatten == "mean" else 24, 5)
        self.fc2, self.flatten = nn.Linear(5, 3), flatten

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = self.conv2(x).relu()
        if self.flatten == "size":
            x = x.view(x.size(0), -1)
        elif self.flatten == "shape":
            x = x.reshape((x.shape[0], -1))
        elif self.flatten == "minus":
            x = x.view(-1, 24)
        elif self.flatten == "torch":
            x = torch.flatten(x, 1)
        else:
            x = x.mean((2, 3))
        x = F.dropout(F.gelu(self.fc1(x)), training=self.training)
        return F.log_softmax(self.fc2(x), dim=-1)


@pytest.mark.parametrize("flatten", ["size", "shape", "minus", "torch", "mean"])
def test_functions_and_views_are_followed(flatten: str) -> None:
    net = randomise(Tutorial(flatten))
    groups = find_units(net)
    assert [group.name for group in groups] == ["conv1", "conv2", "fc1"]
    small = copy.deepcopy(net)
    for layer, reader, kind in (
        (small.conv1, small.conv2, "channels"),
        (small.conv2, small.fc1, "channels"),
        (small.fc1, small.fc2, "neurons"),
    ):
        count = layer.weight.shape[0]
        width = 4 if reader is small.fc1 and flatten != "mean" else 1
        drop_outputs(layer, others(count, HIDDEN[kind]))
        drop_inputs(reader, others(count * width, HIDDEN[kind], width))
    hidden = zeroed(net, masks(groups, net.state_dict(), HIDDEN))
    if flatten == "minus":
        small.forward = lambda x: F.log_softmax(  # its view has the old size written into it
            small.fc2(F.gelu(small.fc1(_features(small, x).flatten(1)))), dim=-1
        )
    torch.testing.assert_close(run(hidden, images()), run(small, images()), rtol=1e-5, atol=1e-5)


def _features(net: Tutorial, x: Tensor) -> Tensor:
    return net.conv2(F.max_pool2d(F.relu(net.conv1(x)), 2)).relu()


class Residual(nn.Module):
    """Only conv1 has a single reader; the outputs of stem and conv2 are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3, padding=1)
        self.norm, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv2(F.relu(self.norm(self.conv1(x)))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_residual_sums_are_not_cut() -> None:
    net = randomise(Residual())
    groups = find_units(net)
    assert [group.name for group in groups] == ["conv1"]
    small = copy.deepcopy(net)
    keep = others(6, HIDDEN["channels"])
    drop_outputs(small.conv1, keep)
    drop_outputs(small.norm, keep)
    drop_inputs(small.conv2, keep)
    hidden = zeroed(net, masks(groups, net.state_dict(), HIDDEN))
    torch.testing.assert_close(run(hidden, images()), run(small, images()), rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    """Three linear layers of the same size with something in the middle."""

    def __init__(self, middle) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self, x)


@pytest.mark.parametrize(
    "middle",
    [
        lambda net, x: net.b(torch.softmax(net.a(x), -1)),
        lambda net, x: net.b(net.a(x).t()),
        lambda net, x: net.b(torch.cat([net.a(x), x], 0)),
        lambda net, x: net.b(net.a(x).view(4, -1)),
        lambda net, x: net.b(net.a(x) * net.a(x)),
        lambda net, x: net.b(net.a(net.a(x))),
        lambda net, x: net.b(F.relu(net.a(x))) + F.linear(x, net.a.weight),
        lambda net, x: F.linear(net.a(x), net.b.weight),
        lambda net, x: net.b(F.layer_norm(net.a(x), (4,))),
        lambda net, x: (net.b(y := net.a(x)), y),
        lambda net, x: net.b(F.max_pool1d(net.a(x), 1)),
        lambda net, x: net.b(net.a(x).mean(1)),
    ],
)
@pytest.mark.parametrize("choice", ["neurons", "columns"])
def test_what_may_mix_units_is_not_cut(middle, choice: str) -> None:
    with pytest.raises(UnknownArchitectureError, match="can be cut"):
        find_units(Net(middle), choice)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(2, 4, 3), nn.Linear(4, 3)],  # acts on the image's width
        [nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.Linear(16, 3)],
        [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2)],
        [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3)],
        [nn.Linear(2, 4), nn.Flatten(), nn.Linear(12, 3)],  # [batch, 3, 4] interleaves units
        [nn.Linear(2, 4), nn.AvgPool1d(2), nn.Linear(2, 3)],
        [nn.Linear(2, 4), nn.GLU(), nn.Linear(2, 3)],
        [nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)), nn.Linear(4, 3)],
        [nn.Linear(2, 4)],
        # Another dimension than the convolution's: channels are an axis of the image to it.
        [nn.Conv2d(1, 8, 3), nn.MaxPool3d((2, 1, 1)), nn.Flatten(), nn.Linear(144, 3)],
        [nn.Conv2d(1, 8, 3), nn.MaxPool3d(1), nn.Conv2d(8, 3, 3)],
        [nn.Conv2d(1, 8, 3), nn.AvgPool3d((2, 1, 1)), nn.Flatten(), nn.Linear(144, 3)],
        [nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool3d((4, 6, 6)), nn.Flatten(), nn.Linear(144, 3)],
        [nn.Conv2d(1, 8, 3), nn.AdaptiveMaxPool3d((8, 6, 6)), nn.Flatten(), nn.Linear(288, 3)],
        [nn.Conv2d(1, 8, 3), nn.MaxPool1d(2), nn.Conv2d(8, 3, 3)],
        [nn.Conv1d(1, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)],
        [nn.Conv1d(1, 8, 3), nn.AdaptiveAvgPool2d((8, 4)), nn.Flatten(), nn.Linear(32, 3)],
        [nn.Conv1d(1, 8, 3), nn.AvgPool2d((1, 2)), nn.Flatten(), nn.Linear(32, 3)],
        [nn.Conv3d(1, 8, 3), nn.MaxPool2d(2), nn.Conv3d(8, 3, 3)],
        [nn.Linear(2, 8), nn.MaxPool1d(2), nn.Linear(4, 3)],
        [nn.Linear(2, 8), nn.AdaptiveAvgPool1d(8), nn.Linear(8, 3)],
        [nn.Conv1d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv1d(8, 3, 3)],
        [nn.Conv2d(1, 8, 3), nn.BatchNorm1d(8), nn.Conv2d(8, 3, 3)],
        [nn.Conv2d(1, 8, 3), nn.BatchNorm3d(8), nn.Conv2d(8, 3, 3)],
        [nn.Linear(2, 8), nn.BatchNorm2d(8), nn.Linear(8, 3)],
        [nn.Conv2d(1, 4, 3), nn.Flatten(), nn.BatchNorm2d(36), nn.Linear(36, 3)],
        [nn.Linear(2, 8), nn.BatchNorm1d(5), nn.Linear(8, 3)],  # [batch, 5 tokens, 8]
        [nn.Linear(2, 8), nn.PReLU(5), nn.Linear(8, 3)],
        [nn.Conv2d(1, 8, 3), nn.Conv3d(8, 3, 1)],
        [nn.Conv2d(1, 8, 3), nn.Conv1d(8, 3, 1)],
        [nn.Conv2d(1, 8, 3), nn.Conv3d(8, 8, 1, groups=8), nn.Conv2d(8, 3, 1)],
        # Across channels, or of another order.
        [nn.Conv2d(1, 8, 3), nn.LocalResponseNorm(2), nn.Conv2d(8, 3, 3)],
        [nn.Conv2d(1, 8, 3), nn.ChannelShuffle(2), nn.Conv2d(8, 3, 3)],
        [nn.Conv2d(1, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 3, 3)],
        [nn.Conv2d(1, 8, 3), nn.PixelUnshuffle(2), nn.Conv2d(32, 3, 3)],
        [nn.Conv2d(1, 8, 3), nn.Softmax2d(), nn.Conv2d(8, 3, 3)],
        [nn.Conv2d(1, 8, 3), nn.Softmax(1), nn.Conv2d(8, 3, 3)],
        [nn.Conv2d(1, 8, 3), nn.GLU(1), nn.Conv2d(4, 3, 3)],
        [nn.Conv2d(1, 8, 3), nn.LPPool2d(2, 2), nn.Conv2d(8, 3, 2)],
        [nn.Conv2d(1, 8, 3), nn.FractionalMaxPool2d(2, 3), nn.Conv2d(8, 3, 2)],
        [nn.Conv2d(1, 8, 3), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 2)],
        [nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 3, 2)],
        [nn.Conv2d(1, 8, 3), nn.FeatureAlphaDropout(), nn.Conv2d(8, 3, 2)],
        [nn.Conv2d(1, 4, 3), nn.Flatten(0), nn.Linear(64, 3)],
        [nn.Conv2d(1, 4, 3), nn.Flatten(0, 1), nn.Linear(4, 3)],
        [nn.Conv2d(1, 4, 3), nn.Flatten(1, 2), nn.Linear(4, 3)],
        [nn.Conv2d(1, 4, 3), nn.Flatten(-2), nn.Linear(16, 3)],
        [nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Unflatten(1, (4, 16)), nn.Linear(16, 3)],
    ],
)
def test_unclear_layouts_are_not_cut(layers: list[nn.Module]) -> None:
    with pytest.raises(UnknownArchitectureError, match="can be cut"):
        find_units(nn.Sequential(*layers))


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pool3d(x, (2, 1, 1)),
        lambda x: F.avg_pool3d(x, (2, 1, 1)),
        lambda x: F.adaptive_avg_pool3d(x, (4, 6, 6)),
        lambda x: F.adaptive_max_pool3d(x, (4, 6, 6)),
        lambda x: torch.max_pool3d(x, (2, 1, 1)),
        lambda x: F.lp_pool2d(x, 2, 1),
        lambda x: x.amax(1, keepdim=True),
        lambda x: torch.mean(x, 1, keepdim=True),
        lambda x: x.mean((1, 2), keepdim=True),
        lambda x: torch.flatten(x, 1, 2),
        lambda x: F.local_response_norm(x, 2),
    ],
)
def test_functions_across_channels_are_not_cut(pool) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.read = nn.Conv2d(1, 8, 3), nn.Linear(144, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(torch.flatten(pool(self.conv(x)), 1))

    with pytest.raises(UnknownArchitectureError, match="can be cut"):
        find_units(Pooled())


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("pool", ["MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"])
def test_pools_of_the_dimension_of_the_convolution_are_followed(pool: str, n: int) -> None:
    conv, norm = getattr(nn, f"Conv{n}d"), getattr(nn, f"BatchNorm{n}d")
    layers = [
        conv(2, 4, 3), norm(4), getattr(nn, f"{pool}{n}d")(2),
        nn.Flatten(), nn.BatchNorm1d(4 * 2**n), nn.Linear(4 * 2**n, 3),
    ]  # fmt: skip
    net = randomise(nn.Sequential(*layers))
    small, keep = copy.deepcopy(net), others(4, [0, 2])
    for layer in (small[0], small[1]):
        drop_outputs(layer, keep)
    drop_outputs(small[4], others(4 * 2**n, [0, 2], 2**n))
    drop_inputs(small[5], others(4 * 2**n, [0, 2], 2**n))
    (group,) = find_units(net)
    hidden = zeroed(net, masks([group], net.state_dict(), {"channels": [0, 2]}))
    x = torch.randn(3, 2, *[6] * n)
    torch.testing.assert_close(run(hidden, x), run(small, x), rtol=1e-5, atol=1e-5)


def test_tied_layers_are_not_cut() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    net[2].weight = net[0].weight
    with pytest.raises(UnknownArchitectureError):
        find_units(net)


def test_batch_norm_without_weights() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))
    (group,) = find_units(net)
    assert [cut.tensor for cut in group.slices] == [
        "0.weight",
        "0.bias",
        "1.running_mean",
        "1.running_var",
        "2.weight",
    ]
