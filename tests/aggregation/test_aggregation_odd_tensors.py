"""Tensors that are no ordinary weights: each is aggregated, or named with what to do about it."""

import pytest
import torch
from torch import nn

from fedveil import ConfigurationError, FedAvg, FedQSN
from fedveil.aggregation import StreamingMean
from fedveil.selection import Selection
from toys import federation, mlp

SCHEMES = {
    "mean": FedAvg(),
    "regmean": FedAvg(aggregation="regmean"),
    "masked": FedQSN(),
    "masked regmean": FedQSN(units="neurons", aggregation="regmean"),
}


def with_extra(tensor, parameter=False):
    model = mlp()
    if parameter:
        model.extra = nn.Parameter(tensor)
    else:
        model.register_buffer("extra", tensor)
    return model


class Scaled(nn.Module):
    """A parameter without axes, as temperatures are."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = mlp(), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.net(x) * self.scale


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
class TestAFederation:
    @pytest.mark.parametrize(
        "tensor",
        [torch.tensor([True, False]), torch.tensor(3), torch.tensor([1, 2], dtype=torch.uint8),
         torch.arange(3, dtype=torch.int32)],
        ids=lambda t: str(t.dtype),
    )  # fmt: skip
    def test_leaves_integers_as_they_are(self, scheme, tensor):
        result = federation(with_extra(tensor), scheme=scheme).run(1)
        assert not result.rounds[0].failed
        assert torch.equal(result.global_model.extra, tensor)

    def test_averages_what_has_no_axes(self, scheme):
        result = federation(Scaled(), scheme=scheme).run(1)
        assert not result.rounds[0].failed
        assert float(result.global_model.scale.detach()) != 2.0


@pytest.mark.parametrize("scheme", [FedQSN(), FedAvg()], ids=["masked", "mean"])
def test_a_compiled_model_is_named_with_the_remedy(scheme):
    with pytest.raises(ConfigurationError, match=r"compiled.*_orig_mod"):
        federation(torch.compile(mlp(), backend="eager"), scheme=scheme)  # type: ignore[arg-type]


@pytest.mark.parametrize("average", ["holders", "participants"])
def test_a_mean_of_scalars_is_weighted(average):
    sums = StreamingMean({"scale": torch.Size([])}, average)
    for value, weight in ((1.0, 1.0), (4.0, 3.0)):
        sums.add({"scale": torch.tensor(value)}, Selection((), {}, {}), weight)
    mean = sums.mean("scale")
    assert mean is not None
    assert float(mean) == pytest.approx(13 / 4)
    assert mean.shape == torch.Size([])
