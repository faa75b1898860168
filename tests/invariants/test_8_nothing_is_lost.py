"""Dying clients cost their own update only; a run that is killed goes on to the same result."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fedveil import (
    CheckpointError,
    FedAvg,
    Federation,
    FedQSN,
    FedveilError,
    ImageClassification,
    Observer,
    ProtocolError,
    RegMean,
    Secret,
    TrainingError,
    shards,
)  # fmt: skip
from fedveil.engine.crew import Answer, Job
from fedveil.engine.in_process import InTurn, Pool
from fedveil.run.checkpoint import CheckpointFolder
from fedveil.schemes.fedqsn import FedQSNServer
from process import CLIENTS, SCHEME, standard
from toys import (
    FAST,
    SECRET,
    digest,
    federation,
    files,
    metrics,
    mlp,
    rows,
    same,
    snapshot,
    weights,
)  # fmt: skip

SCRIPT = Path(__file__).parent.parent / "process.py"


class Bomb:
    """An image that goes off when it is read."""

    def __init__(self, how):
        self.how = how

    def __array__(self, *arguments, **options):
        if self.how == "kill":
            os._exit(9)
        if self.how == "exit":
            sys.exit(3)
        raise self.how


def with_bomb(how):
    """Partner 1's second image is a bomb; the first is looked at before the run."""
    clients = {f"partner-{i}": rows(6 + 2 * i, seed=i) for i in range(3)}
    clients["partner-1"][1]["image"] = Bomb(how)
    return {"clients": clients, "training": TOUCHES_ALL}


TOUCHES_ALL = type(FAST)(steps=1, batch_size=64, learning_rate=0.1, optimizer="sgd")


@pytest.fixture(scope="module")
def without_partner_1():
    """What comes of a round in which partner 1's update was not absorbed."""
    inspect = FedQSNServer.inspect

    def skip(server, client, reply):
        if client == "partner-1":
            raise ProtocolError("skipped")
        return inspect(server, client, reply)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedQSNServer, "inspect", skip)
        return weights(federation(mlp(), scheme=SCHEME, training=TOUCHES_ALL).run(1).global_model)


class TestAClientThatFails:
    @pytest.mark.parametrize(
        "how",
        [RuntimeError("boom"), TrainingError("diverged"), MemoryError(), KeyError("x"), "exit"],
        ids=repr,
    )
    def test_by_raising_costs_its_own_update_only(self, how, without_partner_1):
        result = federation(mlp(), scheme=SCHEME, **with_bomb(how)).run(1)
        assert set(result.rounds[0].failed) == {"partner-1"}
        assert same(weights(result.global_model), without_partner_1)

    @pytest.mark.parametrize("how", ["exit", "kill"])
    def test_in_a_worker_process_costs_its_own_update_only(self, how, without_partner_1):
        result = federation(mlp(), scheme=SCHEME, workers=2, **with_bomb(how)).run(1)
        assert set(result.rounds[0].failed) == {"partner-1"}
        assert same(weights(result.global_model), without_partner_1)

    def test_by_returning_rubbish_costs_its_own_update_only(self, monkeypatch, without_partner_1):
        answers = InTurn.answers

        def rubbish(crew, jobs):
            for answer in answers(crew, jobs):
                yield (
                    Answer(answer.client, bytearray(b"?"))
                    if answer.client == "partner-1"
                    else answer
                )

        monkeypatch.setattr(InTurn, "answers", rubbish)
        result = federation(mlp(), scheme=SCHEME, training=TOUCHES_ALL).run(1)
        assert same(weights(result.global_model), without_partner_1)

    def test_says_what_happened_and_where(self):
        result = federation(mlp(), scheme=SCHEME, **with_bomb(RuntimeError("boom"))).run(1)
        assert "RuntimeError: boom" in result.rounds[0].failed["partner-1"]
        assert "test_8" in result.rounds[0].failed["partner-1"]

    def test_may_take_part_again_in_the_next_round(self, monkeypatch):
        inspect = FedQSNServer.inspect

        def skip_once(server, client, reply):
            if (client, reply.round) == ("partner-1", 1):
                raise ProtocolError("skipped")
            return inspect(server, client, reply)

        monkeypatch.setattr(FedQSNServer, "inspect", skip_once)
        result = federation(mlp(), scheme=SCHEME).run(2)
        assert [set(record.failed) for record in result.rounds] == [{"partner-1"}, set()]

    def test_together_with_all_others_ends_the_run_with_the_first_reason(self):
        bad = rows(4)
        bad[1]["image"] = Bomb(RuntimeError("boom"))
        with pytest.raises(TrainingError, match="boom"):
            federation(mlp(), clients={"a": bad, "b": bad}, training=TOUCHES_ALL).run(1)


def test_a_pool_that_broke_between_two_jobs_still_does_the_second():
    federation_ = federation(mlp(), scheme=SCHEME, **with_bomb("kill"))
    place = federation_.workplace()
    server = SCHEME.server(mlp(), SECRET)
    server.begin_round(1)

    def jobs():
        for client in ("partner-1", "partner-0", "partner-2"):
            yield Job(client, server.release(client).to_bytes(), 1)
            time.sleep(0.5 if client == "partner-1" else 0)  # long enough to die

    pool = Pool(place, 2)
    try:
        # Start the processes, so that the first job dies at once.
        list(pool.answers([Job("partner-0", server.release("partner-0").to_bytes(), 1)]))
        answers = {answer.client: answer for answer in pool.answers(jobs())}
    finally:
        pool.close()
    assert answers["partner-1"].failure is not None
    assert answers["partner-0"].reply is not None
    assert answers["partner-2"].reply is not None


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = standard(folder, keep_messages=True).run(3)
    return digest(weights(result.global_model)), metrics(folder), files(folder / "messages")


def check_resumed(folder, uninterrupted, **changes):
    result = standard(folder, keep_messages=True, **changes).run(3, resume=True)
    found = digest(weights(result.global_model)), metrics(folder), files(folder / "messages")
    assert found == uninterrupted
    assert checkpoints(folder) == [1, 2, 3]


def checkpoints(folder):
    """The rounds of which there are checkpoints; nothing else lies beside them."""
    names = sorted(os.listdir(folder / "checkpoints"))
    assert all(name.startswith("round-") for name in names), names
    return [int(name.removeprefix("round-")) for name in names]


class PowerCutError(BaseException):
    """Nobody catches it."""


def cut_at(moment, names, patch):
    """Power is gone at one of the calls of these functions of the room that writes."""
    calls = itertools.count(1)

    def before(function):
        def call(*arguments, **options):
            if next(calls) == moment:
                raise PowerCutError
            return function(*arguments, **options)

        return call

    for name in names:
        patch.setattr(shards, name, before(getattr(shards, name)))


@pytest.fixture
def small_shards(monkeypatch):
    """Checkpoints of four shards and more."""
    make = CheckpointFolder.__init__
    monkeypatch.setattr(
        CheckpointFolder, "__init__", lambda self, f, keep: make(self, f, 6200, keep)
    )


def running():
    """Process -> its parent; the dead that nobody has buried are left out."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may hold spaces: state and parent come after it.
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(path.parent.name)] = int(parent)
    return parents


def descendants(pid):
    """All processes below this one."""
    parents, found = running(), {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


class TestAKilledRun:
    @pytest.mark.parametrize("event", ["finished 1", "client 2"])
    def test_goes_on_to_the_same_result(self, event, tmp_path, uninterrupted):
        sampled = sorted(uninterrupted[1][1]["bytes_down"])
        event = event.replace("client", sampled[0])
        arguments = [sys.executable, str(SCRIPT), str(tmp_path), "3", "--stop", event]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.strip() == event:
                    break
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert len(metrics(tmp_path)) == 1
        check_resumed(tmp_path, uninterrupted)

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
    def test_leaves_no_worker_behind(self, tmp_path):
        arguments = [sys.executable, str(SCRIPT), str(tmp_path), "3", "--stop", "finished 1"]
        arguments += ["--workers", "2"]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            while process.stdout.readline().strip() != "finished 1":
                pass
            left = descendants(process.pid)
            assert len(left) >= 2
            process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 20
        while left & running().keys():
            assert time.monotonic() < deadline, "workers outlive their server"
            time.sleep(0.1)

    def test_in_the_middle_of_a_file_goes_on_to_the_same_result(
        self, tmp_path, uninterrupted, monkeypatch
    ):
        standard(tmp_path, keep_messages=True).run(1)

        def half(tensors, path, metadata):
            path.write_bytes(b"half of a model")
            raise PowerCutError

        with monkeypatch.context() as patch:
            patch.setattr(shards, "save_file", half)
            with pytest.raises(PowerCutError):
                standard(tmp_path, keep_messages=True).run(3, resume=True)
        check_resumed(tmp_path, uninterrupted)

    @pytest.mark.parametrize("moment", range(1, 9))
    def test_at_any_moment_of_saving_goes_on_to_the_same_result(
        self, moment, tmp_path, uninterrupted, monkeypatch
    ):
        with monkeypatch.context() as patch:
            cut_at(moment, ["sync"], patch)
            with pytest.raises(PowerCutError):
                standard(tmp_path, keep_messages=True).run(3)
        check_resumed(tmp_path, uninterrupted)

    @pytest.mark.parametrize("moment", range(1, 25, 3))
    def test_at_any_moment_of_saving_shards_goes_on_to_the_same_result(
        self, moment, tmp_path, uninterrupted, monkeypatch, small_shards
    ):
        standard(tmp_path, keep_messages=True).run(1)
        with monkeypatch.context() as patch:
            cut_at(moment, ["save_file", "sync"], patch)
            with pytest.raises(PowerCutError):
                standard(tmp_path, keep_messages=True).run(3, resume=True)
        check_resumed(tmp_path, uninterrupted)
        names = os.listdir(tmp_path / "checkpoints" / "round-000003")
        assert sum(name.startswith("model-0000") for name in names) == 4

    def test_may_go_on_with_other_workers(self, tmp_path, uninterrupted):
        standard(tmp_path, keep_messages=True, workers=2).run(1)
        check_resumed(tmp_path, uninterrupted)

    def test_keeps_clients_in_their_mask_groups(self, tmp_path):
        settings = {
            "scheme": FedQSN(policy="grouped", groups=3, client_mask=0.5),
            "clients": {f"c{i}": rows(4, seed=i) for i in range(8)},
        }
        whole = standard(None, **settings).run(4)
        standard(tmp_path, **settings).run(1)
        standard(tmp_path, **settings).run(2, resume=True)
        resumed = standard(tmp_path, **settings).run(4, resume=True)
        assert same(weights(resumed.global_model), weights(whole.global_model))

    def test_with_regmean_and_a_limit_on_releases_goes_on_to_the_same_result(self, tmp_path):
        settings = {
            "scheme": FedQSN(policy="sticky", units="neurons", aggregation="regmean"),
            "releases": 3,
            "keep_messages": True,
        }
        whole = standard(tmp_path / "whole", **settings).run(4)
        standard(tmp_path / "cut", **settings).run(1)

        class Killer(Observer):
            def client_finished(self, number, client, failure):
                if number == 3:
                    raise PowerCutError

        with pytest.raises(PowerCutError):
            standard(tmp_path / "cut", observer=Killer(), **settings).run(4, resume=True)
        assert len(metrics(tmp_path / "cut")) == 2
        resumed = standard(tmp_path / "cut", **settings).run(4, resume=True)
        assert same(weights(resumed.global_model), weights(whole.global_model))
        assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
        kept = [files(tmp_path / name / "messages") for name in ("cut", "whole")]
        assert kept[0] == kept[1]

    def test_that_had_finished_does_nothing(self, tmp_path, uninterrupted):
        standard(tmp_path, keep_messages=True).run(3)
        check_resumed(tmp_path, uninterrupted)

    def test_that_had_not_begun_begins(self, tmp_path, uninterrupted):
        check_resumed(tmp_path, uninterrupted)

    def test_without_metrics_gets_them_back(self, tmp_path, uninterrupted):
        standard(tmp_path, keep_messages=True).run(2)
        (tmp_path / "metrics.jsonl").unlink()
        check_resumed(tmp_path, uninterrupted)


class TestAFullDisk:
    def test_leaves_the_round_before(self, tmp_path, uninterrupted, monkeypatch):
        standard(tmp_path, keep_messages=True).run(1)
        before, save = files(tmp_path / "checkpoints"), shards.save_file  # type: ignore[attr-defined]

        def half(tensors, path, metadata):
            save(tensors, path, metadata=metadata)
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(shards, "save_file", half)
        with pytest.raises(CheckpointError, match=r"Round 2 could not be saved.*Round 1 is kept"):
            standard(tmp_path, keep_messages=True).run(3, resume=True)
        assert files(tmp_path / "checkpoints") == before
        monkeypatch.setattr(shards, "save_file", save)
        check_resumed(tmp_path, uninterrupted)

    def test_is_told_from_a_limit_of_the_system(self, tmp_path, uninterrupted):
        # Real, not pretended: no file of this process may grow past a half of the checkpoint.
        standard(tmp_path, keep_messages=True).run(1)
        before = files(tmp_path / "checkpoints")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, limits[1]))
        try:
            with pytest.raises(CheckpointError, match="Round 2 could not be saved"):
                standard(tmp_path).run(3, resume=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert files(tmp_path / "checkpoints") == before
        check_resumed(tmp_path, uninterrupted)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    standard(folder).run(1)
    return folder


OTHERS = [
    ("'seed' differs", {"seed": 99}),
    ("'scheme' differs", {"scheme": FedQSN(bits=8)}),
    ("'scheme' differs", {"scheme": FedAvg()}),
    ("'secret' differs", {"secret": Secret(bytes(32))}),
    ("'clients' differs", {"clients": {**CLIENTS, "new": rows(3)}}),
    ("'clients' differs", {"clients": {**CLIENTS, "partner-0": rows(5)}}),
    ("'training' differs", {"training": type(FAST)(steps=1)}),
    ("'clients_per_round' differs", {"clients_per_round": 2}),
    ("'releases' differs", {"releases": 3}),
    ("'scheme' differs", {"scheme": replace(SCHEME, aggregation="regmean")}),
    ("'scheme' differs", {"scheme": replace(SCHEME, aggregation=RegMean(ridge=0.5))}),
]


def as_of_the_version_before(folder):
    """Make the checkpoint of round 1 one that fedveil 0.1 could have written."""
    place = folder / "checkpoints" / "round-000001"
    values = json.loads((place / "state.json").read_text())
    del values["digest"], values["configuration"]["bounds"]
    values["format"] = 1
    # The tensors without metadata, then the sum of both.
    save_file(load_file(place / "model.safetensors"), place / "model.safetensors")
    whole = hashlib.sha256((place / "model.safetensors").read_bytes())
    whole.update(json.dumps(values, sort_keys=True).encode())
    values["digest"] = whole.hexdigest()
    (place / "state.json").write_text(json.dumps(values, indent=1))
    (folder / "checkpoints" / "unfinished-000002").mkdir()


class TestACheckpoint:
    @pytest.mark.parametrize(("message", "change"), OTHERS)
    def test_of_another_configuration_is_refused_by_what_differs(self, saved, message, change):
        before = files(saved)
        with pytest.raises(CheckpointError, match=message):
            standard(saved, **change).run(2, resume=True)
        assert files(saved) == before

    def test_of_another_model_is_refused(self, saved):
        other = Federation(
            mlp(seed=1), CLIENTS, task=ImageClassification(), scheme=SCHEME, training=FAST, seed=3,
            secret=SECRET, clients_per_round=3, out=saved,
        )  # fmt: skip
        with pytest.raises(CheckpointError, match="'model' differs"):
            other.run(2, resume=True)

    @pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
    @pytest.mark.parametrize("how", ["flip", "cut", "empty", "missing", "rubbish"])
    def test_that_was_altered_is_refused(self, tmp_path, name, how):
        standard(tmp_path).run(1)
        path = tmp_path / "checkpoints" / "round-000001" / name
        data = bytearray(path.read_bytes())
        data[len(data) * 2 // 3] ^= 1
        changed = {"flip": bytes(data), "cut": bytes(data)[:-9], "empty": b"", "rubbish": b"[1]"}
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(changed[how])
        with pytest.raises(CheckpointError, match="damaged"):
            standard(tmp_path).run(2, resume=True)

    @pytest.mark.parametrize("name", ["00001", "00003", "index"])
    @pytest.mark.parametrize("how", ["flip", "cut", "missing", "swapped"])
    def test_of_shards_that_was_altered_is_refused(self, tmp_path, name, how, small_shards):
        standard(tmp_path).run(1)
        (path,) = (tmp_path / "checkpoints" / "round-000001").glob(f"model*{name}*")
        data = bytearray(path.read_bytes())
        if how == "missing":
            path.unlink()
        elif how == "swapped":
            other = path.with_name("model-00002-of-00004.safetensors")
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
        else:
            data[len(data) * 2 // 3] ^= 1
            path.write_bytes(data if how == "flip" else data[:-9])
        with pytest.raises(CheckpointError, match="damaged"):
            standard(tmp_path).run(2, resume=True)

    def test_of_the_version_before_is_refused_by_what_differs(self, tmp_path):
        # It sampled clients and drew their seeds otherwise: the run would not be the one begun.
        standard(tmp_path, keep_messages=True).run(1)
        as_of_the_version_before(tmp_path)
        before = files(tmp_path)
        with pytest.raises(CheckpointError, match="another configuration: 'bounds' differs"):
            standard(tmp_path, keep_messages=True).run(3, resume=True)
        assert files(tmp_path) == before

    def test_of_the_version_before_is_gone_on_from_by_its_number(self, tmp_path, uninterrupted):
        standard(tmp_path, keep_messages=True).run(1)
        as_of_the_version_before(tmp_path)
        standard(tmp_path, keep_messages=True).run(2, resume=True, from_round=1)
        check_resumed(tmp_path, uninterrupted)

    @pytest.mark.parametrize("key", ["scheme", "records", "configuration"])
    def test_whose_numbers_were_altered_is_refused(self, tmp_path, key):
        standard(tmp_path).run(1)
        path = tmp_path / "checkpoints" / "round-000001" / "state.json"
        values = json.loads(path.read_text())
        values[key] = {"round": 5} if key == "scheme" else []
        path.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match="damaged"):
            standard(tmp_path).run(6, resume=True)

    def test_of_another_version_is_refused(self, tmp_path):
        standard(tmp_path).run(1)
        path = tmp_path / "checkpoints" / "round-000001" / "state.json"
        path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
        with pytest.raises(CheckpointError, match="another version"):
            standard(tmp_path).run(2, resume=True)

    def test_in_the_way_is_not_overwritten_unasked(self, saved):
        before = files(saved)
        with pytest.raises(CheckpointError, match="already holds"):
            standard(saved).run(1)
        assert files(saved) == before

    def test_is_overwritten_if_asked_and_nothing_else_is(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        standard(tmp_path).run(2)
        standard(tmp_path, seed=8).run(1, overwrite=True)
        assert len(metrics(tmp_path)) == 1
        assert (tmp_path / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize(
        "name",
        ["round-000000", "unfinished-round-000002", "replaced-round-000001", "unfinished-000002"],
    )
    def test_left_behind_by_a_crash_is_cleared_away(self, tmp_path, name):
        standard(tmp_path).run(2)
        (tmp_path / "checkpoints" / name).mkdir()
        standard(tmp_path).run(3, resume=True)
        assert checkpoints(tmp_path) == [1, 2, 3]

    @pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
    @pytest.mark.parametrize("how", ["cut", "missing"])
    def test_that_was_altered_is_passed_over_for_the_one_before(
        self, tmp_path, uninterrupted, name, how
    ):
        standard(tmp_path, keep_messages=True).run(2)
        path = tmp_path / "checkpoints" / "round-000002" / name
        path.write_bytes(path.read_bytes()[:-9])
        if how == "missing":
            path.unlink()
        with pytest.warns(UserWarning, match=r"damaged.*Going on after round 1"):
            check_resumed(tmp_path, uninterrupted)


def test_resuming_needs_a_folder_and_a_kept_secret(tmp_path):
    with pytest.raises(FedveilError, match="nothing to resume"):
        standard(None).run(1, resume=True)
    with pytest.raises(FedveilError, match="secret it was begun with"):
        standard(tmp_path, secret=None).run(1, resume=True)


def test_a_round_that_nobody_answers_changes_nothing():
    server = SCHEME.server(mlp(), SECRET)
    server.begin_round(1)
    server.release("a")
    before = snapshot(server.state().tensors)
    server.end_round()
    assert same(server.state().tensors, before)
