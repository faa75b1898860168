"""Dry runs: of every recipe that is shipped, and of every family that it may name."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

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
    model: Any = build(small).model
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


class TestOfFolders:
    """What a run would refuse of folders a dry run refuses too."""

    @pytest.fixture
    def own(self, home):
        """A model with a head for the topics, in a folder beside the one that has none."""
        import transformers

        config = transformers.BertConfig.from_pretrained(home / "bert", num_labels=3)
        transformers.BertForSequenceClassification(config).save_pretrained(home / "own")
        for path in (home / "bert").iterdir():
            if not (home / "own" / path.name).exists():
                shutil.copy(path, home / "own" / path.name)
        return home

    def dry(self, call, home, model, data=""):
        path = home / "federation.toml"
        text = path.read_text().replace('name = "bert"', model)
        path.write_text(text.replace("[data]", f"[data]\n{data}"))
        return call("run", path, "--dry-run")

    def test_what_fits_holds_together(self, call, own):
        code, out, err = self.dry(call, own, 'name = "own"')
        assert (code, err) == (0, "")
        assert "holds together" in out

    @pytest.mark.parametrize(("model", "code"), [("", 2), ("new_head = true", 0)])
    def test_a_head_of_another_size(self, call, own, model, code):
        settings = json.loads((own / "own" / "config.json").read_text())
        settings |= {"id2label": {str(n): f"LABEL_{n}" for n in range(5)}, "label2id": None}
        (own / "own" / "config.json").write_text(json.dumps(settings))
        found, out, err = self.dry(call, own, f'name = "own"\n{model}')
        assert found == code
        assert ("another number of classes" in err) == (code == 2)
        assert ("holds together" in out) == (code == 0)

    def test_classes_in_another_order(self, call, own):
        settings = json.loads((own / "own" / "config.json").read_text())
        names = ["sports", "politics", "business"]
        settings |= {"id2label": dict(enumerate(names)), "label2id": None}
        (own / "own" / "config.json").write_text(json.dumps(settings))
        code, out, err = self.dry(
            call, own, 'name = "own"', 'labels = ["business", "politics", "sports"]'
        )
        assert code == 2
        assert "in another order" in err
        assert "holds together" not in out

    def test_no_tokenizer(self, call, own):
        for path in (own / "own").glob("*[tv]o[kc]*"):
            path.unlink()
        code, out, err = self.dry(call, own, 'name = "own"')
        assert code == 2
        assert "no tokenizer in the folder" in err
        assert "holds together" not in out

    def test_texts_that_are_too_long_for_the_model(self, call, own):
        path = own / "federation.toml"
        longest = json.loads((own / "own" / "config.json").read_text())["max_position_embeddings"]
        path.write_text(re.sub(r"max_length = \d+\n", "", path.read_text()))
        code, _, err = self.dry(call, own, 'name = "own"', f"max_length = {longest + 1}")
        assert code == 2
        assert f"expected at most {longest}, found {longest + 1}" in err

    def test_nothing_is_said_of_chance_as_the_model_is_a_random_one(self, call, own):
        _, out, err = self.dry(call, own, 'name = "own"')
        assert "chance" not in out + err

    def test_no_weights(self, call, own):
        (own / "own" / "model.safetensors").unlink()
        code, _, err = self.dry(call, own, 'name = "own"')
        assert code == 2
        assert "no weights in the model's folder" in err

    @pytest.mark.parametrize(
        ("public", "said"),
        [
            ("roberta", "of another family than yours (in"),
            ("wide", "of another architecture"),
            ("somebody/roberta-base", "of another family than yours (in"),
        ],
    )
    def test_a_public_model_that_is_another(self, call, own, public, said):
        import transformers

        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "intermediate_size": 256, "vocab_size": 17}  # fmt: skip
        if public == "roberta":
            transformers.RobertaModel(
                transformers.RobertaConfig(**sizes, pad_token_id=1)
            ).save_pretrained(own / public)
        if public == "wide":
            transformers.BertModel(
                transformers.BertConfig(**{**sizes, "intermediate_size": 300})
            ).save_pretrained(own / public)
        code, out, err = self.dry(
            call, own, f'name = "own"\npublic = "{public}"', 'owner = "test.jsonl"'
        )
        assert code == 2
        assert said in err
        assert "holds together" not in out
