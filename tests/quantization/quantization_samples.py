"""Weights and settings for hypothesis, and a quantizer in plain Python to compare with."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedveil.quantization import BITS, NormalFloat

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
