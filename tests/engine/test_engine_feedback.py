"""Error feedback through whole rounds: what clients keep, and that a run goes on with it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fedveil import CheckpointError, FedAvg, FedQSN, Observer
from fedveil.run.client_files import ClientFiles
from fedveil.run.folder import RunFolder
from toys import federation, mlp, same, weights

SCHEMES = {
    "fedavg": FedAvg(update_bits=2, error_feedback=True),
    "fedqsn": FedQSN(
        server_mask=0, client_mask=0.1, units="neurons", policy="fresh",
        update_bits=4, error_feedback=True,
    ),
}  # fmt: skip


@pytest.fixture(params=sorted(SCHEMES))
def scheme(request):
    return SCHEMES[request.param]


def run(scheme, rounds=4, **changes):
    resume = changes.pop("resume", False)
    made = federation(mlp(), scheme=scheme, clients_per_round=2, **changes)
    return weights(made.run(rounds, resume=resume).global_model)


def test_it_changes_the_result_of_later_rounds_only(scheme):
    without = replace(scheme, error_feedback=False)
    assert same(run(scheme, 1), run(without, 1))
    assert not same(run(scheme), run(without))


def test_it_comes_closer_to_exact_updates():
    exact = run(FedAvg(), 8)
    base = weights(mlp())

    def distance(scheme):
        found = run(scheme, 8)
        return sum(float((found[n] - exact[n]).norm()) for n in base)

    assert distance(SCHEMES["fedavg"]) < 0.7 * distance(FedAvg(update_bits=2))


def test_neither_workers_nor_a_folder_change_the_result(scheme, tmp_path):
    expected = run(scheme)
    assert same(run(scheme, out=tmp_path / "one"), expected)
    assert same(run(scheme, workers=2), expected)


def test_one_file_per_client_is_left(scheme, tmp_path):
    run(scheme, out=tmp_path, checkpoints=1)
    memories = RunFolder(tmp_path).memories
    kept = sorted(path.relative_to(memories) for path in memories.glob("*/*"))
    assert len(kept) == 3
    assert {path.parts[0] for path in kept} == {"partner-0", "partner-1", "partner-2"}
    residual = load_file(memories / kept[0])
    assert residual["3.weight"].shape == (64, 96)


class Killer(Observer):
    """Stops the run in the middle of a round, after some clients have answered."""

    def __init__(self, number):
        self.number = number

    def client_finished(self, number, client, failure):
        if number == self.number:
            raise KeyboardInterrupt


@pytest.mark.parametrize("number", [1, 3])
def test_a_round_that_was_cut_short_is_run_from_what_clients_knew_before(scheme, number, tmp_path):
    expected = run(scheme)
    with pytest.raises(KeyboardInterrupt):
        run(scheme, out=tmp_path, observer=Killer(number))
    assert same(run(scheme, out=tmp_path, resume=True), expected)


def test_a_new_run_in_a_folder_begins_with_nothing(scheme, tmp_path):
    RunFolder(tmp_path).prepare()
    left = ClientFiles(RunFolder(tmp_path).memories)
    left.keep("partner-0", 0, {"3.weight": torch.ones(64, 96)})
    assert same(run(scheme, out=tmp_path), run(scheme))


def test_what_cannot_be_read_is_said(tmp_path):
    files = ClientFiles(tmp_path)
    files.keep("a", 1, {"w": torch.ones(3)})
    (tmp_path / "a" / "round-000001.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match=r"cannot be read.*round-000001"):
        files.recall("a", 2)


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "a").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        ClientFiles(tmp_path).keep("a", 1, {"w": torch.ones(3)})


def test_only_what_may_be_needed_is_kept(tmp_path):
    files = ClientFiles(tmp_path)
    for number in (1, 2, 4):
        files.keep("a", number, {"w": torch.full((1,), float(number))})
    assert files.recall("a", 4)["w"].item() == 2
    assert files.recall("a", 1) == {}
    files.settle(3)
    left = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert left == ["round-000002.safetensors", "round-000004.safetensors"]
    files.drop_after(2)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["round-000002.safetensors"]
