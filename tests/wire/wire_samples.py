"""Messages for hypothesis, and what it means for two to be the same."""

import json

import numpy as np
import torch
from hypothesis import strategies as st

from fedveil.quantization import BITS, QuantizedTensor, quantize
from fedveil.wire import Dense, Message, Statistics, UnitIndex

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
TOKENS = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)
NAMES = st.from_regex(r"[!#-\[\]-~]{1,256}", fullmatch=True) | st.sampled_from(["w", "a.weight"])
SCALARS = (
    st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def tensors(draw):
    """Any dtype and shape, any bit pattern (bools aside)."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPES)
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    octets = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if not size:
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(octets, dtype=torch.uint8)
    return (raw % 2 == 1 if dtype == torch.bool else raw.view(dtype)).reshape(shape)


@st.composite
def quantized(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] = draw(st.integers(0, 5))
    weight = torch.randn(
        shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    )
    return quantize(
        weight,
        bits=draw(st.sampled_from(BITS)),
        axis=axis,
        block=draw(st.sampled_from([1, 3, 64])),
        double=draw(st.booleans()),
    )


@st.composite
def unit_indexes(draw):
    size = draw(st.integers(0, 40))
    released = draw(st.sets(st.integers(0, size - 1)) if size else st.just(set()))
    scale = draw(st.floats(0, exclude_min=True, allow_infinity=False))
    return UnitIndex(size, torch.tensor(sorted(released), dtype=torch.int64), scale)


SECTIONS = tensors().map(Dense) | tensors().map(Statistics) | quantized() | unit_indexes()


@st.composite
def messages(draw):
    return Message(
        kind=draw(TOKENS),
        scheme=draw(TOKENS),
        round=draw(st.integers(0, 2**63 - 1)),
        client=draw(TOKENS),
        sections=draw(st.dictionaries(NAMES, SECTIONS, max_size=4)),
        scalars=draw(st.dictionaries(NAMES, SCALARS, max_size=4)),
    )


def small_message():
    """Two clients could exchange it; every section type, every number written out."""
    return Message(
        kind="proxy",
        scheme="fedqsn",
        round=7,
        client="clinic-2",
        sections={
            "up.weight": quantize(
                torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [-3.0, 2.0, 1.0]]), block=2
            ),
            "up.bias": Dense(torch.tensor([0.5, -2.0], dtype=torch.bfloat16)),
            "mlp": UnitIndex(11, torch.tensor([0, 3, 10]), scale=2.5),
            "gram": Statistics(torch.tensor([[1, 2]], dtype=torch.int32)),
        },
        scalars={"lr": 0.001, "steps": 4},
    )


def same_tensor(one, other):
    """Bit for bit, NaN included."""
    if one is None or other is None:
        return one is other
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    raw = [t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (one, other)]
    return torch.equal(*raw)


def same_section(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, UnitIndex):
        return (one.size, one.scale) == (other.size, other.scale) and same_tensor(
            one.released, other.released
        )
    if isinstance(one, QuantizedTensor):
        settings = ("bits", "block", "axis", "shape")
        parts = ("codes", "scales", "unit_scales")
        return all(getattr(one, n) == getattr(other, n) for n in settings) and all(
            same_tensor(getattr(one, n), getattr(other, n)) for n in parts
        )
    return same_tensor(one.tensor, other.tensor)


def same_message(one, other):
    fields = ("kind", "scheme", "round", "client", "scalars")
    typed = {name: type(value) for name, value in one.scalars.items()}
    return (
        all(getattr(one, name) == getattr(other, name) for name in fields)
        and typed == {name: type(value) for name, value in other.scalars.items()}
        and one.sections.keys() == other.sections.keys()
        and all(same_section(one.sections[n], other.sections[n]) for n in one.sections)
    )


def taken_apart(data):
    """Container header and data of a message, by the safetensors specification."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header, body):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body
