"""Weights and settings for hypothesis, and a quantizer in plain Python to compare with."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from arithmetic import arithmetic
from fedveil.quantization import BITS, NormalFloat, quantize

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ORDINARY = st.floats(-4, 4, width=32)
SMALLEST_SCALE = np.float32(2.0**-100)


@st.composite
def weights(draw, elements=FINITE | ORDINARY, least_units=0):
    """Float32 tensor of 1 to 4 axes and the axis that counts its units."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] = draw(st.integers(least_units, 6))
    values = draw(npst.arrays(np.float32, tuple(shape), elements=elements))
    return torch.from_numpy(values), axis


@st.composite
def settings_of_quantizer(draw):
    return {
        "bits": draw(st.sampled_from(BITS)),
        "block": draw(st.sampled_from([1, 2, 3, 5, 8, 64, 2**31 - 1])),
        "double": draw(st.booleans()),
    }


def same(one, other):
    """Whether two quantized tensors have the same settings and the same bits."""
    fields = ("bits", "block", "axis", "shape", "double")
    if any(getattr(one, name) != getattr(other, name) for name in fields):
        return False
    parts = ["codes", "scales"] + (["unit_scales"] if one.double else [])
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in parts)


def plain_python_unit(unit, bits, block, double):
    """One unit: its codes and its decoded values, value by value in numpy float32."""
    levels = NormalFloat(bits).levels.numpy()
    blocks = [unit[i : i + block] for i in range(0, len(unit), block)]
    peaks = [max(abs(value) for value in values) for values in blocks]
    peaks = [peak if peak >= SMALLEST_SCALE else np.float32(0) for peak in peaks]
    scales = [plain_python_scale(peak, max(peaks)) for peak in peaks] if double else peaks
    codes, decoded = [], []
    for values, scale in zip(blocks, scales, strict=True):
        for value in values:
            code = nearest(value / scale if scale > 0 else np.float32(0), levels)
            codes.append(code)
            decoded.append(levels[code] * scale)
    return codes, decoded


def plain_python_scale(peak, unit_scale):
    if peak == 0:
        return np.float32(0)
    code = max(1, round(float(peak / unit_scale * np.float32(255))))
    return unit_scale * (np.float32(code) / np.float32(255))


def nearest(value, levels):
    """Place of the level that is closest; half way between two, the lower one."""
    place = 0
    for lower, upper in pairwise(levels):
        if value > (lower + upper) / np.float32(2):
            place += 1
    return place


@st.composite
def large_weights(draw):
    """Float32 of several chunks along and across units: any order in memory, and any oddity."""
    units, fan_in = draw(st.integers(0, 150)), draw(st.integers(1, 300))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = generator.standard_normal((units, fan_in), np.float32)
    values *= np.float32(2.0) ** draw(st.integers(-120, 120))
    odd = generator.random(values.shape) < draw(st.sampled_from([0, 0.01, 0.5]))
    values[odd] = generator.choice(ODDITIES, int(odd.sum()))
    weight, axis = torch.from_numpy(values), 0
    match draw(st.sampled_from(["rows", "columns", "apart", "steps", "blocks"])):
        case "columns":
            weight, axis = weight.t().contiguous(), 1
        case "apart":  # rows of a larger matrix
            weight = torch.zeros(units, fan_in + 3)[:, 2:-1].copy_(weight)
        case "steps":
            weight = torch.zeros(units, 2 * fan_in)[:, ::2].copy_(weight)
        case "blocks" if fan_in % 3 == 0:  # like a convolution cut along its inputs
            weight, axis = weight.view(units, fan_in // 3, 3).transpose(0, 1).contiguous(), 1
    return weight, axis


ODDITIES = np.array(
    [0.0, -0.0, 1e-45, -1e-39, 2.0**-126, 2.0**-100, -(2.0**-101), 1.0, -1.0, 3.4e38, -3.4e38],
    np.float32,
)


def ties(bits):
    """Units of 130 values that lie exactly on thresholds times their scale, and one bit beside."""
    thresholds = NormalFloat(bits).thresholds.numpy()
    scales = np.array([1, 0.75, 1.1, 3e-30, 7e37, 0.1], np.float32)[:, None]
    on = scales * np.resize(thresholds, 43)
    below, above = np.nextafter(on, np.float32(-9e37)), np.nextafter(on, np.float32(9e37))
    return torch.from_numpy(np.concatenate([on, below, above, scales], axis=1))


def quantized_elsewhere(weight, way):
    """For a process of its own."""
    with arithmetic(way):
        packed = quantize(weight, axis=1)
        return packed.codes, packed.scales, packed.unit_scales, packed.dequantize()
