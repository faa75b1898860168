"""A public model to be released in the owner's place, as a configuration file names it."""

import json
from typing import Any

import pytest
import torch
from cli_samples import run_fedveil

import toys
from fedveil import ConfigurationError
from fedveil.config import build, load_config, rehearse
from fedveil.state import read_state

transformers = pytest.importorskip("transformers")
pytest.importorskip("flwr_datasets")

CONFIG = """
[model]
name = "own"
{model}
[data]
train = "rows.json"
max_length = 12
{data}
[partition]
clients = 2
[training]
steps = 2
batch_size = 4
[scheme]
{scheme}
[federation]
rounds = 1
"""


@pytest.fixture
def home(tmp_path):
    """The owner's model, what it was tuned from with its head and without, and rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *map(str, range(270))])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]"
    )
    public = toys.bert()
    for name, model in (("own", toys.bert(seed=1)), ("public", public), ("bare", public.bert)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "rows.json").write_text(json.dumps(toys.texts(40)))
    (tmp_path / "mine.json").write_text(json.dumps(toys.texts(9, seed=4)))
    return tmp_path


def config_of(home, model="", data="", scheme="server_mask = 0.0"):
    (home / "f.toml").write_text(CONFIG.format(model=model, data=data, scheme=scheme))
    return load_config(home / "f.toml")


MINE = 'owner = "mine.json"'


def test_is_released_and_judged_by_the_owners_rows(home):
    federation = build(config_of(home, 'public = "public"', MINE))
    assert toys.same(toys.weights(federation.model), toys.weights(toys.bert(seed=1)))
    assert toys.same(toys.weights(federation.released), toys.weights(toys.bert()))
    configuration = federation.configuration()
    assert configuration["owner"] == 9
    assert "fresh" not in configuration
    assert {"own", "taught"} <= federation.run().rounds[0].metrics.keys()


def test_a_head_that_it_has_none_of_is_fresh(home):
    federation = build(config_of(home, 'public = "bare"', MINE))
    assert federation.configuration()["fresh"] == ["*classifier.*"]
    body = {n for n in read_state(federation.model) if not n.startswith("classifier.")}
    released, whole = toys.weights(federation.released), toys.weights(toys.bert())
    assert all(torch.equal(released[name], whole[name]) for name in body)
    federation.run()


def test_a_head_of_another_size_is_fresh_too(home):
    other = transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**toys.bert().config.to_dict(), "num_labels": 7})
    )
    other.save_pretrained(home / "seven")
    federation = build(config_of(home, 'public = "seven"', MINE))
    assert federation.configuration()["fresh"] == ["*classifier.*"]


ADAPTER = '[model.lora]\nr = 2\ntarget_modules = ["query"]'


@pytest.mark.parametrize("public", ["public", "bare", "random"])
def test_under_an_adapter_both_begin_with_the_same_one(home, public):
    pytest.importorskip("peft")
    federation = build(config_of(home, f'public = "{public}"\n{ADAPTER}', MINE))
    mine, theirs = toys.weights(federation.model), toys.weights(federation.released)
    adapter = {name for name in mine if "lora_" in name}
    assert len(adapter) == 2
    assert all(torch.equal(mine[name], theirs[name]) for name in adapter)
    assert any(mine[name].any() for name in adapter)


def test_an_adapter_that_follows_from_the_weights_is_each_models_own(home):
    pytest.importorskip("peft")
    model = f'public = "public"\n{ADAPTER}\ninit_lora_weights = "pissa"'
    federation = build(config_of(home, model, MINE))
    layer = "bert.encoder.layer.0.attention.self.query"
    for adapted, seed in ((federation.model, 1), (federation.released, 0)):
        tuned: Any = adapted.get_submodule(f"base_model.model.{layer}")
        merged = tuned.get_delta_weight("default")
        whole = merged + adapted.get_submodule(f"base_model.model.{layer}.base_layer").weight
        torch.testing.assert_close(whole, toys.bert(seed).get_submodule(layer).weight)


def models_of(home, model, number=0):
    """The weights of both models under one of several secrets, and what is fresh."""
    federation = build(config_of(home, model, MINE).change(secret_file=f"{number}.secret"))
    fresh = federation.configuration().get("fresh", [])
    return toys.weights(federation.model), toys.weights(federation.released), fresh


HEAD = "classifier.weight"


@pytest.mark.parametrize("public", ["bare", "random"])
def test_what_is_new_in_both_begins_alike_and_what_is_not_stays_as_it_is(home, public):
    toys.bert(seed=1).bert.save_pretrained(home / "own")
    mine, theirs, fresh = models_of(home, f'public = "{public}"')
    assert torch.equal(mine[HEAD], theirs[HEAD])
    assert mine[HEAD].any()
    assert fresh == []
    body = {name: t for name, t in mine.items() if not name.startswith("classifier.")}
    own = toys.weights(toys.bert(seed=1))
    assert all(torch.equal(tensor, own[name]) for name, tensor in body.items())
    assert not any(torch.equal(t, theirs[n]) for n, t in body.items() if t.ndim > 1)


def test_what_is_new_in_the_owners_model_alone_follows_from_the_secret(home):
    toys.bert(seed=1).bert.save_pretrained(home / "own")
    one, theirs, fresh = models_of(home, 'public = "public"')
    again, other = (models_of(home, 'public = "public"', number)[0] for number in (0, 1))
    assert torch.equal(one[HEAD], again[HEAD])
    assert not torch.equal(one[HEAD], other[HEAD])
    assert not torch.equal(one[HEAD], theirs[HEAD])
    assert fresh == []


def test_functions_that_draw_alike_begin_alike(home):
    (home / "twins.py").write_text(
        "import torch, toys\n"
        "def headed(seed):\n"
        "    model = toys.bert(seed)\n"
        "    model.classifier = torch.nn.Linear(16, 3)\n"
        "    return model\n"
        "def mine():\n    return headed(1)\n"
        "def theirs():\n    return headed(0)\n"
    )
    config_of(home, 'public = "twins:theirs"\ntokenizer = "own"', MINE)
    text = (home / "f.toml").read_text().replace('name = "own"', 'name = "twins:mine"')
    (home / "f.toml").write_text(text)
    federation = build(load_config(home / "f.toml"))
    mine, theirs = toys.weights(federation.model), toys.weights(federation.released)
    assert torch.equal(mine[HEAD], theirs[HEAD])
    assert not torch.equal(mine["bert.pooler.dense.weight"], theirs["bert.pooler.dense.weight"])


@pytest.mark.parametrize(
    ("model", "data", "lacking"),
    [('public = "public"', "", "[data] owner"), ("", MINE, "[model] public")],
)
def test_one_key_needs_the_other(home, model, data, lacking):
    with pytest.raises(ConfigurationError) as caught:
        config_of(home, model, data)
    assert lacking in str(caught.value)


def test_a_random_initialization_has_nothing_of_the_owners_weights(home):
    federation = build(config_of(home, 'public = "random"', MINE))
    mine, drawn = toys.weights(federation.model), toys.weights(federation.released)
    assert mine.keys() == drawn.keys()
    matrices = [name for name, tensor in mine.items() if tensor.ndim > 1]
    for name in matrices:
        pair = torch.stack([mine[name].flatten(), drawn[name].flatten()])
        # Rows of padding are zeros in every initialization.
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.3
    assert len(matrices) > 5
    again = build(config_of(home, 'public = "random"', MINE))
    assert toys.same(toys.weights(again.released), drawn)
    federation.run()


def test_a_function_may_read_weights_and_is_not_called_for_random_ones(home):
    (home / "making.py").write_text("import toys\n\n\ndef model():\n    return toys.bert()\n")
    config_of(home, 'public = "random"', MINE)
    text = (home / "f.toml").read_text().replace('name = "own"', 'name = "making:model"')
    (home / "f.toml").write_text(text.replace("[data]", 'tokenizer = "own"\n[data]'))
    with pytest.raises(ConfigurationError, match="whether that function reads"):
        build(load_config(home / "f.toml"))


TUNED = f'{MINE}\ntuned = "tuned.json"\n[tuning]\nsteps = 3\nbatch_size = 4'


def test_the_owners_tuning_is_repeated(home):
    (home / "tuned.json").write_text(json.dumps(toys.texts(12, seed=5)))
    federation = build(config_of(home, 'public = "public"', TUNED))
    configuration = federation.configuration()
    assert (configuration["tuned"], configuration["tuning"]["steps"]) == (12, 3)
    assert 0 <= federation.run().rounds[0].metrics["tuned"] <= 1


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ('public = "public"', TUNED.replace("[tuning]\nsteps = 3\nbatch_size = 4", ""), "[tuning]"),
        ('public = "public"', TUNED.replace('tuned = "tuned.json"', ""), "[data] tuned"),
        ("", TUNED.replace(MINE, ""), "repeated on what clients teach a public model"),
    ],
)
def test_rows_and_settings_of_tuning_belong_together_and_to_a_public_model(home, model, data, said):
    with pytest.raises(ConfigurationError) as caught:
        config_of(home, model, data)
    assert said in str(caught.value)


def test_the_owners_own_model_is_not_public(home):
    with pytest.raises(ConfigurationError, match="would be released as it is"):
        config_of(home, 'public = "own"', MINE)


def test_an_adapter_of_ones_own_is_refused(home):
    with pytest.raises(ConfigurationError, match="An adapter of your own is not the public"):
        config_of(home, 'public = "public"\nadapter = "mine"', MINE)


def test_another_architecture_is_refused(home):
    other = transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**toys.bert().config.to_dict(), "intermediate_size": 40})
    )
    other.save_pretrained(home / "other")
    with pytest.raises(ConfigurationError, match="The public model is of another architecture"):
        build(config_of(home, 'public = "other"', MINE))


def test_a_dry_run_makes_up_both_models_and_the_owners_rows(home, tmp_path):
    text = CONFIG.format(
        model='public = "somebody/bert"', data=TUNED.replace("mine.json", "somebody/rows"),
        scheme="server_mask = 0",
    )  # fmt: skip
    (home / "tuned.json").write_text(json.dumps(toys.texts(40, seed=5)))
    (home / "f.toml").write_text(text.replace('name = "own"', 'name = "somebody/bert-tuned"'))
    small = rehearse(load_config(home / "f.toml"), tmp_path / "small").config
    federation = build(small)
    assert toys.same(toys.weights(federation.model), toys.weights(federation.released))
    configuration = federation.configuration()
    assert (configuration["owner"], configuration["tuned"]) == (24, 24)
    assert configuration["tuning"]["steps"] < 3
    federation.run()


def test_run_and_audited_on_the_command_line(home):
    (home / "rows.json").write_text(json.dumps(toys.texts(60)))
    (home / "test.json").write_text(json.dumps(toys.texts(60, seed=2)))
    config = config_of(home, 'public = "public"', f'{MINE}\ntest = "test.json"')
    text = config.path.read_text() + 'keep_messages = "proxies"\n'
    config.path.write_text(text)
    done = run_fedveil("run", str(config.path), home=home)
    assert done.returncode == 0, done.stderr
    done = run_fedveil("audit", str(home / "runs" / "f"), home=home)
    assert done.returncode == 0, done.stderr
    found = json.loads((home / "runs" / "f" / "audit.json").read_text())
    # What anybody can get is the public model, and not the base.
    assert found["models"]["public"] != found["models"]["base"]
    assert set(found["coalitions"].values()) == {0.0}
    assert "alarm" not in [one["outcome"] for one in found["checks"]]
    assert found["assumed"] == "what the run released"
    assert "released in the place of yours was taken for public" in found["sentence"]


@pytest.mark.parametrize("how", ["copied", "in half precision", "with another head"])
def test_a_copy_of_ones_own_model_under_another_name_is_not_released(home, how):
    own = transformers.BertForSequenceClassification.from_pretrained(home / "own")
    if how == "in half precision":
        own = own.to(torch.bfloat16)
    if how == "with another head":
        own = own.bert
    own.save_pretrained(home / "public")
    config = config_of(home, 'public = "public"', MINE)
    done = run_fedveil("run", str(config.path), home=home)
    assert done.returncode == 2
    assert "is your own, which would be released as it is" in done.stderr
    assert not list((home / "runs").rglob("*.safetensors"))


def test_how_far_the_public_model_is_from_the_owners_is_printed(home):
    done = run_fedveil("run", str(config_of(home, 'public = "public"', MINE).path), home=home)
    assert done.returncode == 0, done.stderr
    assert "of its weights away from yours; 0 of 2" in done.stdout
