"""The benchmark of language models: that each of its rounds can be run, on a model of no size."""

import argparse

import pytest

language = pytest.importorskip("studies.language")


@pytest.mark.parametrize("scheme", language.LARGE)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_round_is_timed_by_part(scheme):
    options = argparse.Namespace(
        device=None, dtype="bfloat16", optimizer="adamw", batch_size=1, length=8
    )
    found = language.large(options, f"tiny/{scheme}")
    for part in ("server", "begin", "release", "client", "absorb", "end", "down", "up", "host"):
        assert found[part] > 0, part
    if scheme != "FedAvg":
        assert found["down"] < 0.5 * 2 * found["parameters"] * 1e3  # of bfloat16, in MB
    table = language.large_table({f"tiny/{scheme}": found})
    assert table.row_count == 1
