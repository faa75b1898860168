"""The second demo, in small: a real language model, whose figures are of no interest here."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from fedveil.config import answer_test, load_config, rehearse
from fedveil.demo.generation import GENERATION_SCHEMES, GenerationSetting, run_generation_demo
from fedveil.hub import bbc_headlines, smollm2_folder
from fedveil.screen import PlainConsole
from fedveil.training import Training

pytestmark = [
    pytest.mark.slow,
    # PEFT asks transformers in a way that will go.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
SMALL = GenerationSetting(
    test_rows=4, clients=1, rows=4, rounds=2, max_length=48,
    training=Training(steps=1, batch_size=2, learning_rate=1e-3), shown=1,
)  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDVEIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_all_methods_are_shown_side_by_side(cache, tmp_path, capsys):
    run_generation_demo(tmp_path / "out", 1, PlainConsole(width=120), SMALL)
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["schemes"]) == set(GENERATION_SCHEMES)
    for name, figures in found["schemes"].items():
        assert f"\n{name}: " in told
        assert all(figures[key] > 0 for key in ("base", "global", "proxy_before", "proxy_after"))
    once, always = found["schemes"]["fedqsn-lora"], found["schemes"]["fedavg-lora"]
    assert once["bytes_down_first"] > 30 * once["bytes_down_later"]
    assert always["bytes_down_first"] == always["bytes_down_later"] > once["bytes_down_later"]
    assert {len(texts) for texts in found["headlines"].values()} == {1}
    # What was left behind is an ordinary adapter of an ordinary model.
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder())
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "fedlpp" / "adapter")
    trained = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert any(torch.any(tensor != 0) for tensor in trained)


def test_headlines_are_pairs():
    rows = bbc_headlines()
    assert 1900 < len(rows) < 2200
    assert all(row["prompt"].endswith("Headline:") and row["completion"] for row in rows)


FILE = """
[model]
name = "model"
tokenizer = "tokenizer"
[data]
task = "causal-lm"
train = "train.parquet"
test = "test.parquet"
prompt = "{dialogue} TL;DR"
completion = "{summary}"
[partition]
clients = 2
[training]
steps = 2
[generation]
scores = ["rouge", "bleu"]
rows = 5
max_new_tokens = 3
[federation]
rounds = 1
"""


def test_a_run_lets_the_tuned_model_answer_the_test_set(call, tmp_path):
    recipes = Path(__file__).parents[2] / "examples" / "recipes"
    rehearse(load_config(recipes / "dialogsum.toml"), tmp_path)
    (tmp_path / "own.toml").write_text(FILE)
    code, out, err = call("run", tmp_path / "own.toml")
    assert (code, err) == (0, "")
    folder = tmp_path / "runs" / "own"
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert all(line["prompt"].endswith(" TL;DR") and line["references"] for line in lines)
    summary = json.loads((folder / "summary.json").read_text())
    scores = summary["schemes"]["fedqsn-once"]["generation"]
    assert set(scores) == {"rouge1", "rouge2", "rougeL", "bleu"}
    assert "Answers to 5 prompts" in out
    assert lines[0]["references"][0] in out
    assert f"{scores['rouge1']:.2f}" in out
    # What is saved writes what was written.
    config = load_config(tmp_path / "own.toml")
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    assert answer_test(config, saved).texts == [line["answer"] for line in lines]
