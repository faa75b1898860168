"""The same federation in Flower's simulation: real nodes in Ray's processes."""

import pytest
from flower_samples import federation

import toys
from fedveil.errors import ExposureError
from fedveil.flower import simulate

pytest.importorskip("ray", reason="needs Ray: pip install 'fedveil[simulation]'")
pytestmark = pytest.mark.slow


def test_the_result_is_that_of_the_in_process_engine_bit_for_bit(tmp_path):
    expected = federation().run(2)
    found = simulate(federation(out=tmp_path), 2, processes=2)
    assert toys.same(toys.weights(found.global_model), toys.weights(expected.global_model))
    assert [r.bytes_up for r in found.rounds] == [r.bytes_up for r in expected.rounds]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    # What stops the owner's half is the error that the owner sees.
    with pytest.raises(ExposureError):
        simulate(federation(exposure_limit=0.001), 1)
