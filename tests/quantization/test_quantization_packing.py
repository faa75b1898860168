"""Bit packing against a string of bits written out in plain Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedveil.quantization import BITS, spare_bits
from fedveil.quantization.packing import pack, packed_bytes, unpack


@st.composite
def codes_and_bits(draw):
    bits = draw(st.sampled_from(BITS))
    units, count = draw(st.integers(0, 4)), draw(st.integers(1, 40))
    code = st.integers(0, 2**bits - 1)
    rows = [draw(st.lists(code, min_size=count, max_size=count)) for _ in range(units)]
    return torch.tensor(rows, dtype=torch.uint8).view(units, count), bits


def packed_in_plain_python(codes, bits):
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    return list(number.to_bytes((len(codes) * bits + 7) // 8, "little"))


@given(codes_and_bits())
def test_unpacking_undoes_packing(case):
    codes, bits = case
    assert torch.equal(unpack(pack(codes, bits), bits, codes.shape[1]), codes)


@given(codes_and_bits())
def test_packing_is_one_little_endian_string_of_bits_per_unit(case):
    codes, bits = case
    packed = pack(codes, bits)
    assert packed.shape == (codes.shape[0], packed_bytes(codes.shape[1], bits))
    assert packed.tolist() == [packed_in_plain_python(row, bits) for row in codes.tolist()]


def test_eight_three_bit_codes_fill_three_bytes():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    assert pack(codes, 3).tolist() == [[0b11_010_001, 0b0_101_100_0, 0b000_111_11]]


@pytest.mark.parametrize(("count", "bits", "spare"), [(8, 3, 0), (5, 3, 1), (3, 4, 4), (1, 2, 6)])
def test_spare_bits_are_those_after_the_last_code(count, bits, spare):
    assert spare_bits(count, bits) == spare
