"""Dry runs: of every recipe that is shipped, and of every family that it may name."""

import os
from pathlib import Path

import pytest

from fedveil.config import build, load_config, rehearse
from fedveil.errors import ConfigurationError, DataError

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.toml"))
TEXT = """
[model]
name = "{name}"
dtype = "{dtype}"
{model}
[data]
task = "{task}"
train = "somebody/rows"
test = "somebody/rows"
{data}
[partition]
clients = 4
[generation]
scores = ["bleu"]
[federation]
rounds = 3
"""
LORA = "lora = {{ r = 4, target_modules = [{}] }}"


def write(folder, name, task="causal-lm", data="", model="", dtype="float32"):
    text = TEXT.format(name=name, task=task, data=data, model=model, dtype=dtype)
    if task.endswith("classification"):
        text = text.replace('[generation]\nscores = ["bleu"]\n', "")
    path = folder / "federation.toml"
    path.write_text(text)
    return path


def files_in(folder):
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_there_is_a_recipe_for_every_published_setting():
    published = {"e2e", "dart", "dialogsum", "viggo", "sst2", "mrpc", "rte", "qnli", "qqp"}
    assert published <= {path.stem for path in RECIPES}


@pytest.mark.parametrize(
    "path", [*RECIPES, EXAMPLES / "rotten-tomatoes.toml"], ids=lambda path: path.stem
)
def test_what_is_shipped_holds_together_and_leaves_nothing(call, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files_in(EXAMPLES)
    code, out, err = call("run", path, "--dry-run")
    assert (code, err) == (0, "")
    assert "round 2/2: 3 of 3 clients" in out
    assert f"in place of {load_config(path).model.name}" in out
    assert "holds together" in out
    assert files_in(EXAMPLES) == before
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "task", "family", "layers"),
    [
        ("openai-community/gpt2-xl", "causal-lm", "GPT2LMHeadModel", '"c_attn"'),
        ("meta-llama/Llama-3.2-1B", "causal-lm", "LlamaForCausalLM", '"q_proj", "v_proj"'),
        ("HuggingFaceTB/SmolLM2-135M", "causal-lm", "LlamaForCausalLM", '"q_proj"'),
        ("Qwen/Qwen2.5-0.5B-Instruct", "causal-lm", "Qwen2ForCausalLM", '"q_proj"'),
        ("mistralai/Mistral-7B-v0.3", "causal-lm", "MistralForCausalLM", '"q_proj"'),
        ("google-t5/t5-small", "seq2seq", "T5ForConditionalGeneration", '"q", "v"'),
        ("FacebookAI/roberta-large", "text-classification", "RobertaForSequenceClassification",
         '"query"'),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("dtype", "adapted"), [("float32", False), ("bfloat16", True)], ids=["whole", "lora"]
)
def test_families(call, tmp_path, name, task, family, layers, dtype, adapted):
    lora = LORA.format(layers) if adapted else ""
    path = write(tmp_path, name, task=task, model=lora, dtype=dtype)
    small = rehearse(load_config(path), tmp_path / "small").config
    model = build(small).model
    inner = model.get_base_model() if adapted else model
    assert type(inner).__name__ == family
    assert str(inner.dtype) == f"torch.{dtype}"
    code, out, err = call("run", path, "--dry-run")
    assert (code, err) == (0, "")
    assert "round 2/2: 3 of 3 clients" in out


def test_conversations_are_written_by_the_chat_template(call, tmp_path):
    path = write(tmp_path, "Qwen/Qwen2.5-0.5B-Instruct", data='messages = "turns"')
    code, _, err = call("run", path, "--dry-run")
    assert (code, err) == (0, "")


def test_files_of_ones_own_are_looked_into(call, home):
    code, out, err = call("run", home / "federation.toml", "--dry-run")
    assert (code, err) == (0, "")
    assert "a random bert" in out
    assert "the first 24 rows of each file" in out
    assert not (home / "runs").exists()
    assert not (home / "federation.secret").exists()
    (home / "train.jsonl").write_text('{"words": "a", "label": "business"}\n' * 30)
    (home / "test.jsonl").write_text('{"words": "a", "label": "business"}\n' * 30)
    code, _, err = call("run", home / "federation.toml", "--dry-run")
    assert code == 3
    assert "no column 'text'" in err


def test_a_file_that_is_missing_is_not_made_up(tmp_path):
    path = write(tmp_path, "gpt2")
    path.write_text(path.read_text().replace("somebody/rows", "rows.jsonl"))
    with pytest.raises(DataError, match=r"no such file.*rows\.jsonl"):
        rehearse(load_config(path), tmp_path / "small")


def test_a_family_that_nobody_knows(tmp_path):
    path = write(tmp_path, "somebody/xxyy")
    with pytest.raises(ConfigurationError, match=r"family cannot be told.*\[model\] name.*xxyy"):
        rehearse(load_config(path), tmp_path / "small")


def test_layers_that_the_family_does_not_have(tmp_path):
    path = write(tmp_path, "gpt2", model=LORA.format('"q_proj"'))
    small = rehearse(load_config(path), tmp_path / "small").config
    with pytest.raises(ConfigurationError, match=r"\[model\.lora\].*q_proj"):
        build(small)


def test_images_are_not_made_up(tmp_path):
    path = write(tmp_path, "google/vit-base", task="image-classification")
    with pytest.raises(ConfigurationError, match="no images"):
        rehearse(load_config(path), tmp_path / "small")
