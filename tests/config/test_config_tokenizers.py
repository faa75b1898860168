"""A tokenizer that is absent, made from nothing, or of another model is found out in time."""

import json
import shutil

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import toys
from fedveil import ConfigurationError, DataError, Federation, TextClassification
from fedveil.config import build, load_config
from fedveil.errors import FedveilWarning

FILE = """
[model]
name = "own"
{model}
[data]
task = "{task}"
train = "rows.json"
max_length = 12
[partition]
clients = 2
[scheme]
name = "fedavg"
[federation]
rounds = 1
"""
WORDS = ["[PAD]", "[UNK]", *map(str, range(270))]


def tokenizer_of(words, folder):
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]"
    )
    found.save_pretrained(folder)
    return found


@pytest.fixture
def home(tmp_path):
    toys.bert().save_pretrained(tmp_path / "own")
    (tmp_path / "rows.json").write_text(json.dumps(toys.texts(24)))
    return tmp_path


def federation_of(home, model="", task="text-classification"):
    (home / "f.toml").write_text(FILE.format(model=model, task=task))
    return build(load_config(home / "f.toml"))


def test_a_folder_without_one_is_refused_and_says_what_is_missing(home):
    with pytest.raises(ConfigurationError, match="no tokenizer in the folder") as caught:
        federation_of(home)
    assert "tokenizer.json" in caught.value.expected
    assert "model.safetensors" in caught.value.found


def test_one_that_has_settings_and_no_words_is_refused(home):
    settings = {"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (home / "own" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigurationError, match="has no vocabulary"):
        federation_of(home)


def test_one_that_knows_nothing_of_the_texts_is_refused(home):
    tokenizer_of([*WORDS[:2], *(f"word-{n}" for n in range(270))], home / "own")
    with pytest.raises(DataError, match=r"trained on noise.*tokens unknown"):
        federation_of(home)


def test_one_with_tokens_beyond_the_model_is_refused(home):
    tokenizer_of([*WORDS, *map(str, range(270, 400))], home / "own")
    with pytest.raises(ConfigurationError, match="of another model"):
        federation_of(home)


def test_one_with_far_fewer_tokens_than_the_model_is_worth_a_word(home):
    tokenizer_of(WORDS[:13], home / "own")
    rows = [{"text": "1 2 3", "label": n % 3} for n in range(24)]
    (home / "rows.json").write_text(json.dumps(rows))
    with pytest.warns(FedveilWarning, match="13 tokens, and the model embeddings of 272"):
        federation_of(home)


def test_the_right_one_passes_and_may_lie_elsewhere(home):
    tokenizer_of(WORDS, home / "words")
    federation_of(home, 'tokenizer = "words"')
    shutil.copytree(home / "words", home / "own", dirs_exist_ok=True)
    federation_of(home)


class TestInPython:
    def test_one_made_from_nothing_is_refused(self, tmp_path):
        toys.bert().save_pretrained(tmp_path)
        empty = transformers.AutoTokenizer.from_pretrained(tmp_path)
        with pytest.raises(ConfigurationError, match="has no vocabulary"):
            Federation(toys.bert(), [toys.texts(12)], task=TextClassification(empty))

    def test_one_that_knows_nothing_of_the_texts_is_refused(self, tmp_path):
        strange = tokenizer_of(["[PAD]", "[UNK]", "a", "b"], tmp_path)
        with pytest.raises(DataError, match=r"trained on noise.*client-00"):
            Federation(toys.bert(), [toys.texts(12)], task=TextClassification(strange))

    def test_half_of_the_words_unknown_are_not_too_many(self, tmp_path):
        known = tokenizer_of(["[PAD]", "[UNK]", "a", "b"], tmp_path)
        rows = [{"text": "a b c d", "label": n % 3} for n in range(12)]
        Federation(toys.bert(), [rows], task=TextClassification(known))
