"""Model folders: what is written is read back, damage is refused, nothing is read early."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_model, save_file
from torch import nn

from fedveil import ConfigurationError, FedveilError, shards
from fedveil.shards import load_into, model_files, open_shards, save_shards, whole_folder
from fedveil.state import read_state
from toys import bert, convnet, files, gpt2, mlp, same, weights

INDEX = "model.safetensors.index.json"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def tensors_of(shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 3).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }


def five():
    """Five tensors of 400, 400, 4000, 80 and 8 bytes."""
    tensors = {name: torch.arange(100.0) + i for i, name in enumerate(("b", "a"))}
    return tensors | {
        "large": torch.arange(1000.0).view(10, 100),
        "half": torch.arange(40).bfloat16(),
        "count": torch.tensor(7),
    }


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter("__metadata__".__ne__)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


class TestSaving:
    @settings(deadline=None, max_examples=60)
    @given(st.dictionaries(names, st.tuples(shapes, st.sampled_from(DTYPES)), max_size=8),
           st.integers(1, 500))  # fmt: skip
    def test_what_is_saved_is_read_back(self, tmp_path_factory, kinds, shard_bytes):
        tensors, folder = tensors_of(kinds), tmp_path_factory.mktemp("saved") / "model"
        written = save_shards(tensors, folder, shard_bytes=shard_bytes)
        assert same(dict(open_shards(folder)), tensors)
        assert sorted(written) == sorted(folder.iterdir()) == sorted(model_files(folder))
        for path in written:
            if path.name != INDEX:
                with safe_open(path, "pt") as shard:
                    sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]  # noqa: SIM118
                assert sum(sizes) <= shard_bytes or len(sizes) - sizes.count(0) == 1

    def test_the_layout_is_hugging_faces(self, tmp_path):
        save_shards(five(), tmp_path / "one")
        assert list(files(tmp_path / "one")) == ["model.safetensors"]
        save_shards(five(), tmp_path / "many", shard_bytes=800)
        found = files(tmp_path / "many")
        assert list(found) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [INDEX]
        with safe_open(tmp_path / "many" / next(iter(found)), "pt") as shard:
            assert shard.metadata() == {"format": "pt"}  # older transformers ask for it
        index = json.loads(found[INDEX])
        assert index["metadata"] == {"total_size": 4888}
        assert index["weight_map"] == {
            "b": "model-00001-of-00003.safetensors",
            "a": "model-00001-of-00003.safetensors",
            "large": "model-00002-of-00003.safetensors",
            "half": "model-00003-of-00003.safetensors",
            "count": "model-00003-of-00003.safetensors",
        }

    @pytest.mark.parametrize("shard_bytes", [800, 10**6])
    def test_the_same_tensors_give_the_same_bytes_in_every_process(self, tmp_path, shard_bytes):
        save_shards(five(), tmp_path / "here", shard_bytes=shard_bytes)
        code = "import sys, test_shards as t; t.save_shards(t.five(), sys.argv[1], shard_bytes=%d)"
        there = [sys.executable, "-c", code % shard_bytes, str(tmp_path / "there")]
        subprocess.run(there, check=True, cwd=os.path.dirname(__file__))
        assert files(tmp_path / "here") == files(tmp_path / "there")

    @pytest.mark.parametrize("build", [bert, gpt2])
    def test_transformers_opens_it(self, tmp_path, build):
        model = build()
        save_shards(read_state(model), tmp_path / "model", shard_bytes=9000)
        model.config.save_pretrained(tmp_path / "model")
        assert len(model_files(tmp_path / "model")) > 2
        opened = type(model).from_pretrained(tmp_path / "model")
        assert same(weights(opened), weights(model))
        # docs/configuration.md says so: it maps the files.
        if Path("/proc/self/maps").exists():
            assert str(tmp_path) in Path("/proc/self/maps").read_text()

    def test_tensors_that_are_made_as_asked_for_are_held_one_shard_at_a_time(self, tmp_path):
        alive, most = [0], [0]

        class Made(Mapping):
            def __len__(self):
                return 20

            def __iter__(self):
                return (f"t{i}" for i in range(20))

            def __getitem__(self, name):
                alive[0] += 1
                most[0] = max(most[0], alive[0])
                tensor = torch.full((100,), float(name[1:]))
                weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
                return tensor

        save_shards(Made(), tmp_path / "model", shard_bytes=1200)
        assert most[0] <= 4  # three of a shard, and the first of the next
        assert same(dict(open_shards(tmp_path / "model")), dict(Made()))

    def test_tensors_of_any_layout_are_saved(self, tmp_path):
        whole = torch.arange(24.0).view(4, 6)
        tensors = {"turned": whole.t(), "left": whole[:, :3], "below": whole.clone()[2:]}
        save_shards(tensors, tmp_path / "model")
        assert same(dict(open_shards(tmp_path / "model")), tensors)

    @pytest.mark.parametrize("shard_bytes", [1, 10**6])
    def test_tensors_that_share_memory_are_refused(self, tmp_path, shard_bytes):
        whole = torch.zeros(100)
        for other in (whole, whole[50:], whole[:1]):
            with pytest.raises(ConfigurationError, match=r"share memory.*'a' and 'b'"):
                save_shards({"a": whole, "b": other}, tmp_path / "m", shard_bytes=shard_bytes)
        assert files(tmp_path) == {}

    def test_tensors_without_data_are_refused(self, tmp_path):
        with pytest.raises(ConfigurationError, match=r"no data.*in a"):
            save_shards({"a": torch.zeros(3, device="meta")}, tmp_path / "m")

    @pytest.mark.parametrize("shard_bytes", [0, -1, 1.5, True, None])
    def test_an_impossible_size_is_refused(self, tmp_path, shard_bytes):
        with pytest.raises(ConfigurationError, match="shard_bytes"):
            save_shards(five(), tmp_path / "m", shard_bytes=shard_bytes)


class TestAnEarlierFolder:
    def test_is_replaced_whole(self, tmp_path):
        save_shards(five(), tmp_path / "model", shard_bytes=800)
        (tmp_path / "model" / "notes.txt").write_text("of the earlier")
        save_shards({"a": torch.ones(2)}, tmp_path / "model")
        assert list(files(tmp_path)) == ["model/model.safetensors"]

    @pytest.mark.parametrize("moment", range(1, 15))
    def test_or_the_new_one_is_whole_after_a_power_cut(self, tmp_path, moment, monkeypatch):
        """Whatever call of the system is the last one."""
        old, new = five(), {name: tensor + 1 for name, tensor in five().items()}
        save_shards(old, tmp_path / "model", shard_bytes=800)
        steps = [(shards, "save_file"), (shards, "sync"), (type(tmp_path), "rename")]
        calls = [0]
        with monkeypatch.context() as patch:
            for owner, name in steps:
                patch.setattr(owner, name, cut_before(getattr(owner, name), calls, moment))
            with pytest.raises(KeyboardInterrupt):
                save_shards(new, tmp_path / "model", shard_bytes=800)
        found = [path for path in tmp_path.iterdir() if is_whole(path, (old, new))]
        assert found
        if (tmp_path / "model").exists():
            assert tmp_path / "model" in found
        save_shards(new, tmp_path / "model", shard_bytes=800)
        assert os.listdir(tmp_path) == ["model"]
        assert same(dict(open_shards(tmp_path / "model")), new)

    @pytest.mark.parametrize("step", [1, 2, 3, 4])
    def test_is_untouched_if_writing_fails(self, tmp_path, monkeypatch, step):
        save_shards(five(), tmp_path / "model", shard_bytes=800)
        before, calls = files(tmp_path), [0]
        full = OSError(errno.ENOSPC, "No space left on device")
        for name in ("save_file", "sync"):
            call = cut_before(getattr(shards, name), calls, step, full)
            monkeypatch.setattr(shards, name, call)
        with pytest.raises(FedveilError, match=r"could not be saved.*No space.*untouched"):
            save_shards(five(), tmp_path / "model", shard_bytes=800)
        assert files(tmp_path) == before

    def test_comes_back_if_the_new_one_cannot_take_its_place(self, tmp_path, monkeypatch):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "old").write_text("old")
        rename = type(tmp_path).rename

        def refuse(path, target):
            if path.name.startswith("unfinished-"):
                raise PermissionError(errno.EACCES, "Permission denied")
            return rename(path, target)

        monkeypatch.setattr(type(tmp_path), "rename", refuse)
        with pytest.raises(PermissionError), whole_folder(tmp_path / "model") as aside:
            (aside / "new").write_text("new")
        assert files(tmp_path) == {"model/old": b"old"}


def cut_before(function, calls, moment, error=KeyboardInterrupt):
    def call(*arguments, **options):
        calls[0] += 1
        if calls[0] == moment:
            raise error
        return function(*arguments, **options)

    return call


def is_whole(path, states):
    try:
        found = dict(open_shards(path))
    except FedveilError:
        return False
    return any(same(found, state) for state in states)


class TestOpening:
    def test_reads_no_tensor_before_it_is_used(self, tmp_path):
        """In a process of its own: other tests' pages are not counted."""
        code = """
            import sys, torch
            from fedveil.shards import open_shards, save_shards
            def resident():
                lines = open("/proc/self/status").read().splitlines()
                kib = {l.split(":")[0]: int(l.split()[1]) for l in lines if l.startswith("Rss")}
                return (kib["RssAnon"] + kib["RssFile"]) / 1024, kib["RssAnon"] / 1024
            size = 32 << 20
            tensors = {f"t{i}": torch.full((size // 4,), float(i)) for i in range(6)}
            save_shards(tensors, sys.argv[1], shard_bytes=2 * size)
            del tensors
            float(torch.zeros(9).sum())
            before = resident()
            found = dict(open_shards(sys.argv[1]))
            opened = resident()
            assert float(found["t3"][-1]) == 3.0
            float(found["t4"].sum())
            read = resident()
            found["t5"].zero_()
            written = resident()
            print(*(b - a for a, b in ((before[0], opened[0]), (opened[0], read[0]),
                                       (opened[1], read[1]), (read[1], written[1]))))
        """
        run = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "model")]
        done = subprocess.run(run, check=True, capture_output=True, text=True)
        opened, read, read_own, written_own = map(float, done.stdout.split())
        assert opened < 8  # MiB; the model has 192
        assert 30 < read < 44
        assert read_own < 8  # nothing that the system could not take back
        assert 30 < written_own < 44
        assert float(open_shards(tmp_path / "model")["t5"][0]) == 5.0  # the file is untouched

    def test_an_unknown_name_is_a_key_error(self, tmp_path):
        save_shards(five(), tmp_path / "model", shard_bytes=800)
        found = open_shards(tmp_path / "model")
        assert "other" not in found
        with pytest.raises(KeyError):
            found["other"]

    def test_a_folder_without_a_model_is_refused(self, tmp_path):
        with pytest.raises(FedveilError, match=r"no model.*found neither"):
            open_shards(tmp_path)
        with pytest.raises(FedveilError, match=r"no model.*found no such folder"):
            open_shards(tmp_path / "none")

    @pytest.mark.parametrize("shard_bytes", [800, 10**6])
    @pytest.mark.parametrize("keep", [0, 4, 30, 0.5, -2])
    def test_a_file_cut_off_is_refused_by_name(self, tmp_path, shard_bytes, keep):
        for path in save_shards(five(), tmp_path / "model", shard_bytes=shard_bytes):
            whole = path.read_bytes()
            cut = int(len(whole) * keep) if isinstance(keep, float) else keep
            path.write_bytes(whole[:cut])
            with pytest.raises(FedveilError, match=path.name):
                open_shards(tmp_path / "model")
            path.write_bytes(whole)
        open_shards(tmp_path / "model")

    def test_a_missing_shard_is_refused_by_name(self, tmp_path):
        first, *_ = save_shards(five(), tmp_path / "model", shard_bytes=800)
        first.unlink()
        with pytest.raises(FedveilError, match=rf"A file is missing.*{first.name}"):
            open_shards(tmp_path / "model")

    def test_a_shard_that_goes_while_it_is_open_is_refused(self, tmp_path):
        written = save_shards(five(), tmp_path / "model", shard_bytes=800)
        found = open_shards(tmp_path / "model")
        kept = found["b"]
        for path in written:
            path.unlink()
        assert torch.equal(kept, five()["b"])
        with pytest.raises(FedveilError, match="missing"):
            found["large"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"a": "model-00002-of-00003.safetensors"}, "'a'"),
            ({"a": None}, "'a' not in it"),
            ({"new": "model-00001-of-00003.safetensors"}, "'new' in it"),
            ({"a": "../model/model-00001-of-00003.safetensors"}, "no file of this folder"),
            ({"a": "/etc/passwd"}, "no file of this folder"),
            ({"a": ".."}, "no file of this folder"),
            ({"a": ""}, "no file of this folder"),
            ({"a": 5}, "no file of this folder"),
            ({"a": "model-00004-of-00003.safetensors"}, "'a' not in it"),
            ({"new": "model-00004-of-00003.safetensors"}, "missing"),
            ({"new": "model\0.safetensors"}, "model.*\\.safetensors"),
        ],
    )
    def test_an_index_that_lies_is_refused(self, tmp_path, change, message):
        save_shards(five(), tmp_path / "model", shard_bytes=800)
        path = tmp_path / "model" / INDEX
        content = json.loads(path.read_text())
        content["weight_map"] |= change
        content["weight_map"] = {n: f for n, f in content["weight_map"].items() if f is not None}
        path.write_text(json.dumps(content))
        with pytest.raises(FedveilError, match=message):
            open_shards(tmp_path / "model")

    @pytest.mark.parametrize("text", ["", "[1]", "{}", '{"weight_map": 3}', "\xff", "5"])
    def test_an_index_that_is_none_is_refused(self, tmp_path, text):
        (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
        with pytest.raises(FedveilError, match="The index"):
            open_shards(tmp_path)


def wide(dtype=torch.float32, device="cpu"):
    with torch.device(device):
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).to(dtype)


class TestLoadingIntoAModel:
    @pytest.mark.parametrize("build", [mlp, convnet, bert, gpt2])
    @pytest.mark.parametrize("shard_bytes", [3000, 10**9])
    def test_gives_the_weights_that_were_saved(self, tmp_path, build, shard_bytes):
        save_shards(read_state(build(1)), tmp_path / "model", shard_bytes=shard_bytes)
        model = build(2)
        assert load_into(model, tmp_path / "model") is model
        assert same(weights(model), weights(build(1)))

    def test_copies_into_the_tensors_that_are_there(self, tmp_path):
        save_shards(read_state(wide()), tmp_path / "model")
        model = wide()
        before = [tensor.data_ptr() for tensor in model.state_dict().values()]
        load_into(model, tmp_path / "model")
        assert [tensor.data_ptr() for tensor in model.state_dict().values()] == before

    def test_maps_what_is_on_the_meta_device(self, tmp_path):
        owned = wide()
        save_shards(read_state(owned), tmp_path / "model", shard_bytes=100)
        empty = wide(device="meta")
        empty[0].weight.requires_grad_(False)
        model: Any = load_into(empty, tmp_path / "model")
        assert same(weights(model), weights(owned))
        assert not model[0].weight.requires_grad
        assert model[2].weight.requires_grad
        if Path("/proc/self/maps").exists():
            assert str(tmp_path) in Path("/proc/self/maps").read_text()
        # They can be trained; the files stay.
        model(torch.ones(3, 4)).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert not same(weights(model), weights(owned))
        assert same(dict(open_shards(tmp_path / "model")), weights(owned))

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_ties_stay_ties(self, tmp_path, device):
        def tied(device):
            with torch.device(device):
                model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
            model[1].weight = model[0].weight
            return model

        owned = tied("cpu")
        for name in ("0.weight", "1.weight"):
            save_file({name: owned[0].weight.detach()}, tmp_path / "model.safetensors")
            model: Any = load_into(tied(device), tmp_path)
            assert model[0].weight is model[1].weight
            assert torch.equal(model[0].weight, owned[0].weight)

    def test_tied_tensors_that_differ_are_refused(self, tmp_path):
        model = gpt2()
        state = {n: t.clone() for n, t in model.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
        load_into(model, tmp_path)
        state["lm_head.weight"] += 1
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(FedveilError, match=r"another value of the tied.*lm_head"):
            load_into(model, tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("2.bias"), r"lacks a tensor.*2\.bias"),
            (lambda state: state.update(other=torch.ones(1)), "has not.*other"),
            (lambda state: state.update({"2.bias": torch.ones(3)}), r"\[2\], found float32 \[3\]"),
            (
                lambda state: state.update({"2.bias": torch.ones(2).half()}),
                r"expected float32 \[2\], found float16 \[2\]",
            ),
            (
                lambda state: state.update({"1.num_batches_tracked": torch.tensor(1.0)}),
                "int64",
            ),
        ],
    )
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_a_folder_of_another_model_is_refused_and_changes_nothing(
        self, tmp_path, change, message, device
    ):
        state = read_state(wide())
        change(state)
        save_shards(state, tmp_path / "model")
        model = wide(device=device)
        before = weights(model)
        with pytest.raises(FedveilError, match=message):
            load_into(model, tmp_path / "model")
        if device == "cpu":
            assert same(weights(model), before)
        else:
            assert all(tensor.is_meta for tensor in model.state_dict().values())

    def test_buffers_that_no_folder_holds_need_data(self, tmp_path):
        model = nn.Linear(2, 2)
        save_shards(read_state(model), tmp_path / "model")
        model = nn.Linear(2, 2, device="meta")
        model.register_buffer("table", torch.zeros(3, device="meta"), persistent=False)
        with pytest.raises(FedveilError, match=r"never saved.*table"):
            load_into(model, tmp_path / "model")
        model.register_buffer("table", torch.zeros(3), persistent=False)
        assert load_into(model, tmp_path / "model").get_buffer("table").sum() == 0

    def test_safetensors_own_loader_reads_it_too(self, tmp_path):
        save_shards(read_state(gpt2(1)), tmp_path / "model")
        model = gpt2(2)
        load_model(model, str(tmp_path / "model" / "model.safetensors"))
        assert same(weights(model), weights(gpt2(1)))
