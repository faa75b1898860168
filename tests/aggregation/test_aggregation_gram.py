"""The forms of a Gram: how it is accumulated, how it travels, and what it costs."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from aggregation_samples import CPU, EVERYTHING, message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil import RegMean
from fedveil.aggregation.codec import GramCodec
from fedveil.aggregation.gram import Gram, Moments, block_bounds, count_pairs, restrict
from fedveil.aggregation.linear import LinearLayer
from fedveil.masking import Release
from fedveil.quantization import QuantizedTensor
from fedveil.selection import Selection
from fedveil.units import Slice, UnitGroup
from fedveil.wire import Message, Statistics


def moments_of(rows, form="blocks", size=4096, batch=5):
    moments = Moments(rows.shape[1], form, size, CPU)
    for part in rows.split(batch):
        moments.add(part)
    return moments


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(gram, off_diagonal=1.0, ridge=0.0):
    """The whole matrix, zero between blocks."""
    return torch.block_diag(*gram.dense(off_diagonal, ridge))


def close(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.double(), expected.double(), **tolerance)


def through_the_wire(gram, codec, width, released=None):
    """Encoded by a client, through bytes, decoded by the server."""
    layers = {"w": LinearLayer("w", "", 0)}
    selection = EVERYTHING
    if released is not None:
        group = UnitGroup("inputs", "neurons", width, (Slice("w", 1),))
        shapes = {"w": torch.Size([2, width])}
        selection = Selection([group], {"inputs": Release(released, 1.0)}, shapes)
    reply = message(codec.encode({"w": gram}, {"w": "w"}))
    updates, grams = codec.decode(reply, layers, {"w": torch.Size([2, width])}, selection)
    assert updates == {}
    return grams["w"]


CASES = st.tuples(
    st.integers(1, 12), st.integers(1, 13), st.integers(1, 14), st.integers(0, 99), st.data()
)


class TestBlocks:
    @given(st.integers(1, 5000), st.integers(1, 5000))
    def test_are_as_few_and_as_equal_as_can_be(self, width, size):
        bounds = block_bounds(width, "blocks", size)
        sizes = [stop - start for start, stop in pairwise(bounds)]
        assert (bounds[0], bounds[-1], sum(sizes)) == (0, width, width)
        assert len(sizes) == math.ceil(width / size)
        assert 0 < min(sizes) <= max(sizes) <= min(sizes) + 1 <= size + 1
        assert max(sizes) <= size

    @given(CASES)
    def test_hold_the_second_moment_within_them(self, case):
        width, size, examples, seed, data = case
        rows = draw(examples, width, seed=seed)
        released = torch.tensor(sorted(data.draw(st.sets(st.integers(0, width - 1))))).long()
        gram = moments_of(rows, size=size).gram(examples, released)
        whole = rows.double().t() @ rows.double() / examples
        mask = torch.block_diag(
            *(torch.ones(b - a, b - a) for a, b in pairwise(block_bounds(width, "blocks", size)))
        )
        close(dense(gram), (whole * mask)[released][:, released])
        assert gram.bounds[-1] == len(released)
        assert len(gram.pairs) == count_pairs(gram.bounds)

    @given(CASES, st.floats(0, 1), st.floats(0, 5))
    def test_are_handed_out_reduced_and_with_their_ridge(self, case, off_diagonal, ridge):
        width, size, examples, seed, _ = case
        gram = moments_of(draw(examples, width, seed=seed), size=size).gram(examples, None)
        plain, found = dense(gram), dense(gram, off_diagonal, ridge)
        diagonal = gram.diagonal
        expected = off_diagonal * plain
        expected.diagonal().copy_(diagonal + ridge * diagonal.mean())
        close(found, expected)
        close(found, found.t())

    def test_handing_them_out_changes_nothing(self):
        gram = moments_of(draw(5, 7), size=3).gram(5, None)
        first = dense(gram)
        for block in gram.dense(0.5, 3.0):
            block.zero_()
        assert torch.equal(dense(gram), first)

    @given(st.integers(1, 30), st.integers(1, 30), st.sets(st.integers(0, 29)))
    def test_among_released_inputs_are_counted_by_hand(self, width, size, units):
        released = torch.tensor(sorted(u for u in units if u < width)).long()
        bounds = block_bounds(width, "blocks", size)
        found = restrict(bounds, released)
        inside = [int(((released >= a) & (released < b)).sum()) for a, b in pairwise(bounds)]
        assert [b - a for a, b in pairwise(found)] == inside
        assert restrict(bounds, None) == bounds

    def test_of_a_layer_that_never_fired_are_next_to_nothing(self):
        gram = moments_of(torch.zeros(3, 4)).gram(3, None)
        assert not bool(gram.diagonal.any())
        for one in (gram, Gram.nothing((0, 4))):
            found = dense(one, 1.0, 1.0)
            assert 0 < float(found.diagonal().min()) <= float(found.diagonal().max()) < 1e-9
            assert not bool(found.fill_diagonal_(0).any())


class TestLowRank:
    @pytest.mark.parametrize(("rank", "size"), [(1, 1), (3, 3), (3, 8), (8, 8), (20, 32)])
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_equals_the_exact_gram_where_its_rank_suffices(self, rank, size, scale):
        rows = scale * draw(60, rank) @ draw(rank, 40, seed=1)
        exact = moments_of(rows).gram(60, None)
        found = moments_of(rows, "low-rank", size).gram(60, None)
        assert found.factor.shape == (40, size)
        assert float((dense(found) - dense(exact)).norm() / dense(exact).norm()) < 2e-3

    @given(CASES)
    def test_keeps_the_exact_diagonal_and_possible_correlations(self, case):
        width, size, examples, seed, data = case
        rows = draw(examples, width, seed=seed)
        released = torch.tensor(sorted(data.draw(st.sets(st.integers(0, width - 1))))).long()
        gram = moments_of(rows, "low-rank", size).gram(examples, released)
        close(gram.diagonal, rows.square().mean(0)[released])
        if width <= size:
            assert gram.factor is None
            return
        assert gram.factor.shape == (len(released), size)
        whole = moments_of(rows, "low-rank", size).gram(examples, None)
        assert torch.equal(gram.factor, whole.factor[released])
        assert bool((gram.factor.norm(dim=1) <= 1 + 1e-5).all())
        # Positive but for rounding, whatever was left out.
        found = dense(gram).double()
        assert found.numel() == 0 or float(torch.linalg.eigvalsh(found).min()) > -1e-4

    def test_is_better_than_blocks_of_the_same_bytes_where_inputs_hang_together(self):
        rows = draw(200, 4) @ draw(4, 64, seed=1) + 0.1 * draw(200, 64, seed=2)
        exact = dense(moments_of(rows).gram(200, None))
        sketch = dense(moments_of(rows, "low-rank", 8).gram(200, None))
        blocks = dense(moments_of(rows, "blocks", 16).gram(200, None))
        assert float((sketch - exact).norm()) < 0.3 * float((blocks - exact).norm())

    @pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-6, 1e3])
    @pytest.mark.parametrize("examples", [1, 3, 30])
    def test_of_few_or_silent_examples_is_finite(self, scale, examples):
        rows = scale * draw(1, 50).expand(examples, -1)
        gram = moments_of(rows, "low-rank", 16).gram(examples, None)
        assert bool(torch.isfinite(gram.factor).all())
        assert bool(torch.isfinite(dense(gram)).all())

    def test_narrow_layers_get_the_whole_matrix(self):
        rows = draw(9, 6)
        gram = moments_of(rows, "low-rank", 6).gram(9, None)
        close(dense(gram), rows.t() @ rows / 9)


class TestOnTheWire:
    FORMS = pytest.mark.parametrize(
        ("form", "size"), [("blocks", 4096), ("blocks", 40), ("low-rank", 40)]
    )

    @FORMS
    @pytest.mark.parametrize("bits", [None, 2, 3, 4, 8])
    @pytest.mark.parametrize("width", [1, 7, 110, 130])
    def test_a_gram_comes_back_as_it_was_but_for_its_bits(self, form, size, bits, width):
        rows = draw(50, width) + 0.3 * draw(50, 1, seed=4)
        released = torch.arange(width)[torch.arange(width) % 5 != 1]
        gram = moments_of(rows, form, size).gram(50, released)
        found = through_the_wire(gram, GramCodec(form, size, bits), width, released)
        assert torch.equal(found.diagonal, gram.diagonal)
        assert found.bounds == gram.bounds
        one, other = (g.pairs if g.factor is None else g.factor for g in (gram, found))
        if bits is None or one.numel() < 4096:
            assert torch.equal(one, other)
        else:
            error = float((one - other).norm() / one.norm())
            assert 0 < error < {8: 0.02, 4: 0.15, 3: 0.3, 2: 0.6}[bits]

    @FORMS
    def test_eight_bits_are_close_to_float32(self, form, size):
        rows = draw(300, 130) + 0.5 * draw(300, 1, seed=4)
        gram = moments_of(rows, form, size).gram(300, None)
        found = through_the_wire(gram, GramCodec(form, size, 8), 130)
        error = dense(found) - dense(gram)
        assert float(error.norm()) < 0.01 * float(dense(gram).norm())

    @pytest.mark.parametrize("bits", [None, 2, 3, 4, 8])
    @pytest.mark.parametrize("width", [32, 91, 100, 400])
    def test_only_a_triangle_is_sent_and_once(self, bits, width):
        gram = moments_of(draw(20, width)).gram(20, None)
        names = {f"layer-{i}": "layer-0" for i in range(3)}
        observed = GramCodec("blocks", 4096, bits).encode({"layer-0": gram}, names)
        reply = Message("update", "fedavg", 1, "a", observed.sections, observed.scalars)
        pairs = width * (width - 1) // 2
        each = 4 if bits is None or pairs < 4096 else bits / 8 + 1 / 64
        expected = 4 * width + each * pairs
        assert expected <= len(reply.to_bytes()) <= expected + 1500
        assert len(observed.sections) == 2
        assert dict(observed.scalars) == {f"gram/{name}": "layer-0" for name in names}

    @pytest.mark.parametrize("bits", [None, 8])
    def test_a_low_rank_gram_costs_its_rank(self, bits):
        gram = moments_of(draw(20, 400), "low-rank", 16).gram(20, None)
        observed = GramCodec("low-rank", 16, bits).encode({"w": gram}, {"w": "w"})
        reply = Message("update", "fedavg", 1, "a", observed.sections, observed.scalars)
        # A row is a unit of its own, with a scale for its block and one for itself.
        each = 4 if bits is None else bits / 8 + 1 / 16 + 4 / 16
        expected = 4 * 400 + each * 400 * 16
        assert expected <= len(reply.to_bytes()) <= expected + 1500

    def test_sections_are_statistics_or_codes(self):
        gram = moments_of(draw(20, 100)).gram(20, None)
        sections = GramCodec("blocks", 4096, 8).encode({"w": gram}, {"w": "w"}).sections
        assert isinstance(sections["gram/w/diagonal"], Statistics)
        assert isinstance(sections["gram/w/pairs"], QuantizedTensor)

    @settings(max_examples=30)
    @given(
        st.integers(1, 20), st.integers(1, 20), st.sampled_from(["blocks", "low-rank"]), st.data()
    )
    def test_any_widths_forms_and_releases_come_back(self, width, size, form, data):
        released = torch.tensor(sorted(data.draw(st.sets(st.integers(0, width - 1))))).long()
        gram = moments_of(draw(6, width), form, size).gram(6, released)
        found = through_the_wire(gram, GramCodec(form, size, 8), width, released)
        close(dense(found), dense(gram), rtol=1e-6, atol=1e-6)

    def test_layers_of_one_gram_are_decoded_once(self):
        codec = RegMean(bits=None).codec
        gram = moments_of(draw(9, 5)).gram(9, None)
        reply = message(codec.encode({"q": gram}, dict.fromkeys("qkv", "q")))
        layers = {name: LinearLayer(name, "", 0) for name in "qkv"}
        shapes = dict.fromkeys("qkv", torch.Size([2, 5]))
        _, found = codec.decode(reply, layers, shapes, EVERYTHING)
        assert found["q"] is found["k"] is found["v"]


class TestRounded:
    """Codes and noise leave squares negative; what is solved must have none."""

    @pytest.mark.parametrize("off_diagonal", [1.0, 0.9, 0.3])
    def test_a_wide_gram_in_few_bits_has_no_negative_square(self, off_diagonal):
        rows = torch.randn(40, 400, generator=torch.Generator().manual_seed(0))
        gram = moments_of(rows).gram(40, None)
        codec = GramCodec("blocks", 400, 3)
        found = through_the_wire(gram, codec, 400)
        as_sent = dataclasses.replace(found, rounded=False, received=False)
        assert float(torch.linalg.eigvalsh(dense(as_sent, off_diagonal)).min()) < 0 or (
            off_diagonal < 0.5
        )
        assert float(torch.linalg.eigvalsh(dense(found, off_diagonal).double()).min()) > -1e-5
        assert torch.equal(dense(found).diagonal(), dense(as_sent).diagonal())

    def test_what_needs_no_change_gets_none(self):
        rows = torch.randn(4000, 100, generator=torch.Generator().manual_seed(0))
        found = through_the_wire(
            moments_of(rows).gram(4000, None), GramCodec("blocks", 100, 8), 100
        )
        assert found.rounded
        assert torch.equal(
            dense(found), dense(dataclasses.replace(found, rounded=False, received=False))
        )
