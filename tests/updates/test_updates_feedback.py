import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedveil import ConfigurationError, FedAvg, FedQSN
from fedveil.masking import Release
from fedveil.selection import Selection
from fedveil.units import Slice, UnitGroup
from fedveil.updates import ErrorFeedback, UpdateCodec

SHAPE = torch.Size([80, 64])
GROUP = UnitGroup("a", "neurons", 80, (Slice("w", 0),))


def selection(units):
    return Selection([GROUP], {"a": Release(torch.tensor(units), 1.0)}, {"w": SHAPE})


def update(seed):
    return 0.01 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


HELD = st.lists(st.integers(0, 79), min_size=66, max_size=80, unique=True).map(sorted)


@given(st.lists(HELD, min_size=1, max_size=6), st.sampled_from([2, 4, 8]))
def test_nothing_is_lost_only_late(rounds, bits):
    """What was sent in all rounds and what is still owed is what the updates were."""
    memory, sent, wanted = {}, torch.zeros(SHAPE), torch.zeros(SHAPE)
    for number, units in enumerate(rounds):
        held = selection(units)
        feedback = ErrorFeedback(UpdateCodec(bits), held, {"w": SHAPE}, memory)
        change = held.gather("w", update(number))
        before = {name: residual.clone() for name, residual in memory.items()}
        section = feedback.encode("w", change, 0)
        assert memory.keys() == before.keys()
        assert all(torch.equal(memory[name], before[name]) for name in before)
        feedback.commit()
        sent[units] += section.dequantize()
        wanted[units] += change
    torch.testing.assert_close(sent + memory["w"], wanted, rtol=0, atol=1e-6)
    assert memory["w"].abs().max() > 0


def test_units_that_are_withheld_keep_what_they_are_owed():
    memory = {"w": torch.ones(SHAPE)}
    held = selection(list(range(70)))
    feedback = ErrorFeedback(UpdateCodec(4), held, {"w": SHAPE}, memory)
    feedback.encode("w", torch.zeros(70, 64), 0)
    feedback.commit()
    assert torch.equal(memory["w"][70:], torch.ones(10, 64))
    assert memory["w"][:70].abs().max() < 1e-6


def test_what_is_owed_is_sent_though_nothing_changed():
    memory = {"w": torch.zeros(SHAPE)}
    assert ErrorFeedback(UpdateCodec(4), selection([0]), {"w": SHAPE}, memory).outstanding() == []
    memory["w"][3] = 0.5
    held = selection(list(range(80)))
    feedback = ErrorFeedback(UpdateCodec(4), held, {"w": SHAPE}, memory)
    assert feedback.outstanding() == ["w"]
    assert torch.equal(feedback.encode("w", None, 0).dequantize(), memory["w"])
    without = ErrorFeedback(UpdateCodec(4), selection([0, 1]), {"w": SHAPE}, memory)
    assert without.outstanding() == []


def test_exact_updates_leave_nothing_to_remember():
    memory = {}
    feedback = ErrorFeedback(UpdateCodec(4), selection([0]), {"w": torch.Size([3])}, memory)
    feedback.encode("b", torch.ones(3), 0)
    feedback.commit()
    assert memory == {}


@pytest.mark.parametrize("scheme", [FedAvg, FedQSN])
def test_exact_updates_have_no_error_to_feed_back(scheme):
    with pytest.raises(ConfigurationError, match="update_bits of 2, 3, 4 or 8"):
        scheme(error_feedback=True)
