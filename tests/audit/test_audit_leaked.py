"""Reading a stranger's model file."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import toys
from fedveil.audit.tracing import fit, read_model
from fedveil.errors import AuditError, FedveilError
from fedveil.run import Manifest
from fedveil.shards import save_shards
from fedveil.state import read_state
from fedveil.units import find_units


@pytest.fixture
def state():
    return toys.weights(toys.bert())


@pytest.fixture
def manifest():
    model = toys.bert()
    return Manifest.of(read_state(model), tuple(find_units(model, "neurons")), {})


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def cut(manifest):
    return {part.tensor for group in manifest.groups for part in group.slices}


@pytest.mark.parametrize("kind", ["file", "folder", "shards", "loose", "npz"])
def test_every_container_gives_the_same_tensors(tmp_path, state, kind):
    path = tmp_path / "leak"
    if kind == "file":
        path = tmp_path / "leak.safetensors"
        save_file(state, path)
    elif kind == "npz":
        path = tmp_path / "leak.npz"
        np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in state.items()})
    elif kind == "loose":
        path.mkdir()
        save_file(state, path / "weights.safetensors")
    else:
        save_shards(state, path, shard_bytes=20_000 if kind == "shards" else 10**9)
    read = read_model(path)
    assert len(read) == len(state)
    assert toys.same({name: read[name] for name in read}, state)
    with pytest.raises(KeyError):
        read["unknown"]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".ckpt", ".pickle", ".joblib"])
def test_pickles_are_refused_unopened(tmp_path, suffix):
    path, mark = tmp_path / f"leak{suffix}", tmp_path / "mark"
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(FedveilError, match="pickle") as error:
        read_model(path)
    assert "weights_only=True" in error.value.fix
    assert not mark.exists()


def test_a_folder_of_pickles_is_refused_unopened(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(FedveilError, match=r"pickle.*pytorch_model\.bin"):
        read_model(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["leak.safetensors", "leak.npz"])
def test_a_pickle_of_another_name_is_damaged(tmp_path, name):
    mark = tmp_path / "mark"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(FedveilError, match="damaged"):
        read_model(tmp_path / name)
    assert not mark.exists()


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    mark = tmp_path / "mark"
    np.savez(tmp_path / "leak.npz", a=np.array([Bomb(mark)], dtype=object))
    with pytest.raises(FedveilError, match="damaged"):
        read_model(tmp_path / "leak.npz")["a"]
    assert not mark.exists()


def test_an_array_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    path = tmp_path / "leak.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", b"\0" * 50_000_000)
    with pytest.raises(FedveilError, match="far more bytes than weights"):
        read_model(path)["a"]


def test_an_array_that_claims_terabytes_is_damaged(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n"
    magic = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    with zipfile.ZipFile(tmp_path / "leak.npz", "w") as file:
        file.writestr("a.npy", magic + header + b"\0" * 100)
    with pytest.raises(FedveilError, match="damaged"):
        read_model(tmp_path / "leak.npz")["a"]


def test_files_that_were_cut_short_are_damaged(tmp_path, state):
    save_file(state, tmp_path / "leak.safetensors")
    np.savez(tmp_path / "leak.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(FedveilError, match="damaged") as error:
            read_model(path)
        assert str(path) in error.value.where


def test_what_is_not_there_or_of_no_known_format_is_refused(tmp_path):
    with pytest.raises(FedveilError, match="not there"):
        read_model(tmp_path / "nothing.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FedveilError, match="unknown format"):
        read_model(tmp_path / "model.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FedveilError, match="holds no model"):
        read_model(tmp_path / "empty")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(FedveilError, match="index"):
        read_model(tmp_path / "odd")


@pytest.mark.parametrize("lead", ["", "module.", "base_model.model.", "model.module."])
def test_names_may_have_other_first_parts(state, manifest, lead):
    found = fit({lead + name: tensor for name, tensor in state.items()}, manifest, "The file")
    assert found.keys() == cut(manifest)
    assert all(torch.equal(found[name], state[name]) for name in found)


@pytest.mark.parametrize("lead", ["", "module."])
def test_names_may_lack_the_first_part_and_heads_may_differ(state, manifest, lead):
    bare = {
        lead + name.removeprefix("bert."): tensor
        for name, tensor in state.items()
        if not name.startswith("classifier")
    }
    bare[lead + "other_head.weight"] = torch.ones(7, 16)
    assert fit(bare, manifest, "The file").keys() == cut(manifest)


def test_some_tensors_may_be_missing(state, manifest):
    gone = next(name for name in cut(manifest) if name.endswith("query.weight"))
    found = fit({n: t for n, t in state.items() if n != gone}, manifest, "The file")
    assert found.keys() == cut(manifest) - {gone}


def test_other_architectures_are_refused(state, manifest):
    wider = {name: torch.ones([2 * size for size in t.shape]) for name, t in state.items()}
    for other, what in [
        ({}, "no tensors"),
        (toys.weights(toys.gpt2()), "no bert"),
        (wider, "for"),
        ({name: tensor.to(torch.int8) for name, tensor in state.items()}, "for"),
    ]:
        with pytest.raises(AuditError, match="another architecture") as error:
            fit(other, manifest, "The file", whole=False)
        assert what in error.value.found
        assert error.value.expected
        assert error.value.fix


def test_an_adapter_is_to_be_merged_first(manifest):
    with pytest.raises(AuditError, match="Merge the adapter"):
        fit({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, manifest, "The file")


def test_only_cut_axes_may_be_shorter(state, manifest):
    name = next(name for name in cut(manifest) if name.endswith("intermediate.dense.weight"))
    shorter = {**state, name: state[name][:100]}
    assert name in fit(shorter, manifest, "The file", whole=False)
    assert name not in fit({**state, name: state[name][:, :5]}, manifest, "The file", whole=False)
