"""Adapters beside what begins at random: that is trained, travels, and is saved with them."""

import json
from typing import Any

import pytest
import torch
import transformers

import toys
from fedveil import ConfigurationError
from fedveil.config import build, load_config, save_model
from fedveil.hub.models import load_model
from fedveil.hub.settings import ModelTable
from fedveil.training import evaluate

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

IDS = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 20, "max_position_embeddings": 32}  # fmt: skip
PICTURES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 20, "image_size": 8, "patch_size": 4}  # fmt: skip
DISTIL = {"vocab_size": 60, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 20,
          "max_position_embeddings": 32}  # fmt: skip
TEXT, IMAGE = "text-classification", "image-classification"


def _vit(**changes):
    return transformers.ViTConfig(**PICTURES, **changes)


def _bert(**changes):
    return transformers.BertConfig(**SIZES, **changes)


BODIES = {
    "no head": (TEXT, lambda: transformers.BertModel(_bert()), "query"),
    "no head and no pooler": (
        TEXT, lambda: transformers.BertModel(_bert(), add_pooling_layer=False), "query",
    ),
    "a head for five": (
        TEXT, lambda: transformers.BertForSequenceClassification(_bert(num_labels=5)), "query",
    ),
    "a head of two layers": (
        TEXT, lambda: transformers.DistilBertModel(transformers.DistilBertConfig(**DISTIL)),
        "q_lin",
    ),
    "layers of the head that the adapter is for, too": (
        TEXT,
        lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES, pad_token_id=1)),
        "dense",
    ),
    "no head on images": (
        IMAGE, lambda: transformers.ViTModel(_vit(), add_pooling_layer=False), "q_proj",
    ),
    "a head for five on images": (
        IMAGE, lambda: transformers.ViTForImageClassification(_vit(num_labels=5)), "q_proj",
    ),
}  # fmt: skip
KINDS = {TEXT: transformers.AutoModelForSequenceClassification,
         IMAGE: transformers.AutoModelForImageClassification}  # fmt: skip


def inputs(task):
    if task == TEXT:
        return {"input_ids": IDS}
    return {"pixel_values": torch.ones(2, 3, 8, 8)}


def load(folder, task, target, seed, **settings):
    lora = {"r": 2, "target_modules": [target], **settings}
    table = ModelTable(name=str(folder), num_labels=3, new_head=True, lora=lora)
    return load_model(table, task, ["a", "b", "c"], folder, seed=seed)


@torch.no_grad()
def train(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


@torch.no_grad()
def answers(model, task):
    return model.eval()(**inputs(task)).logits


def fresh(task, folder):
    """The backbone, as anybody loads it, with another random head."""
    torch.manual_seed(99)
    return KINDS[task].from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("body", BODIES)
def test_what_is_saved_answers_as_what_was_trained(body, tmp_path):
    task, make, target = BODIES[body]
    make().save_pretrained(tmp_path)
    model = load(tmp_path, task, target, seed=7)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    back = peft.PeftModel.from_pretrained(fresh(task, tmp_path), tmp_path / "adapter")
    assert torch.equal(answers(back, task), answers(model, task))


@pytest.mark.parametrize("body", BODIES)
def test_what_clients_hold_is_the_same_on_every_machine(body, tmp_path):
    task, make, target = BODIES[body]
    make().save_pretrained(tmp_path)
    owners, clients = (load(tmp_path, task, target, seed=seed) for seed in (7, 0))
    named = dict(clients.named_parameters())
    frozen = [(n, p) for n, p in owners.named_parameters() if not p.requires_grad]
    assert len(frozen) > 5
    assert all(torch.equal(parameter, named[name]) for name, parameter in frozen)


@pytest.mark.parametrize("body", ["no head", "no head on images"])
def test_a_head_that_a_saved_adapter_does_not_know_of_is_trained_and_saved(body, tmp_path):
    task, make, target = BODIES[body]
    make().save_pretrained(tmp_path)
    bare = peft.get_peft_model(fresh(task, tmp_path), peft.LoraConfig(r=2, target_modules=[target]))
    bare.save_pretrained(tmp_path / "before")
    table = ModelTable(name=str(tmp_path), num_labels=3, adapter="before")
    model: Any = load_model(table, task, ["a", "b", "c"], tmp_path, seed=7)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("classifier" in name for name in trained)
    train(model)
    model.save_pretrained(tmp_path / "after")
    back = peft.PeftModel.from_pretrained(fresh(task, tmp_path), tmp_path / "after")
    assert torch.equal(answers(back, task), answers(model, task))


def test_a_head_that_a_saved_adapter_has_keeps_its_values(tmp_path):
    task, make, target = BODIES["no head on images"]
    make().save_pretrained(tmp_path)
    first = load(tmp_path, task, target, seed=7)
    train(first)
    first.save_pretrained(tmp_path / "before")
    table = ModelTable(name=str(tmp_path), num_labels=3, adapter="before")
    again = load_model(table, task, ["a", "b", "c"], tmp_path, seed=8)
    assert torch.equal(answers(again, task), answers(first, task))


def test_an_adapter_that_lacks_a_layer_is_still_refused(tmp_path):
    task, make, _ = BODIES["a head for five"]
    make().save_pretrained(tmp_path)
    model = load(tmp_path, task, "query", seed=1)
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "target_modules": ["query", "key"]})
    )
    table = ModelTable(name=str(tmp_path), num_labels=3, new_head=True, adapter="adapter")
    with pytest.raises(ConfigurationError, match="does not fit"):
        load_model(table, task, ["a", "b", "c"], tmp_path, seed=0)


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian", "orthogonal", True, False])
def test_beginnings_that_others_can_repeat_are_saved_as_they_were_trained(start, tmp_path):
    task, make, target = BODIES["no head"]
    make().save_pretrained(tmp_path)
    model = load(tmp_path, task, target, seed=7, init_lora_weights=start)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    back = peft.PeftModel.from_pretrained(fresh(task, tmp_path), tmp_path / "adapter")
    torch.testing.assert_close(answers(back, task), answers(model, task))


STARTS = ["pissa_niter_4", "loftq", "corda", "eva", "lora_ga"]


@pytest.mark.parametrize("start", STARTS)
def test_others_are_refused_new_or_saved(start, tmp_path):
    task, make, target = BODIES["a head for five"]
    make().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="change of the backbone"):
        load(tmp_path, task, target, seed=0, init_lora_weights=start)
    load(tmp_path, task, target, seed=1).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
    table = ModelTable(name=str(tmp_path), num_labels=3, new_head=True, adapter="adapter")
    with pytest.raises(ConfigurationError, match="change of the backbone"):
        load_model(table, task, ["a", "b", "c"], tmp_path, seed=0)


def test_weights_of_other_sizes_than_the_settings_say_are_no_head(tmp_path):
    transformers.BertForSequenceClassification(_bert()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 70}))
    with pytest.raises(ConfigurationError, match=r"not of the sizes.*word_embeddings"):
        load(tmp_path, TEXT, "query", seed=0)


def test_a_folder_with_the_weights_of_another_model_is_refused(tmp_path):
    transformers.DistilBertModel(transformers.DistilBertConfig(**DISTIL)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(_bert().to_dict()))
    with pytest.raises(ConfigurationError, match="no weights for most of the model"):
        load(tmp_path, TEXT, "query", seed=0)


FILE = """
[model]
name = "body"
tokenizer = "words"
{model}
[model.lora]
r = 2
target_modules = ["query"]
{lora}
[data]
train = "rows.json"
test = "rows.json"
max_length = 12
[partition]
clients = 2
[training]
steps = 2
batch_size = 4
learning_rate = 1e-2
[scheme]
name = "{scheme}"
[federation]
rounds = 1
"""


def home_of(folder, scheme, model="", lora=""):
    toys.bert().bert.save_pretrained(folder / "body")
    words = ["[PAD]", "[UNK]", *map(str, range(270))]
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder / "words")
    (folder / "rows.json").write_text(json.dumps(toys.texts(30)))
    (folder / "f.toml").write_text(FILE.format(scheme=scheme, model=model, lora=lora))
    return load_config(folder / "f.toml")


@pytest.mark.parametrize("scheme", ["fedlpp", "fedqsn", "fedavg"])
def test_a_run_saves_what_it_measured(scheme, tmp_path):
    config = home_of(tmp_path, scheme)
    federation = build(config)
    assert federation._test is not None
    result = federation.run(1)
    saved = save_model(config, result.global_model)
    torch.manual_seed(99)
    base = KINDS[TEXT].from_pretrained(tmp_path / "body", num_labels=3)
    back = peft.PeftModel.from_pretrained(base, saved)
    found = evaluate(back, federation._task, federation._test)
    assert found == result.rounds[0].measures["global"]
    head = "base_model.model.classifier.modules_to_save.default.weight"
    assert head in federation.scheme.tensors(federation.model)


def test_a_beginning_of_the_weights_is_refused_where_clients_hold_them(tmp_path):
    with pytest.raises(ConfigurationError, match="change of the backbone"):
        build(home_of(tmp_path, "fedlpp", lora='init_lora_weights = "pissa"'))
    build(load_config(home_of(tmp_path, "fedqsn", lora='init_lora_weights = "pissa"').path))
