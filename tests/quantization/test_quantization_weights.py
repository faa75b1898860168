"""Real sizes, zeros, empty selections, and what is refused."""

import math

import pytest
import torch

from fedveil.errors import ConfigurationError
from fedveil.quantization import BITS, QuantizedTensor, quantize


def gaussian(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("bits", "least", "most"),
    [(2, 0.50, 0.65), (3, 0.200, 0.220), (4, 0.091, 0.099), (8, 0.004, 0.007)],
)
def test_relative_error_on_gaussian_weights(bits, least, most, double):
    weight = gaussian(1536, 384)
    error = quantize(weight, bits=bits, double=double).dequantize() - weight
    assert least <= float(error.norm() / weight.norm()) <= most


@pytest.mark.parametrize(("double", "expected"), [(True, 4 + 8 / 64 + 32 / 384), (False, 4.5)])
def test_bits_per_parameter_of_a_feed_forward_matrix(double, expected):
    packed = quantize(gaussian(1536, 384), double=double)
    assert packed.nbytes * 8 / (1536 * 384) == expected


@pytest.mark.parametrize("bits", BITS)
def test_a_block_of_zeros_decodes_to_exact_positive_zeros(bits):
    weight = gaussian(4, 130)
    weight[1] = 0
    weight[2, 64:128] = -0.0
    decoded = quantize(weight, bits=bits).dequantize()
    for zeros in (decoded[1], decoded[2, 64:128]):
        assert torch.equal(zeros, torch.zeros_like(zeros))
        assert not zeros.signbit().any()


@pytest.mark.parametrize(("shape", "axis"), [((0, 7), 0), ((7, 0), 1), ((3, 0, 2), 1)])
def test_a_weight_without_units_works(shape, axis):
    packed = quantize(torch.empty(shape), axis=axis)
    assert packed.dequantize().shape == shape
    assert packed.nbytes == 0


def test_a_vector_has_units_of_one_value():
    vector = gaussian(9)
    torch.testing.assert_close(quantize(vector).dequantize(), vector)


def test_a_unit_beyond_the_chunk_size_works():
    weight = gaussian(2, 2**20 + 3)
    assert torch.equal(quantize(weight).select(torch.tensor([1])).codes, quantize(weight[1:]).codes)


def test_a_small_block_beside_a_large_one_keeps_its_scale_above_zero():
    weight = torch.full((1, 128), 1e-6)
    weight[0, :64] = 1
    packed = quantize(weight)
    assert packed.scales.tolist() == [[255, 1]]
    assert (packed.dequantize()[0, 64:] >= 0).all()


def test_a_parameter_is_quantized_and_decoded_into_without_its_gradient():
    parameter = torch.nn.Parameter(gaussian(4, 8))
    packed = quantize(parameter)
    packed.dequantize(parameter)
    assert torch.equal(parameter.detach(), packed.dequantize())
    assert not packed.dequantize().requires_grad


def test_selected_units_have_memory_of_their_own():
    packed = quantize(gaussian(4, 8))
    chosen = packed.select(torch.arange(4))
    chosen.codes.zero_()
    assert packed.codes.any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 5}, "2, 3, 4 or 8"),
        ({"block": 0}, "block size"),
        ({"block": -64}, "block size"),
        ({"block": 64.0}, "block size"),
        ({"block": 2**31}, "block size"),
        ({"axis": 2}, "no such axis"),
        ({"axis": -1}, "no such axis"),
        ({"axis": True}, "no such axis"),
    ],
)
def test_impossible_settings_are_refused(options, said):
    with pytest.raises(ConfigurationError, match=said):
        quantize(gaussian(4, 8), **options)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(3, 4, dtype=torch.int32),
        torch.ones(3, 4, dtype=torch.bool),
        torch.ones(3, 4, dtype=torch.complex64),
        torch.tensor(1.0),
        torch.empty(4, 0),
        [[1.0]],
    ],
)
def test_what_is_no_weight_is_refused(weight):
    with pytest.raises(ConfigurationError):
        quantize(weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_unit(value):
    weight = gaussian(6, 8)
    weight[4, 3] = value
    with pytest.raises(ConfigurationError, match=r"NaN or infinity.*first in unit 4"):
        quantize(weight)


def test_values_beyond_float32_are_refused():
    with pytest.raises(ConfigurationError, match="NaN or infinity"):
        quantize(torch.tensor([[1e300]], dtype=torch.float64))


@pytest.mark.parametrize(
    "units",
    [torch.tensor([4]), torch.tensor([-1]), torch.tensor([[0]]), torch.tensor([0.0]), [0]],
)
def test_choosing_units_that_are_not_there_is_refused(units):
    with pytest.raises(ConfigurationError):
        quantize(gaussian(4, 8)).select(units)


@pytest.mark.parametrize("out", [torch.empty(8, 4), torch.empty(4, 8, dtype=torch.int64)])
def test_decoding_into_the_wrong_tensor_is_refused(out):
    with pytest.raises(ConfigurationError, match="cannot decode"):
        quantize(gaussian(4, 8)).dequantize(out)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 3},
        {"bits": 7},
        {"block": 4},
        {"axis": 1},
        {"shape": (5, 8)},
        {"shape": ()},
        {"shape": (-4, -8)},
        {"codes": torch.zeros(4, 4)},
        {"codes": None},
        {"scales": torch.ones(4, 1)},
        {"unit_scales": None},
        {"unit_scales": torch.ones(3)},
        {"unit_scales": torch.ones(4, dtype=torch.float64)},
    ],
)
def test_parts_that_do_not_fit_are_refused(change):
    packed = quantize(gaussian(4, 8))
    fields = ("bits", "block", "axis", "shape", "codes", "scales", "unit_scales")
    with pytest.raises(ConfigurationError):
        QuantizedTensor(**{name: getattr(packed, name) for name in fields} | change)
