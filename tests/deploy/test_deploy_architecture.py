"""What clients are given of a model before the first message: nothing that the owner wrote."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from deploy_samples import FILE

import toys
from fedveil.config import build, build_workplace, load_config
from fedveil.config.building import tokenizer_name
from fedveil.deploy import Address, write_deployment
from fedveil.deploy.architecture import bare_settings, given_to_clients
from fedveil.errors import ConfigurationError

sys.path.append(str(Path(__file__).parents[1] / "units"))
from units_families import FAMILIES, randomise

CANARY = "kanarienvogel"
NUMBER = 90817263544536
PUBLIC = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(20)), "plain", "words"]
OWN = [*PUBLIC[:-2], f"{CANARY}1", f"{CANARY}2"]
WRITTEN = {
    "note": f"{CANARY} of a config",
    "score": NUMBER,
    "task_specific_params": {"summarization": {"prefix": CANARY, "score": NUMBER}},
    "finetuning_task": CANARY,
    "_name_or_path": f"/home/{CANARY}/model",
    "architectures": [CANARY],
    "auto_map": {"AutoModel": f"{CANARY}.Model"},
    "custom_pipelines": {CANARY: {"impl": CANARY}},
    "id2label": {"0": f"{CANARY}a", "1": f"{CANARY}b", "2": f"{CANARY}c"},
    "label2id": {f"{CANARY}a": 0, f"{CANARY}b": 1, f"{CANARY}c": 2},
    "prefix": CANARY,
    "summary_activation": CANARY,
    "max_length": NUMBER,
    "bad_words_ids": [[NUMBER]],
    "transformers_version": f"5.0.{CANARY}",
    "nested": {"text_config": {"note": CANARY}},
    CANARY: 1,
}


def save(folder, model, vocabulary, written=None, template=None):
    """A model's folder, with texts of its owner wherever a text may be."""
    model.save_pretrained(folder)
    words = folder.with_name(f"{folder.name}.txt")
    words.write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(str(words))
    words.unlink()
    if written:
        tokenizer.add_tokens([f"{CANARY}3"])
        tokenizer.add_special_tokens({"additional_special_tokens": [f"<{CANARY}>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if written:
        add(folder / "config.json", written)
        add(folder / "tokenizer_config.json", {"note": CANARY, "name_or_path": f"/x/{CANARY}"})
    return folder


def add(path, values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def owners(folder, public=None, task="text-classification", name="own", model="bert", more=""):
    """The owner's file, with a test set."""
    rows = [{"text": "1 2 3", "prompt": "1 2", "completion": "3", "label": n % 3} for n in range(9)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "test.parquet")
    text = FILE.format(model=name, task=task).replace("[data]", "[data]\nmax_length = 8")
    if task != "text-classification":
        text = text.replace('labels = ["0", "1", "2"]', "")
    if public is not None:
        text = text.replace(f'name = "{name}"', f'name = "{name}"\npublic = "{public}"')
        text = text.replace("[data]", '[data]\nowner = "test.parquet"')
    (folder / "federation.toml").write_text(text.replace("[data]", f"{more}\n[data]"))
    return load_config(folder / "federation.toml")


def deployed(folder, config):
    """The first client's folder, and all that both have got, as bytes."""
    _, one, other = write_deployment(config, Address("fl.example.org"), folder / "deployment")
    given = b"".join(
        data for place in (one, other) for name, data in toys.files(place).items()
        if not str(name).endswith("node.key")
    )  # fmt: skip
    names = " ".join(str(path) for place in (one, other) for path in place.rglob("*"))
    return one, given + names.replace(str(folder), "").encode()


def workplace(partner):
    rows = [{"text": "1 2 3", "prompt": "1 2", "completion": "3", "label": n % 3} for n in range(9)]
    datasets.Dataset.from_list(rows).to_parquet(partner / "data.parquet")
    toml = partner / "partner.toml"
    toml.write_text(toml.read_text().replace("data.csv", "data.parquet"))
    return build_workplace(load_config(toml))


class TestAPublicModel:
    """Clients have what anybody has: its tokenizer, and its architecture."""

    @pytest.fixture
    def made(self, folder):
        save(folder / "own", toys.bert(1), OWN, WRITTEN, template=f"{CANARY} {{{{ messages }}}}")
        save(folder / "public", toys.bert(2), PUBLIC)
        return owners(folder, "public")

    def test_nothing_that_the_owner_wrote_reaches_a_client(self, folder, made):
        _, given = deployed(folder, made)
        assert CANARY.encode() not in given.lower()
        assert str(NUMBER).encode() not in given

    def test_clients_encode_as_the_public_model_does_and_the_owner_too(self, folder, made):
        partner, _ = deployed(folder, made)
        own = transformers.AutoTokenizer.from_pretrained(folder / "public")
        theirs = transformers.AutoTokenizer.from_pretrained(partner / "architecture")
        assert theirs.get_vocab() == own.get_vocab()
        for text in ("1 2 plain words", "19 unknown", ""):
            assert theirs(text)["input_ids"] == own(text)["input_ids"]
        assert tokenizer_name(made) == "public"
        place = workplace(partner)
        assert place.task.tokenizer.get_vocab() == own.get_vocab()
        simulated = build(made)
        assert simulated._task.tokenizer.get_vocab() == own.get_vocab()  # type: ignore[attr-defined]

    def test_another_tokenizer_is_refused_before_anything_is_written(self, folder, made):
        made = owners(folder, "public", more='tokenizer = "own"')
        with pytest.raises(ConfigurationError, match="not the public model's") as found:
            deployed(folder, made)
        assert "Leave tokenizer out" in found.value.fix
        assert not (folder / "deployment").exists()

    def test_the_same_tokenizer_under_another_name_is_not(self, folder, made):
        save(folder / "copy", toys.bert(2), PUBLIC)
        _, given = deployed(folder, owners(folder, "public", more='tokenizer = "copy"'))
        assert CANARY.encode() not in given.lower()

    def test_one_is_named_where_the_public_model_brings_none(self, folder, made):
        for path in (folder / "public").glob("*token*"):
            path.unlink()
        assert tokenizer_name(made) == "own", "which is well as long as nobody is given it"
        with pytest.raises(ConfigurationError, match="your own model's tokenizer"):
            deployed(folder, made)
        save(folder / "words", toys.bert(2), PUBLIC)
        made = owners(folder, "public", more='tokenizer = "words"')
        deployed(folder, made)
        assert any("the tokenizer words" in line for line in given_to_clients(made))

    def test_of_a_random_initialization_the_owner_has_to_name_a_tokenizer(self, folder, made):
        with pytest.raises(ConfigurationError, match="your own model's tokenizer"):
            deployed(folder, owners(folder, "random"))
        assert not (folder / "deployment").exists()
        named = owners(folder, "random", more='tokenizer = "public"')
        _, given = deployed(folder, named)
        assert CANARY.encode() not in given.lower()
        assert any("the tokenizer public" in line for line in given_to_clients(named))

    def test_then_nothing_has_to_be_said(self, folder, made):
        assert given_to_clients(made) == []
        deployed(folder, made)
        assert "nothing of yours" in (folder / "deployment" / "owner" / "README.md").read_text()


class TestTheOwnersOwnModel:
    """Its tokenizer goes out, and the owner is told; of its configuration sizes do."""

    def test_its_configuration_tells_nothing_that_somebody_wrote(self, folder):
        save(folder / "own", toys.bert(1), PUBLIC)
        add(folder / "own" / "config.json", WRITTEN)
        add(folder / "own" / "tokenizer_config.json", {"note": CANARY, "auto_map": {CANARY: 1}})
        partner, given = deployed(folder, owners(folder))
        assert CANARY.encode() not in given.lower()
        assert str(NUMBER).encode() not in given
        config = transformers.AutoConfig.from_pretrained(partner / "architecture")
        assert config.num_labels == 3
        assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}

    def test_the_owner_is_told_that_clients_get_its_tokenizer(self, folder):
        save(folder / "own", toys.bert(1), PUBLIC)
        config = owners(folder)
        deployed(folder, config)
        (told,) = [line for line in given_to_clients(config) if "tokenizer" in line]
        assert "the tokenizer own, with its whole vocabulary" in told
        assert told in (folder / "deployment" / "owner" / "README.md").read_text()

    def test_a_chat_template_stays_where_no_conversation_needs_it(self, folder):
        save(folder / "own", toys.bert(1), PUBLIC, template=f"{CANARY} {{{{ messages }}}}")
        _, given = deployed(folder, owners(folder))
        assert CANARY.encode() not in given

    def test_a_language_model_takes_its_template_along(self, folder):
        save(folder / "own", toys.gpt2(1), PUBLIC, template="{{ messages }}")
        partner, _ = deployed(folder, owners(folder, task="causal-lm"))
        theirs = transformers.AutoTokenizer.from_pretrained(partner / "architecture")
        assert theirs.chat_template == "{{ messages }}"

    def test_paths_of_the_owners_machine_are_none_of_a_clients_business(self, folder):
        save(folder / CANARY / "tuned", toys.gpt2(1), PUBLIC)
        config = owners(folder, task="causal-lm", name=str(folder / CANARY / "tuned"))
        text = config.path.read_text().replace('units = "neurons"\nclient_mask = 0.25', "")
        text = text.replace("[scheme]", '[scheme]\nname = "fedlpp"')
        lora = (
            '[model.lora]\nr = 2\ntarget_modules = ["c_attn"]\nfan_in_fan_out = true\n'
            f'revision = "{CANARY}"\n'
        )
        config.path.write_text(text.replace("[data]", lora + "[data]", 1))
        partner, given = deployed(folder, load_config(config.path))
        assert CANARY.encode() not in given
        assert 'name = "tuned"' in (partner / "partner.toml").read_text()

    def test_beside_a_function_clients_get_the_tokenizer_and_are_told_of_no_folder(self, folder):
        save(folder / CANARY, toys.bert(1), PUBLIC)
        (folder / "toy_bert.py").write_text(
            "import toys\n\ndef build():\n    return toys.bert(1)\n"
        )
        more = f'tokenizer = "{folder / CANARY}"'
        config = owners(folder, name="toy_bert:build", more=more)
        partner, given = deployed(folder, config)
        assert CANARY.encode() not in given
        assert 'tokenizer = "tokenizer"' in (partner / "partner.toml").read_text()
        own = transformers.AutoTokenizer.from_pretrained(folder / CANARY)
        theirs = transformers.AutoTokenizer.from_pretrained(partner / "tokenizer")
        assert theirs.get_vocab() == own.get_vocab()
        assert any("toy_bert.py as it is" in line for line in given_to_clients(config))

    @pytest.mark.parametrize("task", ["text-classification", "causal-lm", "seq2seq"])
    def test_a_client_builds_what_the_owner_has(self, folder, task):
        model = {"causal-lm": toys.gpt2, "seq2seq": t5}.get(task, toys.bert)(1)
        save(folder / "own", model, PUBLIC, None)
        add(folder / "own" / "config.json", {"note": CANARY})
        partner, _ = deployed(folder, owners(folder, task=task))
        place, own = workplace(partner), build(load_config(folder / "federation.toml")).model
        assert_same(own, place.architecture)

    @pytest.mark.parametrize("scheme", ["fedqsn", "fedavg"])
    def test_what_is_new_under_an_adapter_is_trained_on_both_sides(self, folder, scheme):
        save(folder / "own", toys.bert(1).bert, PUBLIC, None)
        lora = 'lora = { r = 2, target_modules = ["query"] }'
        config = owners(folder, more=lora)
        text = config.path.read_text().replace('name = "fedqsn"', f'name = "{scheme}"')
        config.path.write_text(text)
        partner, _ = deployed(folder, load_config(config.path))
        place, own = workplace(partner), build(load_config(config.path)).model
        trained = [
            {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            for model in (own, place.architecture)
        ]
        assert trained[0] == trained[1]
        assert any("classifier" in name for name in trained[0])
        assert_same(own, place.architecture)

    def test_a_model_with_more_classes_than_labels_has_them_at_clients_without_their_names(
        self, folder
    ):
        save(folder / "own", toys.bert(1), PUBLIC, None)
        names = ["one", "two", f"{CANARY}c"]
        add(folder / "own" / "config.json", {"id2label": dict(enumerate(names)), "label2id": None})
        config = owners(folder)
        text = config.path.read_text().replace('["0", "1", "2"]', '["one", "two"]')
        config.path.write_text(text)
        rows = [{"text": "1 2 3", "label": ["one", "two"][n % 2]} for n in range(9)]
        datasets.Dataset.from_list(rows).to_parquet(folder / "test.parquet")
        partner, given = deployed(folder, load_config(config.path))
        assert CANARY.encode() not in given
        assert "num_labels = 3" in (partner / "partner.toml").read_text()

    def test_labels_in_another_order_than_the_model_are_refused_before_clients_get_them(
        self, folder
    ):
        save(folder / "own", toys.bert(1), PUBLIC, None)
        names = {"0": "c", "1": "a", "2": "b"}
        add(folder / "own" / "config.json", {"id2label": names, "label2id": None})
        config = owners(folder)
        text = config.path.read_text().replace('["0", "1", "2"]', '["a", "b", "c"]')
        config.path.write_text(text)
        with pytest.raises(ConfigurationError, match="in another order"):
            deployed(folder, load_config(config.path))
        assert not (folder / "deployment").exists()


def t5(seed=0):
    """Of the kind whose outputs are not scaled: its configuration does not keep that as it was."""
    config = transformers.T5Config(
        vocab_size=272, d_model=16, d_ff=264, d_kv=4, num_layers=1, num_heads=4,
        decoder_start_token_id=0, tie_word_embeddings=False, feed_forward_proj="gated-silu",
    )  # fmt: skip
    assert not config.scale_decoder_outputs
    return randomise(transformers.T5ForConditionalGeneration(config), seed)


def assert_same(own, other):
    """The same tensors, and with the same weights the same answers."""
    mine, theirs = own.state_dict(), other.state_dict()
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
    other.load_state_dict(mine)
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    inputs = {"input_ids": ids}
    if own.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    with torch.no_grad():
        answers = own.eval()(**inputs).logits, other.eval()(**inputs).logits
    assert torch.equal(*answers)


SMALL = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "vocab_size": 32, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_labels": 5,
}  # fmt: skip
ODD: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Settings that leave names and shapes as they are, and change what is computed.
    "bert-relu": ("Bert", "SequenceClassification", {"hidden_act": "relu", "layer_norm_eps": 0.3}),
    "roberta-pad": ("Roberta", "SequenceClassification", {"pad_token_id": 3}),
    "deberta": ("DebertaV2", "SequenceClassification", {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "pooler_hidden_act": "tanh",
    }),
    "gpt2-scaled": ("GPT2", "CausalLM", {
        "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu",
        "layer_norm_epsilon": 0.3, "tie_word_embeddings": False,
    }),
    "gpt2-head": ("GPT2", "SequenceClassification", {"pad_token_id": 9}),
    "llama-yarn": ("Llama", "CausalLM", {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "beta_fast": 16.0,
            "original_max_position_embeddings": 16,
        },
        "rms_norm_eps": 0.2, "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh",
    }),
    "llama-3": ("Llama", "CausalLM", {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "rope_theta": 99.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    }),
    "qwen2-window": ("Qwen2", "CausalLM", {
        "use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1,
        "num_key_value_heads": 2,
    }),
    "gemma3": ("Gemma3Text", "CausalLM", {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"], "head_dim": 4,
        "sliding_window": 2, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 3,
        "num_key_value_heads": 2,
    }),
    "mixtral": ("Mixtral", "CausalLM", {
        "num_local_experts": 3, "num_experts_per_tok": 1, "num_key_value_heads": 2,
    }),
    "modernbert": ("ModernBert", "SequenceClassification", {
        "classifier_pooling": "mean", "global_attn_every_n_layers": 2, "local_attention": 4,
        "classifier_activation": "relu", "cls_token_id": 1, "sep_token_id": 2,
    }),
    "opt": ("OPT", "CausalLM", {
        "ffn_dim": 24, "word_embed_proj_dim": 8, "do_layer_norm_before": False,
        "activation_function": "gelu",
    }),
}  # fmt: skip


def classes(name, head):
    kind = {"Gemma3Text": "Gemma3"}.get(name, name)
    head = "LMHeadModel" if (name, head) == ("GPT2", "CausalLM") else f"For{head}"
    return getattr(transformers, f"{name}Config"), getattr(transformers, kind + head)


def rebuilt(model, folder):
    """What somebody builds who has the written settings alone."""
    folder.mkdir()
    settings = {**bare_settings(model.config), "num_labels": model.config.num_labels}
    (folder / "config.json").write_text(json.dumps(settings))
    config = transformers.AutoConfig.from_pretrained(folder)
    assert type(config) is type(model.config)
    return type(model)(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_built_from_what_is_kept(name, tmp_path):
    family = FAMILIES[name]
    own = randomise(family.build())
    other = rebuilt(own, tmp_path / "a").eval()
    mine = own.state_dict()
    assert {n: t.shape for n, t in mine.items()} == {
        n: t.shape for n, t in other.state_dict().items()
    }
    other.load_state_dict(mine)
    with torch.no_grad():
        assert torch.equal(own(**family.inputs()).logits, other(**family.inputs()).logits)


@pytest.mark.parametrize("name", ODD)
def test_what_decides_what_is_computed_is_kept(name, tmp_path):
    config, model = classes(*ODD[name][:2])
    own = randomise(model(config(**{**SMALL, **ODD[name][2]})))
    plain = randomise(model(config(**SMALL))) if name not in ("opt", "deberta") else None
    assert_same(own, rebuilt(own, tmp_path / "a"))
    if plain is not None:  # else its shapes tell
        mine, theirs = own.config.to_dict(), plain.config.to_dict()
        kept = bare_settings(own.config)
        changed = {n for n in mine if n in theirs and mine[n] != theirs[n]}
        assert changed <= kept.keys()


def test_settings_inside_settings_are_treated_alike(tmp_path):
    text = {**SMALL, "intermediate_size": 20, "layer_norm_eps": 0.3, "note": CANARY}
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 4,
        "num_attention_heads": 2, "patch_size": 2, "hidden_act": "relu", CANARY: {"a": [CANARY]},
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    own = randomise(transformers.CLIPModel(config))
    own.config.text_config.note = CANARY
    kept = bare_settings(own.config)
    assert CANARY not in json.dumps(kept)
    assert kept["vision_config"]["hidden_act"] == "relu"
    other = rebuilt(own, tmp_path / "a")
    other.load_state_dict(own.state_dict())
    ids, pixels = torch.tensor([[5, 6, 2]]), torch.ones(1, 3, 4, 4)
    with torch.no_grad():
        one, two = (m.eval()(input_ids=ids, pixel_values=pixels) for m in (own, other))
    assert torch.equal(one.logits_per_image, two.logits_per_image)


def test_words_inside_what_is_needed_are_words_of_the_code():
    config = transformers.LlamaConfig(**SMALL)
    config.rope_parameters = {**config.rope_parameters, "note": CANARY, CANARY: 3, "factor": CANARY}
    config.layer_types = ["full_attention", CANARY]
    kept = bare_settings(config)
    assert CANARY not in json.dumps(kept)
    assert kept["rope_parameters"]["rope_type"] == "default"
    assert "layer_types" not in kept, "half a list is another list"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    words = [*PUBLIC[:5], *(f"w{number}" for number in range(300))]
    save(folder / "own", toys.bert(1), words)
    with pytest.raises(ConfigurationError, match="no embedding of") as found:
        build(owners(folder))
    assert "at most 272 tokens" in found.value.expected
