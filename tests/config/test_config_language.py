"""Language models from a file: loaded, trained, saved, and loaded again as ordinary models."""

import json

import pytest
import torch
import transformers

import toys
from fedveil.config import answer_test, build, build_workplace, load_config, save_model
from fedveil.errors import ConfigurationError, DataError, FedveilError
from fedveil.hub import minilm_folder
from fedveil.training import Generation, evaluate

FILE = """
[model]
name = "model"
[data]
task = "{task}"
train = "train.jsonl"
test = "test.jsonl"
max_length = 24
label_smoothing = 0.1
[partition]
clients = 2
[training]
steps = 2
batch_size = 2
[federation]
rounds = 1
"""
KINDS = {
    "causal-lm": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32),
    ),
    "seq2seq": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=0
        ),
    ),
}


def write(folder, task):
    torch.manual_seed(0)
    kind, config = KINDS[task]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    tokenizer.eos_token = "[SEP]"
    config.vocab_size = len(tokenizer)
    config.pad_token_id = tokenizer.pad_token_id
    kind(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, count in (("train", 8), ("test", 3)):
        rows = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))}
                for n in range(1, count + 1)]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "federation.toml").write_text(FILE.format(task=task))
    return folder / "federation.toml"


@pytest.mark.parametrize("task", KINDS)
def test_what_is_saved_measures_as_what_was_trained(task, tmp_path):
    config = load_config(write(tmp_path, task))
    federation = build(config)
    assert federation._test is not None
    result = federation.run(1)
    saved = KINDS[task][0].from_pretrained(save_model(config, result.global_model))
    found = evaluate(saved, federation._task, federation._test)
    assert found == result.rounds[0].measures["global"]
    assert found["perplexity"] > 1


def test_texts_longer_than_the_model_are_refused(tmp_path):
    file = write(tmp_path, "causal-lm")
    file.write_text(file.read_text().replace("max_length = 24", "max_length = 33"))
    with pytest.raises(ConfigurationError, match=r"longer than the model.*32"):
        build(load_config(file))


def test_a_missing_column_names_the_client(tmp_path):
    file = write(tmp_path, "causal-lm")
    file.write_text(file.read_text().replace("max_length", 'completion = "answer"\nmax_length'))
    with pytest.raises(DataError, match="no column 'answer'"):
        build(load_config(file))


LORA = """
[model.lora]
r = 4
lora_alpha = 8
target_modules = ["c_attn"]
fan_in_fan_out = true
[scheme]
name = "fedlpp"
bits = 4
"""


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
class TestAdapters:
    def test_are_saved_as_peft_loads_them(self, tmp_path):
        peft = pytest.importorskip("peft")
        file = write(tmp_path, "causal-lm")
        file.write_text(file.read_text() + LORA)
        config = load_config(file)
        federation = build(config)
        assert federation._test is not None
        result = federation.run(1)
        base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model")
        saved = peft.PeftModel.from_pretrained(base, save_model(config, result.global_model))
        found = evaluate(saved, federation._task, federation._test)
        assert found == result.rounds[0].measures["global"]
        assert result.base is not None
        assert found["loss"] != result.base["loss"]
        # With PEFT installed, transformers loads the folder as it would any model's.
        ordinary = transformers.AutoModelForCausalLM.from_pretrained(config.out / "model")
        assert evaluate(ordinary, federation._task, federation._test) == found

    def test_that_were_saved_are_trained_on(self, tmp_path):
        file = write(tmp_path, "causal-lm")
        file.write_text(file.read_text() + LORA)
        config = load_config(file)
        result = build(config).run(1)
        folder = save_model(config, result.global_model)
        own = LORA[: LORA.index("[model.lora]")], LORA[LORA.index("[scheme]") :]
        text = file.read_text().replace(LORA, "".join(own))
        file.write_text(text.replace('name = "model"', f'name = "model"\nadapter = "{folder}"'))
        again = build(load_config(file))
        assert toys.same(toys.weights(again.model), toys.weights(result.global_model))
        more = again.run(2, overwrite=True)
        assert (
            more.rounds[-1].measures["global"]["loss"]
            != result.rounds[0].measures["global"]["loss"]
        )

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"n_embd": 64}, "does not fit.*torch.Size"),
            ({"n_layer": 1}, "does not fit.*missing"),
            ({"n_layer": 3}, "does not fit.*2 tensors without a place"),
        ],
    )
    def test_of_another_model_are_refused(self, change, problem, tmp_path):
        peft = pytest.importorskip("peft")
        file = write(tmp_path, "causal-lm")
        config = transformers.GPT2Config.from_pretrained(tmp_path / "model")
        other = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**{**config.to_dict(), **change})
        )
        lora = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        peft.get_peft_model(other, lora).save_pretrained(tmp_path / "adapter")
        text = file.read_text()
        file.write_text(text.replace('name = "model"', 'name = "model"\nadapter = "adapter"'))
        with pytest.raises(ConfigurationError, match=rf"(?s)adapter {problem}"):
            build(load_config(file))

    def test_there_is_none(self, tmp_path):
        file = write(tmp_path, "causal-lm")
        text = file.read_text()
        file.write_text(text.replace('name = "model"', 'name = "model"\nadapter = "model"'))
        with pytest.raises(ConfigurationError, match=r"no adapter.*adapter_config.json"):
            build(load_config(file))

    def test_there_cannot_be_two(self, tmp_path):
        file = write(tmp_path, "causal-lm")
        text = file.read_text() + LORA
        file.write_text(text.replace('name = "model"', 'name = "model"\nadapter = "model"'))
        with pytest.raises(ConfigurationError, match="Two adapters"):
            load_config(file)

    @pytest.mark.parametrize(
        ("line", "problem"),
        [('target_modules = ["q_proj"]', "q_proj"), ("rank = 4", "rank")],
    )
    def test_that_fit_nothing_are_refused(self, line, problem, tmp_path):
        file = write(tmp_path, "causal-lm")
        text = LORA.replace('target_modules = ["c_attn"]', line)
        file.write_text(file.read_text() + text)
        with pytest.raises(ConfigurationError, match=rf"adapter cannot be added.*{problem}"):
            build(load_config(file))

    def test_clients_elsewhere_load_the_backbone(self, tmp_path):
        file = write(tmp_path, "causal-lm")
        file.write_text(file.read_text() + LORA)
        owner = build(load_config(file))
        text = file.read_text().replace('test = "test.jsonl"\n', "")
        text = text.replace("[partition]\nclients = 2\n", '[partner]\nname = "a"\n')
        text = text.replace("[federation]\nrounds = 1\n", "")
        (tmp_path / "partner.toml").write_text(text)
        place = build_workplace(load_config(tmp_path / "partner.toml"))
        own, here = toys.weights(owner.model), toys.weights(place.architecture)
        assert set(own) == set(here)
        for name, tensor in here.items():
            assert torch.equal(tensor, torch.zeros_like(tensor) if "lora_" in name else own[name])


GENERATION = """
[generation]
scores = ["rouge"]
rows = 2
num_beams = 2
max_new_tokens = 4
"""


class TestGeneration:
    def test_is_read_in_the_words_of_transformers(self, tmp_path):
        file = write(tmp_path, "causal-lm")
        assert load_config(file).generation is None
        file.write_text(file.read_text() + GENERATION)
        found = load_config(file).generation
        settings = {"num_beams": 2, "max_new_tokens": 4}
        assert found == Generation(("rouge",), rows=2, settings=settings)

    def test_answers_the_test_set(self, tmp_path):
        file = write(tmp_path, "causal-lm")
        file.write_text(file.read_text() + GENERATION)
        config = load_config(file)
        answers = answer_test(config, build(config).model)
        assert answers.prompts == ["count to 1", "count to 2"]
        assert answers.references == [["0"], ["0 1"]]
        assert set(answers.scores) == {"rouge1", "rouge2", "rougeL"}

    @pytest.mark.parametrize(
        ("old", "new", "problem"),
        [
            ("num_beams = 2", "num_beems = 2", "no such setting.*num_beams"),
            ('["rouge"]', '["fluency"]', "score is unknown"),
            ("rows = 2", "rows = 0", "rows is impossible"),
            ('test = "test.jsonl"', "", "nothing to answer"),
            ('task = "causal-lm"', "", "write nothing"),
        ],
    )
    def test_that_cannot_be_is_refused_before_the_run(self, old, new, problem, tmp_path):
        file = write(tmp_path, "causal-lm")
        text = file.read_text() + GENERATION
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(ConfigurationError, match=problem):
            build(load_config(file))


def test_an_unknown_kind_of_model_is_named(tmp_path):
    file = write(tmp_path, "causal-lm")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "xxyy"}))
    with pytest.raises(FedveilError, match=r"model in this folder cannot be loaded.*xxyy"):
        build(load_config(file))


def test_a_model_for_another_task_is_named(tmp_path):
    file = write(tmp_path, "causal-lm")
    file.write_text(file.read_text().replace("causal-lm", "seq2seq"))
    with pytest.raises(ConfigurationError, match=r"a kind that this task.*found GPT2Config"):
        build(load_config(file))
