"""Whose a run folder is: nobody else's things are touched, and one run at a time works in it."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import toys
from fedveil import CheckpointError, FedQSN, FedveilError, Observer
from fedveil.report import write_summary
from fedveil.report.page import write_page
from fedveil.report.reading import RunFolder as ReadFolder
from fedveil.run.client_files import ClientFiles
from fedveil.run.folder import RunFolder
from process import standard

SCRIPT = Path(__file__).parent.parent / "process.py"
REMEMBERS = FedQSN(units="neurons", update_bits=4, error_feedback=True)
NAMES = ("run.json", "metrics.jsonl", "exposure.jsonl", "exposure.head", "checkpoints", "messages")


def run(out, rounds=1, *, how=None, **changes):
    settings = {"scheme": REMEMBERS, "keep_messages": True, **changes}
    return toys.federation(toys.mlp(), out=out, **settings).run(rounds, **(how or {}))


def put(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def everything(folder):
    """All paths with what is in them, also empty folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in folder.rglob("*")}  # fmt: skip


class TestAFirstRun:
    OWN = ("clients/a/round-000001.safetensors", "clients/notes.txt", "model/config.json",
           "summary.json", "tensorboard/events", "answers.jsonl", "notes.txt")  # fmt: skip

    def test_deletes_nothing_and_writes_over_nothing(self, tmp_path, monkeypatch):
        for name in self.OWN:
            put(tmp_path / name)
        monkeypatch.chdir(tmp_path)
        run(".", 2)
        run(".", 2, how={"resume": True})
        run(".", 1, how={"overwrite": True}, seed=2)
        assert [(tmp_path / name).read_text() for name in self.OWN] == ["mine"] * len(self.OWN)

    @pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
    @pytest.mark.parametrize("name", NAMES)
    def test_says_what_is_in_its_way_and_changes_nothing(self, tmp_path, name, how):
        inside = name if "." in name else f"{name}/mine.txt"
        put(tmp_path / inside)
        before = everything(tmp_path)
        with pytest.raises(CheckpointError, match=rf"in the way.*{name}.*Nothing was changed"):
            run(tmp_path, how=how)
        assert everything(tmp_path) == before

    def test_takes_empty_folders_for_its_own(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        run(tmp_path)
        assert os.listdir(tmp_path / "checkpoints") == ["round-000001"]

    @pytest.mark.parametrize("content", ["{}", "[]", '{"format": 1}', "\xff"])
    def test_takes_no_run_json_of_somebody_else_for_its_own(self, tmp_path, content):
        put(tmp_path / "run.json", content)
        with pytest.raises(CheckpointError, match="in the way"):
            run(tmp_path, how={"overwrite": True})
        assert (tmp_path / "run.json").read_text() == content

    @pytest.mark.parametrize("own", [".fedveil", ".fedveil/settings.toml"])
    def test_does_not_share_a_folder_of_its_name(self, tmp_path, own):
        put(tmp_path / own)
        with pytest.raises(CheckpointError, match=r"in the way.*\.fedveil"):
            run(tmp_path)
        assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [own]

    def test_of_a_file_in_the_folders_place_says_so(self, tmp_path):
        put(tmp_path / "out")
        with pytest.raises(FedveilError):
            run(tmp_path / "out")
        assert (tmp_path / "out").read_text() == "mine"


class TestOverwriting:
    def test_leaves_what_others_put_beside_and_inside(self, tmp_path):
        own = ["notes.txt", "messages/notes.txt", "checkpoints/keep/x", "clients/a/b",
               "messages/round-000001/notes.txt", "summary.txt"]  # fmt: skip
        run(tmp_path, 2)
        for name in own:
            put(tmp_path / name)
        run(tmp_path, 1, how={"overwrite": True}, seed=5)
        assert [(tmp_path / name).read_text() for name in own] == ["mine"] * len(own)
        kept = [p.name for p in (tmp_path / "messages").rglob("*.safetensors")]
        assert len(kept) == 2 * len(toys.metrics(tmp_path)[0]["bytes_down"])
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["keep", "round-000001"]

    def test_refuses_if_something_else_has_taken_a_name_since(self, tmp_path):
        run(tmp_path, keep_messages=False)
        put(tmp_path / "messages" / "letter.txt")
        before = everything(tmp_path)
        with pytest.raises(CheckpointError, match=r"in the way.*messages"):
            run(tmp_path, how={"overwrite": True})
        assert everything(tmp_path) == before

    def finished(self, folder):
        run(folder, 2, test=toys.rows(4))
        result = {"base": 1.0, "global": 99.0, "rounds": [99.0, 99.0]}
        write_summary(folder, 1, {"fedqsn": result})
        write_page(folder)
        for name in ("model/model.safetensors", "summary.png", "answers.jsonl"):
            RunFolder(folder).claim(name.split("/")[0])
            put(folder / name)

    def test_and_interrupted_reports_nothing_of_the_old_run(self, tmp_path):
        self.finished(tmp_path)

        class Killer(Observer):
            def client_finished(self, number, client, failure):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, how={"overwrite": True}, seed=3, observer=Killer())
        assert toys.metrics(tmp_path) == []
        for name in ("summary.json", "summary.png", "model", "answers.jsonl", "report.html"):
            assert not (tmp_path / name).exists()
        assert "99" not in write_page(tmp_path).read_text().replace("0.99", "")

    @pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
    def test_interrupted_at_any_moment_is_finished_by_the_next_run(
        self, tmp_path, monkeypatch, how
    ):
        self.finished(tmp_path / "old")
        (tmp_path / "old" / "notes.txt").write_text("mine")
        fresh = run(tmp_path / "fresh", 1, seed=3).rounds[0].bytes_up
        moments = 0
        for moment in range(1, 1000, 6):
            folder = tmp_path / f"at-{moment}"
            shutil.copytree(tmp_path / "old", folder)
            count = iter(range(1, 10_000))

            def cut(function, count=count, moment=moment):
                def call(path, *arguments, **options):
                    if ".fedveil" not in path.parts and next(count) == moment:
                        raise KeyboardInterrupt
                    return function(path, *arguments, **options)

                return call

            with monkeypatch.context() as patch:
                for name in ("unlink", "rmdir"):
                    patch.setattr(Path, name, cut(getattr(Path, name)))
                try:
                    RunFolder(folder).prepare(overwrite=True)
                    break
                except KeyboardInterrupt:
                    moments += 1
            if moment > 1:  # with its first step it is no longer the folder of the old run
                with pytest.raises(CheckpointError, match="not the folder of a run"):
                    write_page(folder)
            assert run(folder, 1, how=how, seed=3).rounds[0].bytes_up == fresh
            assert not (folder / "summary.json").exists()
            assert len(toys.metrics(folder)) == 1
        assert moments > 4
        assert {p.name for p in folder.iterdir()} == {".fedveil", "notes.txt"}


def test_a_run_that_went_on_is_not_reported_by_what_was_said_before(tmp_path):
    run(tmp_path, 1, test=toys.rows(4))
    figures = {"base": 12.0, "global": 99.0, "bytes_up": 7.0, "rounds": [99.0]}
    write_summary(tmp_path, 1, {"fedqsn": figures})
    assert ReadFolder.read(tmp_path).figure("global") == 99.0
    run(tmp_path, 2, how={"resume": True}, test=toys.rows(4))
    assert ReadFolder.read(tmp_path).figure("global") is None
    assert ReadFolder.read(tmp_path).figure("base") == 12.0


class TestAnEarlierVersionsFolder:
    @pytest.fixture
    def old(self, tmp_path):
        """As it was before folders were marked: client memory is beside the rest."""
        run(tmp_path, 2)
        shutil.move(tmp_path / ".fedveil" / "clients", tmp_path / "clients")
        shutil.rmtree(tmp_path / ".fedveil")
        (tmp_path / "exposure.head").unlink()
        lines = [json.loads(x) for x in (tmp_path / "exposure.jsonl").read_text().splitlines()]
        text = "".join(
            json.dumps({k: v for k, v in x.items() if k != "after"}) + "\n" for x in lines
        )
        (tmp_path / "exposure.jsonl").write_text(text)
        return tmp_path

    def test_is_resumed_with_what_clients_kept(self, old, tmp_path_factory):
        put(old / "clients" / "letters" / "to-x.txt")
        put(old / "clients" / "nobody" / "round-000001.safetensors")
        # Its records say how far a chained ledger went: those of an earlier version do not.
        resumed = _without_heads(old, lambda: run(old, 3, how={"resume": True}))
        whole = run(tmp_path_factory.mktemp("whole"), 3)
        assert toys.same(toys.weights(resumed.global_model), toys.weights(whole.global_model))
        assert (old / "clients" / "letters" / "to-x.txt").read_text() == "mine"
        assert (old / "clients" / "nobody" / "round-000001.safetensors").read_text() == "mine"
        assert [p.name for p in (old / "clients").iterdir()] == ["letters", "nobody"]

    def test_is_overwritten_thing_by_thing(self, old):
        write_summary(old, 1, {"fedqsn": {"global": 99.0}})
        put(old / "audit.json", '{"mine": 1}')
        put(old / "clients" / "letter.txt")
        run(old, 1, how={"overwrite": True})
        assert not (old / "summary.json").exists()
        assert (old / "audit.json").read_text() == '{"mine": 1}'
        assert (old / "clients" / "letter.txt").read_text() == "mine"
        assert len(toys.metrics(old)) == 1

    def test_is_closed_to_others_once_it_is_taken_up(self, old):
        for path in (p for name in NAMES for p in (old / name, *(old / name).rglob("*"))):
            if path.exists():
                path.chmod(0o755 if path.is_dir() else 0o644)
        RunFolder(old).prepare()
        assert open_to_others(old) == []


def _without_heads(folder, work):
    """Work on a checkpoint whose records know nothing of chained ledgers."""
    with pytest.MonkeyPatch.context() as patch:
        read = RoundRecordFromJson()
        patch.setattr("fedveil.run.checkpoint.RoundRecord.from_json", read)
        return work()


class RoundRecordFromJson:
    def __call__(self, values):
        from fedveil.run.records import RoundRecord

        return RoundRecord(**{**values, "ledger": None})


def open_to_others(folder):
    """What others than the owner of the files may read, write or enter."""
    found = [p for p in folder.rglob("*") if stat.S_IMODE(p.lstat().st_mode) & 0o077]
    return sorted(str(p.relative_to(folder)) for p in found)


class TestOneAtATime:
    def start(self, out, *arguments):
        command = [sys.executable, str(SCRIPT), str(out), "3", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for(self, process, event):
        for line in process.stdout:
            if line.strip() == event:
                return
        raise AssertionError(process.stderr.read())

    def test_a_second_process_is_refused_at_once_and_changes_nothing(self, tmp_path):
        with self.start(tmp_path, "--stop", "finished 1") as first:
            self.wait_for(first, "finished 1")
            before = everything(tmp_path)
            for how in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(CheckpointError, match="A run is at work") as caught:
                    standard(tmp_path, keep_messages=True).run(3, **how)
            with self.start(tmp_path) as second:
                _, told = second.communicate(timeout=60)
            assert everything(tmp_path) == before
            first.send_signal(signal.SIGKILL)
        assert f"process {first.pid} on {os.uname().nodename}, since 20" in str(caught.value)
        assert second.returncode != 0
        assert f"process {first.pid}" in told

    def test_a_dead_runs_folder_is_taken_over(self, tmp_path):
        with self.start(tmp_path, "--stop", "finished 1", "--workers", "2") as first:
            self.wait_for(first, "finished 1")
            first.send_signal(signal.SIGKILL)
        result = standard(tmp_path, keep_messages=True).run(2, resume=True)
        assert len(result.rounds) == 2

    def test_a_second_run_of_this_process_is_refused(self, tmp_path):
        caught = []

        class Second(Observer):
            def client_finished(self, number, client, failure):
                def again():
                    try:
                        run(tmp_path)
                    except FedveilError as error:
                        caught.append(error)

                if not caught:
                    thread = threading.Thread(target=again)
                    thread.start()
                    thread.join()

        run(tmp_path, observer=Second())
        assert f"process {os.getpid()}" in str(caught[0])

    def test_who_holds_a_folder_may_run_in_it(self, tmp_path):
        with RunFolder(tmp_path).held():
            run(tmp_path)
            with pytest.raises(CheckpointError, match="already holds"):
                run(tmp_path)
        run(tmp_path, 2, how={"resume": True})

    def test_a_folder_by_another_name_is_the_same(self, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "run")
        with RunFolder(tmp_path / "run").held():
            run(tmp_path / "link")
        assert (tmp_path / "run" / "run.json").is_file()

    def test_without_locks_there_is_a_warning(self, tmp_path, monkeypatch):
        def no_locks(*arguments, **options):
            raise OSError(37, "No locks available")

        monkeypatch.setattr("fedveil.run.folder.FileLock.acquire", no_locks)
        with pytest.warns(UserWarning, match=r"has no locks.*No locks available"):
            run(tmp_path)
        assert len(toys.metrics(tmp_path)) == 1


class TestTheLedgerOfARun:
    @pytest.fixture
    def begun(self, tmp_path):
        run(tmp_path, 2)
        return tmp_path

    def refused(self, folder, rounds=3):
        sent = []

        class Told(Observer):
            def client_finished(self, number, client, failure):
                sent.append(client)

        before = everything(folder)
        with pytest.raises(CheckpointError, match=r"ledger.*(restore|Restore)"):
            run(folder, rounds, how={"resume": True}, observer=Told())
        assert sent == []
        assert everything(folder) == before

    @pytest.mark.parametrize("names", [["exposure.jsonl"], ["exposure.head"],
                                       ["exposure.jsonl", "exposure.head"]])  # fmt: skip
    def test_that_is_not_there_is_an_error_before_anything_is_released(self, begun, names):
        for name in names:
            (begun / name).unlink()
        self.refused(begun)

    def test_that_is_of_the_round_before_is_an_error(self, tmp_path, tmp_path_factory):
        earlier = tmp_path_factory.mktemp("earlier")
        run(tmp_path, 1)
        for name in ("exposure.jsonl", "exposure.head"):
            shutil.copy(tmp_path / name, earlier)
        run(tmp_path, 2, how={"resume": True})
        for name in ("exposure.jsonl", "exposure.head"):
            shutil.copy(earlier / name, tmp_path)
        self.refused(tmp_path)

    @pytest.mark.parametrize("kept", [True, False])
    def test_that_was_lost_before_the_first_round_was_finished_is_one_too(self, tmp_path, kept):
        class Killer(Observer):
            def client_finished(self, number, client, failure):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, observer=Killer(), keep_messages=kept)
        if kept:  # then it is enough that messages say so
            shutil.rmtree(tmp_path / ".fedveil")
        for name in ("exposure.jsonl", "exposure.head"):
            (tmp_path / name).unlink()
        with pytest.raises(CheckpointError, match="ledger"):
            run(tmp_path, 1, keep_messages=kept)

    def test_of_another_run_is_an_error(self, begun, tmp_path_factory):
        other = tmp_path_factory.mktemp("other")
        run(other, 2, seed=9, scheme=FedQSN(units="neurons", policy="fresh"))
        for name in ("exposure.jsonl", "exposure.head"):
            shutil.copy(other / name, begun)
        self.refused(begun)


def test_client_memory_is_where_no_user_has_a_name(tmp_path):
    run(tmp_path)
    assert not (tmp_path / "clients").exists()
    kept = [
        p.relative_to(tmp_path / ".fedveil" / "clients")
        for p in RunFolder(tmp_path).memories.glob("*/*")
    ]
    assert {path.name for path in kept} == {"round-000001.safetensors"}


def test_forgetting_what_clients_kept_leaves_everything_else(tmp_path):
    files = ClientFiles(tmp_path)
    files.keep("a", 1, {"w": torch.ones(2)})
    files.keep("b", 1, {"w": torch.ones(2)})
    put(tmp_path / "b" / "notes.txt")
    put(tmp_path / "letter.txt")
    files.clear()
    assert everything(tmp_path) == {"b": None, "b/notes.txt": b"mine", "letter.txt": b"mine"}


class TestModes:
    def test_of_a_run_are_its_owners_alone_whatever_the_umask(self, tmp_path):
        before = os.umask(0)
        try:
            run(tmp_path / "run", 2, test=toys.rows(3))
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
        assert len(toys.files(tmp_path / "run")) > 20
        assert open_to_others(tmp_path) == []

    def test_of_what_clients_keep_likewise(self, tmp_path):
        before = os.umask(0)
        try:
            ClientFiles(tmp_path / "memory").keep("a", 1, {"w": torch.ones(2)})
        finally:
            os.umask(before)
        assert (tmp_path / "memory" / "a" / "round-000001.safetensors").is_file()
        assert open_to_others(tmp_path) == []


def test_a_ledger_that_went_with_everything_but_the_figures_is_missed(tmp_path):
    from toys import federation, mlp

    federation(mlp(), out=tmp_path).run(1)
    for name in ("exposure.jsonl", "exposure.head"):
        (tmp_path / name).unlink()
    for name in ("checkpoints", ".fedveil"):
        shutil.rmtree(tmp_path / name)
    for resume in (True, False):
        with pytest.raises(CheckpointError):
            federation(mlp(), out=tmp_path).run(1, resume=resume)
