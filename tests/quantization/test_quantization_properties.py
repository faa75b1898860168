"""What holds for every weight: against a naive quantizer, and against the definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_samples import ORDINARY, plain_python_unit, same, settings_of_quantizer, weights

from fedveil.quantization import NormalFloat, quantize
from fedveil.quantization import tensor as tensor_module
from fedveil.quantization.blockwise import scale_values
from fedveil.quantization.packing import unpack


def by_unit(values, axis):
    """[units, fan_in]"""
    moved = values.movedim(axis, 0)
    return moved.reshape(moved.shape[0], values.numel() // max(moved.shape[0], 1) or 1)


@given(weights(), settings_of_quantizer(), st.data())
@settings(max_examples=300)
def test_selecting_units_commutes_with_quantizing_bit_for_bit(case, options, data):
    weight, axis = case
    count = weight.shape[axis]
    units = data.draw(st.lists(st.integers(0, count - 1), max_size=8) if count else st.just([]))
    chosen = torch.tensor(units, dtype=torch.int64)
    gathered = quantize(weight, axis=axis, **options).select(chosen)
    directly = quantize(weight.index_select(axis, chosen), axis=axis, **options)
    assert same(gathered, directly)


@given(weights(), settings_of_quantizer())
@settings(max_examples=200, deadline=None)
def test_every_bit_is_that_of_the_naive_quantizer(case, options):
    weight, axis = case
    packed = quantize(weight, axis=axis, **options)
    codes = unpack(packed.codes, packed.bits, packed.fan_in)
    decoded = by_unit(packed.dequantize(), axis)
    for number, unit in enumerate(by_unit(weight, axis).numpy()):
        expected_codes, expected_values = plain_python_unit(unit, **options)
        assert codes[number].tolist() == expected_codes
        assert np.array_equal(decoded[number].numpy(), np.array(expected_values, np.float32))


@given(weights(), settings_of_quantizer())
@settings(max_examples=300)
def test_error_is_at_most_half_the_widest_gap_plus_what_the_scale_clips(case, options):
    weight, axis = case
    packed = quantize(weight, axis=axis, **options)
    block = min(packed.block, packed.fan_in)
    scales = scale_values(packed.scales, packed.unit_scales).double()
    scale = scales.repeat_interleave(block, dim=1)[:, : packed.fan_in]
    original = by_unit(weight, axis).double()
    error = (by_unit(packed.dequantize(), axis).double() - original).abs()
    clipped = (original.abs() - scale).clamp(min=0)
    rounding = scale * 2**-22 + 2**-100
    assert (error <= scale * NormalFloat(packed.bits).half_gap + clipped + rounding).all()


@given(weights(least_units=1), settings_of_quantizer())
def test_a_scale_misses_its_blocks_peak_by_at_most_half_a_step(case, options):
    weight, axis = case
    packed = quantize(weight, axis=axis, **options)
    scales = scale_values(packed.scales, packed.unit_scales).double()
    unit_scale = scales.amax(1, keepdim=True)
    step = unit_scale / 255 if packed.double else 0.0 * unit_scale
    blocks = by_unit(weight, axis).abs().double().split(min(packed.block, packed.fan_in), dim=1)
    peaks = torch.stack([values.amax(1) for values in blocks], dim=1)
    raised = packed.scales == 1 if packed.double else torch.zeros_like(scales, dtype=torch.bool)
    allowed = torch.where(raised, step, step / 2)
    assert ((peaks - scales).abs() <= allowed + unit_scale * 2**-22 + 2**-100).all()


@given(weights(), settings_of_quantizer())
def test_without_double_quantization_it_is_idempotent(case, options):
    weight, axis = case
    options = {**options, "double": False}
    once = quantize(weight, axis=axis, **options)
    assert same(quantize(once.dequantize(), axis=axis, **options), once)


@given(weights(), settings_of_quantizer())
def test_the_weight_is_not_modified(case, options):
    weight, axis = case
    before = weight.clone()
    quantize(weight, axis=axis, **options).dequantize()
    assert torch.equal(weight, before)


@given(weights(elements=ORDINARY), settings_of_quantizer(), st.data())
def test_strides_do_not_matter(case, options, data):
    weight, axis = case
    order = data.draw(st.permutations(range(weight.dim())))
    back = [order.index(place) for place in range(weight.dim())]
    strided = weight.permute(order).contiguous().permute(back)
    expected = quantize(weight, axis=axis, **options)
    assert same(quantize(strided, axis=axis, **options), expected)
    out = torch.full_like(strided, torch.nan)
    assert expected.dequantize(out) is out
    assert torch.equal(out, expected.dequantize())


@given(weights(elements=ORDINARY), settings_of_quantizer())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_read_as_their_float32_value(dtype, case, options):
    weight, axis = case
    narrow = weight.to(dtype)
    packed = quantize(narrow, axis=axis, **options)
    assert same(packed, quantize(narrow.float(), axis=axis, **options))
    out = torch.empty(packed.shape, dtype=dtype)
    assert torch.equal(packed.dequantize(out), packed.dequantize().to(dtype))


@given(weights(), settings_of_quantizer())
def test_chunks_do_not_matter(case, options):
    weight, axis = case
    at_once = quantize(weight, axis=axis, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_module, "_CHUNK_VALUES", 3)
        assert same(quantize(weight, axis=axis, **options), at_once)
        in_pieces = at_once.dequantize()
    assert torch.equal(in_pieces, at_once.dequantize())
