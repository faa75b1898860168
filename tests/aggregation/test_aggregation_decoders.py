"""Padding is left out of Grams wherever a layer stands: what models see of a batch is what they see
of its examples one by one."""

import pytest
import torch
from torch import nn

from fedveil import ConfigurationError, RegMean, Seq2Seq
from fedveil.aggregation.linear import linear_layers
from fedveil.aggregation.observe import GramHooks
from fedveil.tasks import Prepared
from fedveil.training import Trainer, Training

transformers = pytest.importorskip("transformers")


def t5(kind="T5"):
    words = {"d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 1, "num_heads": 4}
    config = getattr(transformers, f"{kind}Config")(
        **words, vocab_size=400, decoder_start_token_id=0, dropout_rate=0.0
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def bart(kind="Bart", model="ForConditionalGeneration", **words):
    config = getattr(transformers, f"{kind}Config")(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, vocab_size=400,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=1,
        decoder_start_token_id=2, forced_eos_token_id=None, **words,
    )  # fmt: skip
    return getattr(transformers, f"{kind}{model}")(config)


def two_berts():
    words = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 20, "vocab_size": 400, "max_position_embeddings": 64}  # fmt: skip
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**words), transformers.BertConfig(**words)
    )
    model = transformers.EncoderDecoderModel(config)
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 0
    model.config.eos_token_id = 1
    return model


MODELS = {
    "t5": t5,
    "mt5": lambda: t5("MT5"),
    "bart": bart,
    "marian": lambda: bart("Marian", "MTModel"),
    "pegasus": lambda: bart("Pegasus"),
    "two berts": two_berts,
}
ROWS = {
    "other lengths": [("ab", "xyzuvw"), ("abc", "x")],
    "lengths equal by chance": [("abcdef", "x"), ("a", "uvwxyz")],
    "one is whole": [("ab", "xy"), ("abcd", "xyzu"), ("a", "x")],
}


def prepared(rows, **words):
    task = Seq2Seq(transformers.ByT5Tokenizer(), **words)
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in rows]
    return task, task.prepare(rows)


def grams(model, task, rows, told=True):
    """Diagonals of all Grams by layer, of a batch that is run as it is."""
    model.eval()
    hooks = GramHooks(model, linear_layers(model), "blocks", 2048)
    batch = task.collate(rows)
    with hooks.watching(), torch.no_grad():
        hooks.begin_batch(batch["attention_mask"], batch if told else None)
        task.loss(model, batch)
    return {
        layer: hooks.moments[name].gram(hooks.examples[name], None).diagonal
        for layer, name in hooks.same_input.items()
    }


def watched(model, mask, batch, run):
    """Hooks that have seen one batch."""
    hooks = GramHooks(model, linear_layers(model), "blocks", 2048)
    with hooks.watching(), torch.no_grad():
        hooks.begin_batch(mask, batch)
        run()
    return hooks


def check_same(together, alone):
    """Grams of a batch are the means of those of its examples."""
    assert all(one.keys() == together.keys() for one in alone)
    for name, gram in together.items():
        expected = torch.stack([one[name] for one in alone]).mean(0)
        torch.testing.assert_close(gram, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("told", [True, False], ids=["labels known", "labels not known"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_padding_of_neither_sequence_counts(build, rows, told):
    torch.manual_seed(0)
    model, (task, data) = build(), prepared(rows)
    together = grams(model, task, data.rows, told)
    assert any("encoder" in name for name in together)
    assert any("decoder" in name for name in together)
    check_same(together, [grams(model, task, [row], told) for row in data.rows])


def test_answers_that_are_cut_off_have_no_end_token():
    torch.manual_seed(0)
    model, (task, data) = t5(), prepared([("ab", "xyzuvw"), ("abc", "x")], max_length=4)
    for told in (True, False):
        together = grams(model, task, data.rows, told)
        check_same(together, [grams(model, task, [row], told) for row in data.rows])


def test_a_decoder_position_before_the_last_label_counts():
    """What is not learned still feeds what is."""
    torch.manual_seed(0)
    model, (task, data) = t5(), prepared([("ab", "xyzuvw"), ("abc", "xy")])
    for row in data.rows:
        row["labels"] = [-100, *row["labels"][1:]]
    together = grams(model, task, data.rows)
    check_same(together, [grams(model, task, [row]) for row in data.rows])


def test_a_trainer_measures_the_same_in_any_batch():
    """As clients do: 32 at a time."""
    torch.manual_seed(0)
    model, (task, data) = bart(), prepared([("ab" * n, "xyz" * (5 - n)) for n in range(1, 5)])
    trainer = Trainer(task, data, Training())
    found = RegMean(bits=None)._measured(model, trainer.replay, linear_layers(model))[0]
    name = "model.decoder.layers.0.encoder_attn.q_proj.weight"
    together = found.moments[name].gram(found.examples[name], None).diagonal
    alone = [grams(model.eval(), task, [row])[name] for row in data.rows]
    torch.testing.assert_close(together, torch.stack(alone).mean(0), rtol=1e-3, atol=1e-6)


def whisper():
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, vocab_size=50,
        num_mel_bins=6, max_source_positions=8, max_target_positions=12, pad_token_id=0,
        decoder_start_token_id=2, eos_token_id=1, bos_token_id=2, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


class Speech:
    """Frames of one length, and answers that are padded."""

    def collate(self, rows):
        longest = max(len(row["labels"]) for row in rows)
        labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]
        frames = torch.stack([row["frames"] for row in rows])
        mask = torch.ones(len(rows), frames.shape[-1]).long()
        return {"input_features": frames, "labels": torch.tensor(labels), "attention_mask": mask}

    def loss(self, model, batch):
        return model(**batch).loss


def test_frames_of_another_length_than_the_encoders_are_no_obstacle():
    torch.manual_seed(0)
    rows = [{"frames": torch.randn(6, 16), "labels": [5] * n} for n in (2, 8, 5)]
    model, task = whisper(), Speech()
    together = grams(model, task, rows)
    assert any("encoder.layers" in name for name in together)
    check_same(together, [grams(model, task, [row]) for row in rows])


def test_padding_that_a_model_reads_all_the_same_is_refused_and_not_guessed():
    model, task = whisper(), Speech()
    batch = task.collate([{"frames": torch.randn(6, 16), "labels": [5, 6]} for _ in range(2)])
    batch["attention_mask"][0, 10:] = 0
    with pytest.raises(ConfigurationError, match=r"mask.*16"):
        watched(model, batch["attention_mask"], batch, lambda: task.loss(model, batch))


class Layouts(nn.Module):
    """Layers that are given tokens in every way but one, and some of them only."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 6)
        names = ("usual", "flat", "time_first", "pooled", "some", "deep")
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in names})

    def forward(self, input_ids, attention_mask=None):
        hidden, layer = self.embed(input_ids), self.layers
        layer["flat"](hidden.flatten(0, 1))
        layer["time_first"](hidden.transpose(0, 1))
        layer["usual"](hidden)
        chosen = hidden[input_ids % 2 == 0]  # an expert's tokens
        if len(chosen):
            layer["some"](chosen)
        layer["deep"](hidden.view(*hidden.shape[:2], 2, 3).repeat(1, 1, 1, 2))
        return layer["pooled"](hidden[:, 0])


@pytest.mark.parametrize("lengths", [(2, 5), (4, 4, 4, 1), (3, 3, 3), (1, 6)], ids=str)
@pytest.mark.parametrize("given_to_model", [True, False])
def test_layers_may_have_their_tokens_in_any_order(lengths, given_to_model):
    torch.manual_seed(0)
    model = Layouts().eval()
    texts = [torch.cat([torch.tensor([2]), torch.randint(3, 50, (n - 1,))]) for n in lengths]

    def found(texts):
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=4)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(t)] for t in texts])).long()
        hooks = GramHooks(model, linear_layers(model), "blocks", 2048)
        with hooks.watching(), torch.no_grad():
            hooks.begin_batch(mask)
            model(ids, **({"attention_mask": mask} if given_to_model else {}))
        return {
            n: hooks.moments[n].gram(hooks.examples[n], None).diagonal for n in hooks.same_input
        }

    check_same(found(texts), [found([text]) for text in texts])


class Pair(nn.Module):
    """Two sequences, in torch's words."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.net = nn.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=False)

    def forward(self, src, tgt, src_key_padding_mask=None, tgt_key_padding_mask=None):
        return self.net(
            self.embed(src).transpose(0, 1), self.embed(tgt).transpose(0, 1),
            src_key_padding_mask=src_key_padding_mask, tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=src_key_padding_mask,
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("lengths", [((2, 5), (4, 1)), ((2, 5), (5, 3)), ((3, 3), (3, 3))], ids=str)
def test_torchs_own_transformer_with_time_first_is_understood(lengths):
    torch.manual_seed(0)
    model = Pair().eval()
    source, target = ([torch.randint(1, 50, (n,)) for n in part] for part in lengths)

    def found(chosen):
        words = {}
        for name, texts in (("src", source), ("tgt", target)):
            own = [texts[i] for i in chosen]
            words[name] = nn.utils.rnn.pad_sequence(own, batch_first=True)
            words[f"{name}_key_padding_mask"] = words[name] == 0
        hooks = GramHooks(model, linear_layers(model), "blocks", 2048)
        with hooks.watching(), torch.no_grad():
            hooks.begin_batch(None)
            model(**words)
        return {
            n: hooks.moments[n].gram(hooks.examples[n], None).diagonal for n in hooks.same_input
        }

    together = found([0, 1])
    assert {"net.encoder.layers.0.linear1.weight", "net.decoder.layers.0.linear1.weight"} <= set(
        together
    )
    check_same(together, [found([0]), found([1])])


def test_a_mask_with_holes_is_refused():
    model = Layouts().eval()
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    with pytest.raises(ConfigurationError, match="middle"):
        watched(model, mask, None, lambda: model(torch.ones(2, 3).long()))


def test_a_second_sequence_without_a_mask_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, input_ids, more):
            return self.a(self.embed(input_ids)).sum() + self.a(self.embed(more)).sum()

    model = Two().eval()
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    one, other = torch.ones(2, 3).long(), torch.ones(2, 5).long()
    with pytest.raises(ConfigurationError, match="more"):
        watched(model, mask, None, lambda: model(one, other))


class Parts:
    """A task that calls a part of the model, not the model."""

    name = "parts"

    def collate(self, rows):
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=4)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(r)] for r in rows])).long()
        return {"input_ids": ids, "attention_mask": mask}

    def prepare(self, data):
        return data

    def loss(self, model, batch):
        return model.layers["usual"](model.embed(batch["input_ids"])).sum()


def test_a_task_that_calls_a_part_of_the_model_is_measured_one_example_at_a_time():
    torch.manual_seed(0)
    model, rows = Layouts(), [torch.randint(3, 50, (n,)) for n in (2, 5, 1)]
    trainer = Trainer(Parts(), Prepared(rows), Training())  # type: ignore[arg-type]
    found = RegMean(bits=None)._measured(model, trainer.replay, linear_layers(model))[0]
    assert found.examples == {"layers.usual.weight": 3}
    means = [model.embed(row).detach().square().mean(0) for row in rows]
    gram = found.moments["layers.usual.weight"].gram(3, None).diagonal
    torch.testing.assert_close(gram, torch.stack(means).mean(0))
