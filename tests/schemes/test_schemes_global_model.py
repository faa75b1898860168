"""The server's working copy of the model, taken up from a checkpoint."""

import pytest
import torch

from fedveil import CheckpointError
from fedveil.schemes.global_model import GlobalModel
from fedveil.shards import open_shards, save_shards
from fedveil.state import read_state
from toys import convnet, mlp, same, snapshot, weights


@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.parametrize("shard_bytes", [500, 10**9])
def test_tensors_are_taken_over_from_their_files_into_memory_that_is_there(
    tmp_path, build, shard_bytes
):
    save_shards(read_state(build(1)), tmp_path / "saved", shard_bytes=shard_bytes)
    server = GlobalModel(weights(build(2)))
    places = {name: tensor.data_ptr() for name, tensor in server.tensors.items()}
    server.restore(open_shards(tmp_path / "saved"))
    assert same(server.tensors, weights(build(1)))
    assert {name: tensor.data_ptr() for name, tensor in server.tensors.items()} == places


def test_half_precision_models_go_on_in_float32(tmp_path):
    server, other = GlobalModel(weights(mlp().half())), GlobalModel(weights(mlp(1).half()))
    save_shards(other.tensors, tmp_path / "saved")
    server.restore(open_shards(tmp_path / "saved"))
    assert same(server.tensors, other.tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("5.bias"), r"in 5\.bias.*found no such tensor"),
        (lambda t: t.update(other=torch.ones(1)), "in other.*expected no such tensor"),
        (lambda t: t.update({"5.bias": torch.ones(4)}), r"float32 \[3\], found float32 \[4\]"),
        (lambda t: t.update({"5.bias": torch.ones(3).half()}), r"found float16 \[3\]"),
    ],
)
def test_tensors_of_another_model_are_refused_and_change_nothing(change, message):
    server, tensors = GlobalModel(weights(mlp())), weights(mlp(1))
    before = snapshot(server.tensors)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        server.restore(tensors)
    assert same(server.tensors, before)
