"""What a classifier says of a text does not depend on the other texts of its batch."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from fedveil import TextClassification
from fedveil.errors import ConfigurationError, DataError
from fedveil.training import evaluate

transformers = pytest.importorskip("transformers")

WORDS = "abcdefg"
ROWS: list[dict[str, Any]] = [
    {"text": " ".join(WORDS[(i * j) % 7] for j in range(1 + i % 9)), "label": i % 2}
    for i in range(20)
]
WIDE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 32,
}  # fmt: skip
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
MODELS = {
    "GPT2": GPT,
    "OpenAIGPT": GPT,
    "OPT": {**WIDE, "ffn_dim": 16, "word_embed_proj_dim": 16},
    "Llama": WIDE,
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "Bert": WIDE,
    "Roberta": WIDE,
    "XLNet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16},
}


def tokenizer(side="left", pad="[PAD]", **settings):
    words = {"[PAD]": 0, **{word: number for number, word in enumerate(WORDS, 1)}, "[END]": 8}
    made = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, eos_token="[END]", padding_side=side, **settings
    )


def model(kind, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=9, num_labels=2, bos_token_id=None, eos_token_id=8,
        **{"initializer_range": 0.5, "pad_token_id": 0, **MODELS[kind], **settings},
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def losses(net, task, rows=ROWS):
    return [evaluate(net, task, rows, batch_size=size)["loss"] for size in (1, 8, 20)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_whatever_the_model_and_the_side_of_the_tokenizer(kind, side):
    alone, *together = losses(model(kind), TextClassification(tokenizer(side)))
    assert together == pytest.approx([alone, alone], rel=1e-5)


def test_where_the_end_of_a_text_is_also_the_padding():
    rows = [{**row, "text": row["text"] + " [END]" * (n % 2)} for n, row in enumerate(ROWS)]
    net = model("GPT2", pad_token_id=8)
    alone, *together = losses(net, TextClassification(tokenizer(pad="[END]")), rows)
    assert together == pytest.approx([alone, alone], rel=1e-5)


def test_in_training_too():
    net, task = model("GPT2", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), None
    task = TextClassification(tokenizer())
    rows = task.prepare(ROWS).rows
    together = task.loss(net.train(), task.collate(rows))  # type: ignore[arg-type]
    alone = torch.stack([task.loss(net, task.collate([row])) for row in rows]).mean()
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
@pytest.mark.parametrize("own", [None, 3])
def test_a_model_with_another_padding_token_is_refused_where_it_looks_for_that(kind, own):
    net = model(kind, pad_token_id=own)
    with pytest.raises(ConfigurationError, match=rf"pad_token_id = 0 .*found {own}"):
        evaluate(net, TextClassification(tokenizer()), ROWS)


def test_others_may_have_one():
    alone, *together = losses(model("Bert", pad_token_id=3), TextClassification(tokenizer()))
    assert together == pytest.approx([alone, alone], rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
def test_an_adapter_changes_nothing_in_that():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)
    net = peft.get_peft_model(model("GPT2", pad_token_id=3), lora)
    with pytest.raises(ConfigurationError, match="another token for padding"):
        evaluate(net, TextClassification(tokenizer()), ROWS)


@pytest.mark.parametrize(("side", "kept"), [("left", [2, 3]), ("right", [1, 2])])
def test_texts_are_cut_where_the_tokenizer_says(side, kept):
    task = TextClassification(tokenizer(truncation_side=side), max_length=2)
    assert task.prepare([{"text": "a b c", "label": 0}]).rows[0]["input_ids"] == kept


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([None, None], 'column of texts holds none.*"text".*found NoneType in all rows .2.'),
        (["", ""], "column of texts holds none.*found nothing in all rows"),
        (["a", ""], "row 1 has a text without any token"),
        (["a", None], "row 1 holds no text.*NoneType"),
        (["a", 7], "row 1 holds no text.*numbers=False"),
    ],
)
def test_texts_that_are_none(texts, message):
    with pytest.raises(DataError, match=message):
        TextClassification(tokenizer()).prepare([{"text": text, "label": 0} for text in texts])
