"""The commands that look at a run afterwards, on a run of a configuration file."""

import json
import os
import shutil

import datasets
import pytest
import torch
from cli_samples import run_fedveil
from safetensors.torch import save_file

import toys
from fedveil.audit import Evidence
from fedveil.audit.attacks import impute, pool
from fedveil.errors import AuditError, FedveilError
from fedveil.run.folder import RunFolder

FILE = """
[model]
name = "net:build"
[data]
task = "image-classification"
train = "train.parquet"
test = "test.parquet"
[partition]
how = "iid"
clients = 3
[scheme]
name = "fedqsn"
units = "neurons"
policy = "fresh"
[training]
steps = 3
batch_size = 8
learning_rate = 0.01
[federation]
rounds = 2
keep_messages = {keep}
"""
NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 3))
"""


def write_run(folder, keep="true"):
    """A run's file, model and data."""

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(NET)
    (folder / "run.toml").write_text(FILE.format(keep=keep))
    for name, seed in (("train", 0), ("test", 1)):
        rows = [
            {"image": row["image"].tolist(), "label": row["label"]}
            for row in toys.rows(40, seed=seed)
        ]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    return folder / "run.toml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run that kept its messages: its folder, and the home of its commands."""
    home = tmp_path_factory.mktemp("audits")
    done = run_fedveil("run", str(write_run(home / "work")), home=home)
    assert done.returncode == 0, done.stderr
    return home / "work" / "runs" / "run", home


def test_an_audit_says_in_words_and_figures_what_leaked(finished):
    folder, home = finished
    done = run_fedveil("audit", str(folder), home=home)
    assert done.returncode == 0, done.stderr
    assert "Your model reaches" in done.stdout
    assert "own data alone" in done.stdout
    words = ("sound  ", "not applicable  ", "ALARM  ")
    assert sum(done.stdout.count(word) for word in words) == 7
    values = json.loads((folder / "audit.json").read_text())
    # The run does not say that its base is public: attackers do not begin with it.
    assert values["models"].keys() == {"base", "global", "server_model"}
    assert values["assumed"] == "nothing"
    assert "Nothing was taken for public" in values["sentence"]
    assert {one["holes"] for one in values["attacks"]} == {"zeros", "nothing"}
    page = (folder / "report.html").read_text()
    assert "Your model reaches" in page


def test_the_base_is_taken_for_public_if_the_owner_says_so(finished, tmp_path):
    folder, home = finished
    shutil.copytree(folder, tmp_path / "run")
    done = run_fedveil(
        "audit", str(tmp_path / "run"), "--public", "base", "--coalition", "1", home=home
    )
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert values["models"]["public"] == values["models"]["base"]
    assert values["assumed"] == "base"
    assert "Your base was taken for public." in " ".join(done.stdout.split())


def test_while_a_run_is_at_work_it_is_not_audited_and_is_not_called_finished(finished, tmp_path):
    folder, home = finished
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / "audit.json").unlink(missing_ok=True)
    with RunFolder(run).held():
        done = run_fedveil("audit", str(run), home=home)
        page = run_fedveil("report", str(run), "--out", str(tmp_path / "page.html"), home=home)
        beside = run_fedveil("compare", str(run), home=home)
    assert done.returncode == 4
    assert "A run is at work in this folder" in done.stderr
    assert f"process {os.getpid()} on " in done.stderr
    assert not (run / "audit.json").exists()
    assert page.returncode == 0, page.stderr
    assert "2, not finished" in (tmp_path / "page.html").read_text()
    assert beside.returncode == 0, beside.stderr
    assert "Not finished, a run is at work: run." in beside.stdout


def test_a_run_waits_for_an_audit_and_a_report_need_not(finished, tmp_path):
    folder, home = finished
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    with RunFolder(run).held("audit"):
        again = run_fedveil(
            "run", str(home / "work" / "run.toml"), "--out", str(run), "--resume", home=home
        )
        page = run_fedveil("report", str(run), "--out", str(tmp_path / "page.html"), home=home)
    assert again.returncode == 4
    assert "An audit is at work in this folder" in again.stderr
    assert page.returncode == 0, page.stderr
    assert "not finished" not in (tmp_path / "page.html").read_text()


def test_a_folder_that_is_none_is_not_made_by_an_audit(tmp_path):
    done = run_fedveil("audit", str(tmp_path / "none"), home=tmp_path)
    assert done.returncode == 4
    assert not (tmp_path / "none").exists()


def leak(folder, path, public=None):
    """Publish what client-01 was sent in round 2, with its holes filled from a public model."""
    evidence = Evidence(folder)
    kept = next(k for k in evidence.proxies(["client-01"]) if k.round == 2)
    save_file(impute(pool(evidence, [kept]), evidence.manifest, public), path)
    return path


@pytest.fixture(scope="module")
def base(finished):
    """What the run began with."""
    scope = {}
    exec(NET, scope)
    return scope["build"]().state_dict()


def test_a_leak_is_traced_to_a_client_and_a_round(finished, base, tmp_path):
    folder, home = finished
    file, out = leak(folder, tmp_path / "leak.safetensors", base), tmp_path / "trace.json"
    done = run_fedveil("trace", str(folder), str(file), "--out", str(out), home=home)
    assert done.returncode == 0, done.stderr
    assert "comes from what was sent to client-01 (round 2, chance at most 1 in 10^" in done.stdout
    assert "tell its 3 clients apart, and the rounds of each" in done.stdout
    (suspect,) = json.loads(out.read_text())["suspects"]
    assert (suspect["clients"], suspect["rounds"]) == (["client-01"], [2])


def test_nobody_is_accused_for_the_base(finished, base, tmp_path):
    folder, home = finished
    save_file(base, tmp_path / "base.safetensors")
    given = str(tmp_path / "base.safetensors")
    for public in ("base", "none", given):
        done = run_fedveil("trace", str(folder), given, "--base", public, home=home)
        assert done.returncode == 0, done.stderr
        assert "nobody is accused" in done.stdout
        assert "suspect" not in done.stdout


def test_without_its_file_a_run_is_traced_with_a_base_or_with_none(finished, base, tmp_path):
    folder, home = finished
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    manifest = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps(manifest | {"config_file": None}))
    file = leak(moved, tmp_path / "leak.safetensors")
    done = run_fedveil("trace", str(moved), str(file), home=home)
    assert done.returncode == AuditError.exit_code
    assert "--base FILE" in done.stderr
    done = run_fedveil("trace", str(moved), str(file), "--base", "none", home=home)
    assert "sent to client-01" in done.stdout


def test_a_pickle_is_not_traced_but_refused(finished, tmp_path):
    folder, home = finished
    torch.save({"weight": torch.ones(2)}, tmp_path / "leak.pt")
    done = run_fedveil("trace", str(folder), str(tmp_path / "leak.pt"), home=home)
    assert done.returncode == FedveilError.exit_code
    assert "runs its maker's code" in done.stderr
    assert "weights_only=True" in done.stderr


def test_a_model_of_another_architecture_is_not_traced(finished, tmp_path):
    folder, home = finished
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    done = run_fedveil("trace", str(folder), str(tmp_path / "other.safetensors"), home=home)
    assert done.returncode == AuditError.exit_code
    assert "another architecture" in done.stderr


def test_a_report_needs_no_audit(finished, tmp_path):
    folder, home = finished
    done = run_fedveil("report", str(folder), "--out", str(tmp_path / "page.html"), home=home)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").read_text().lower().startswith("<!doctype html>")


def test_runs_are_compared(finished):
    folder, home = finished
    done = run_fedveil("compare", str(folder), "--plot", str(home / "frontier.png"), home=home)
    assert done.returncode in (0, 5), done.stderr
    assert "fedqsn" in done.stdout


@pytest.mark.parametrize("command", ["audit", "report", "compare"])
def test_a_folder_that_is_no_run(command, tmp_path):
    done = run_fedveil(command, str(tmp_path), home=tmp_path)
    assert done.returncode > 0
    assert "Traceback" not in done.stderr
    assert "not the folder of a run" in " ".join(done.stderr.split())


def test_a_run_without_messages_cannot_be_audited(tmp_path):
    file = write_run(tmp_path / "work", keep="false")
    assert run_fedveil("run", str(file), home=tmp_path).returncode == 0
    done = run_fedveil("audit", str(tmp_path / "work" / "runs" / "run"), home=tmp_path)
    assert done.returncode == 5
    assert "keep_messages" in done.stderr


def test_a_run_whose_file_has_gone(finished, tmp_path):
    folder, home = finished
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "config_file": str(tmp_path / "gone.toml")}))
    done = run_fedveil("audit", str(tmp_path / "run"), home=home)
    assert done.returncode == 5
    assert "gone.toml, which is not there" in " ".join(done.stderr.split())
