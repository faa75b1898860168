import json
import os
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
from cli_samples import run_fedveil
from matplotlib.image import imread

import fedveil


@pytest.fixture(scope="module")
def finished(pristine, tmp_path_factory):
    """What a run of three rounds, in a process of its own, has left and said."""
    import shutil

    folder = tmp_path_factory.mktemp("finished") / "home"
    shutil.copytree(pristine, folder)
    return folder, run_fedveil("run", "federation.toml", home=folder)


def test_run_says_what_happened_in_plain_lines(finished):
    home, done = finished
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("round ")][-1].startswith(
        "round 3/3: 2 of 2 clients, global model "
    )
    for name in ("summary.json", "summary.png", "metrics.jsonl", "model"):
        assert str(home / "runs" / "federation" / name) in done.stdout
    assert "fedqsn" in done.stdout


def test_run_writes_the_summary(finished):
    out = finished[0] / "runs" / "federation"
    summary = json.loads((out / "summary.json").read_text())
    figures = summary["schemes"]["fedqsn"]
    assert len(figures["rounds"]) == 3
    assert figures["rounds"][-1] == figures["global"]
    for view in ("base", "global", "server_model", "proxy_before", "proxy_after"):
        assert 0 <= figures[view] <= 100
    assert figures["own_data"] is None
    assert 0 < figures["bytes_down"] < summary["fp32_bytes"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert figures["seconds"] == pytest.approx(sum(line["seconds"] for line in lines))


def test_run_draws_a_picture(finished):
    pixels = imread(finished[0] / "runs" / "federation" / "summary.png")
    assert pixels.shape[0] > 500
    assert np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0).shape[0] > 50


def test_run_leaves_a_model_that_transformers_loads(finished):
    import transformers

    folder = finished[0] / "runs" / "federation" / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "business", 1: "politics", 2: "sports"}
    inputs = tokenizer("goal match", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 3)
    assert not (folder.parent / "model.unfinished").exists()


def test_secret_is_for_its_owner_only_and_nowhere_else(finished):
    home, done = finished
    path = home / "federation.secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = path.read_text().strip()
    assert str(path) in done.stdout
    assert secret not in done.stdout + done.stderr
    for other in (home / "runs").rglob("*"):
        if other.is_file():
            data = other.read_bytes()
            assert secret.encode() not in data
            assert bytes.fromhex(secret) not in data


def test_resumed_run_equals_an_uninterrupted_one(finished, home, call):
    secret = (finished[0] / "federation.secret").read_text()
    (home / "federation.secret").write_text(secret)
    config = home / "federation.toml"
    code, _, err = call("run", config, "--rounds", 1)
    assert code == 0, err
    code, out, err = call("run", config, "--rounds", 3, "--resume")
    assert code == 0, err
    assert "continuing after round 1 of 3" in out
    one, other = (f / "runs/federation/model/model.safetensors" for f in (home, finished[0]))
    assert one.read_bytes() == other.read_bytes()


def test_resuming_a_finished_run_reports_it_again(finished, home, call):
    code, out, _ = call("run", finished[0] / "federation.toml", "--resume")
    assert code == 0
    assert "all 3 rounds are finished already" in out


def test_earlier_run_is_not_touched_unasked(finished, call):
    config = finished[0] / "federation.toml"
    code, out, err = call("run", config)
    assert code == 4
    assert out == ""
    assert "--resume" in err
    assert "--overwrite" in err
    code, _, err = call("run", config, "--resume", "--overwrite")
    assert code == 2
    assert "contradict" in err


def test_own_architecture_and_client_files(home, call):
    (home / "my_net.py").write_text(
        "from torch import nn\n"
        "def build(num_labels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(16, 300), nn.ReLU(),\n"
        "                         nn.Linear(300, num_labels))\n"
    )
    for seed, name in enumerate(("north", "south", "test")):
        draw = np.random.default_rng(seed)
        rows = [
            {"image": draw.normal(size=(4, 4)).tolist(), "label": int(n % 2) + 3 * (n == 9)}
            for n in range(12)
        ]
        (home / f"{name}.json").write_text(json.dumps(rows))
    (home / "net.toml").write_text(
        '[model]\nname = "my_net:build"\nnum_labels = 6\n'
        '[data]\ntask = "image-classification"\ntest = "test.json"\n'
        '[clients]\nnorth = "north.json"\nsouth = "south.json"\n'
        '[scheme]\nname = "fedavg"\n[federation]\nrounds = 1\n'
    )
    code, out, err = call("run", home / "net.toml", "--out", home / "elsewhere")
    assert code == 0, err
    assert "fedavg" in out
    from safetensors.torch import load_file

    state = load_file(home / "elsewhere" / "model" / "model.safetensors")
    assert state["3.weight"].shape == (6, 300)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_interrupted_run_keeps_its_rounds(home):
    process = subprocess.Popen(
        [sys.executable, "-m", "fedveil", "run", "federation.toml", "--rounds", "5000"],
        cwd=home,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background may have been told to ignore Ctrl-C, and passes it on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        for line in process.stdout:
            if line.startswith("round 2/"):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted: finished rounds are kept; continue with --resume"
    assert len((home / "runs/federation/metrics.jsonl").read_text().splitlines()) >= 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--from-round", 1], "--from-round needs --resume"),
        (
            ["--from-round", 1, "--overwrite"],
            "--overwrite and --from-round contradict each other",
        ),
        (["--from-round", 2, "--rounds", 2, "--resume"], "expected --from-round below 2"),
    ],
)
def test_going_back_is_explained_in_the_words_of_the_command_line(home, call, words, told):
    code, _, err = call("run", home / "federation.toml", *words)
    assert code == 2
    assert told in err
    assert "from_round" not in err


def test_a_damaged_checkpoint_is_one_plain_line(home, call):
    file = home / "federation.toml"
    assert call("run", file, "--rounds", 2)[0] == 0
    damaged = home / "runs" / "federation" / "checkpoints" / "round-000002" / "state.json"
    values = json.loads(damaged.read_text())
    damaged.write_text(json.dumps(values | {"scheme": {"other": 1}}))
    code, _, err = call("run", file, "--rounds", 2, "--resume")
    assert code == 0, err
    assert err == (
        "warning: The checkpoint of round 2 is damaged (its content is not what was written). "
        "Going on after round 1.\n"
    )


def test_failed_clients_are_named(home, call, monkeypatch):
    from fedveil.training import Trainer

    train = Trainer.train

    calls = []

    def fail_once(self, model, *, seed):
        calls.append(seed)
        if len(calls) == 2:  # the first is tried before the run
            raise fedveil.TrainingError("The loss is not finite")
        return train(self, model, seed=seed)

    monkeypatch.setattr(Trainer, "train", fail_once)
    code, out, err = call("run", home / "federation.toml", "--rounds", 1)
    assert code == 0, err
    assert "failed: The loss is not finite." in out
    assert "round 1/1: 1 of 2 clients" in out
