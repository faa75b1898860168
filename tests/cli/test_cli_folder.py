"""The run folder as the command line writes it: private, nobody else's, and one run at a time."""

import os
import shutil
import stat
import subprocess
import sys

import pytest
from cli_samples import run_fedveil

from fedveil.run.folder import RunFolder


def open_to_others(folder):
    found = [p for p in (folder, *folder.rglob("*")) if stat.S_IMODE(p.lstat().st_mode) & 0o077]
    return sorted(str(p.relative_to(folder)) for p in found)


def change(home, **keys):
    """Other keys under [federation]."""
    path = home / "federation.toml"
    lines = "".join(f"{key} = {value}\n" for key, value in keys.items())
    path.write_text(path.read_text() + lines)


@pytest.mark.slow
def test_a_finished_and_audited_run_is_its_owners_alone_whatever_the_umask(home, call):
    change(home, track='["tensorboard"]')
    before = os.umask(0)
    try:
        for arguments in (
            ("run", home / "federation.toml", "--rounds", 1),
            ("audit", home / "runs" / "federation", "--coalition", 1),
            ("report", home / "runs" / "federation"),
        ):
            code, _, err = call(*arguments)
            assert (code, err) == (0, "")
    finally:
        os.umask(before)
    out = home / "runs" / "federation"
    names = {path.name for path in out.iterdir()}
    assert names == {
        ".fedveil", "audit.json", "checkpoints", "exposure.head", "exposure.jsonl", "messages",
        "metrics.jsonl", "model", "report.html", "run.json", "summary.json", "summary.png",
        "tensorboard",
    }  # fmt: skip
    assert open_to_others(out) == []
    assert stat.S_IMODE((home / "federation.secret").stat().st_mode) == 0o600
    # All of it is known to be fedveil's: nothing is left of it by the next run.
    RunFolder(out).prepare(overwrite=True)
    assert os.listdir(out) == [".fedveil"]


def test_a_secret_that_others_can_read_is_said_once_and_taken(home, call):
    assert call("run", home / "federation.toml", "--rounds", 1)[0] == 0
    secret = home / "federation.secret"
    secret.chmod(0o644)
    code, _, err = call("run", home / "federation.toml", "--rounds", 2, "--resume")
    assert code == 0
    assert err.startswith("warning: Others can read or replace the secret")
    assert len(err.splitlines()) == 1
    assert f"chmod 600 {secret}" in err
    assert secret.read_text().strip() not in err


def test_nothing_of_the_users_is_touched_in_a_folder_of_his(home, call):
    # The base is called "model" there, as it may well be.
    shutil.copytree(home / "bert", home / "model")
    before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    for more in ((), ("--overwrite",), ("--resume",)):
        code, _, err = call("run", home / "federation.toml", "--out", home, *more)
        assert code == 4
        assert "Something that no run of fedveil wrote is in the way" in err
        assert "model" in err
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before
    shutil.rmtree(home / "model")
    assert call("run", home / "federation.toml", "--out", home, "--rounds", 1)[0] == 0
    assert call("run", home / "federation.toml", "--out", home, "--overwrite")[0] == 0
    own = {p: text for p, text in before.items() if home / "model" not in p.parents}
    assert {p: p.read_bytes() for p in own} == own


def test_two_commands_in_one_folder_do_not_mix(home):
    command = [sys.executable, "-m", "fedveil", "run", "federation.toml"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with RunFolder(home / "runs" / "federation").held():
        second = subprocess.run(
            command, cwd=home, env=environment, capture_output=True, text=True, check=False
        )
    assert second.returncode == 4
    assert f"process {os.getpid()}" in second.stderr
    assert "A run is at work in this folder" in second.stderr
    assert not (home / "federation.secret").exists()
    assert run_fedveil("run", "federation.toml", "--rounds", "1", home=home).returncode == 0


def test_the_most_of_a_reply_can_be_set(home, call):
    change(home, max_reply_mb=1)
    assert call("run", home / "federation.toml", "--rounds", 1)[0] == 0
    change(home, max_reply_mb=0)
    assert call("run", home / "federation.toml", "--rounds", 1)[0] == 2
