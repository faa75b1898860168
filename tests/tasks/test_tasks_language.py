"""Prompts and answers: what is learned of them, and by which loss."""

import copy
import math
import pickle
from typing import ClassVar

import pytest
import torch
import transformers

import toys
from fedveil import ConfigurationError, DataError, FedAvg
from fedveil.hub import minilm_folder
from fedveil.tasks import CausalLM, Seq2Seq
from fedveil.training import Trainer, Training, evaluate

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"  # noqa: E501
ROWS = [
    {"prompt": "the capital of france is", "completion": "paris"},
    {"prompt": "one two three four", "completion": "five six seven"},
]
CHAT = {
    "messages": [
        {"role": "user", "content": "name a city"},
        {"role": "assistant", "content": "rome"},
    ]
}


@pytest.fixture(scope="module")
def tokenizer():
    """A real one, whose prompts begin with [CLS]; [SEP] ends answers."""
    found = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    found.eos_token = "[SEP]"
    return found


@pytest.fixture(scope="module")
def gpt2(tokenizer):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def t5(tokenizer):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


class TestWhatIsLearned:
    def test_is_the_answer_and_its_end(self, tokenizer):
        task = CausalLM(tokenizer)
        row = task.prepare(ROWS).rows[1]
        learned = [token for token in row["labels"] if token >= 0]
        assert tokenizer.decode(learned) == "five six seven [SEP]"
        assert tokenizer.decode(row["input_ids"]) == "[CLS] one two three four five six seven [SEP]"
        assert len(row["labels"]) == len(row["input_ids"])

    def test_of_a_plain_text_is_all_of_it(self, tokenizer):
        row = CausalLM(tokenizer).prepare([{"text": "five six"}]).rows[0]
        assert tokenizer.decode([t for t in row["labels"] if t >= 0]) == "five six [SEP]"
        assert row["labels"][0] == -100  # something comes before the first token

    def test_of_a_conversation_is_its_last_message(self, tokenizer):
        chat = copy.deepcopy(tokenizer)
        chat.chat_template = TEMPLATE
        for row in (CHAT, {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}):
            found = CausalLM(chat).prepare([row]).rows[0]
            assert chat.decode([t for t in found["labels"] if t >= 0]).strip() == "rome"
            assert "< user > name a city < assistant >" in chat.decode(found["input_ids"])

    def test_is_cut_off_on_the_right(self, tokenizer):
        row = CausalLM(tokenizer, max_length=7).prepare([ROWS[1]]).rows[0]
        assert tokenizer.decode(row["input_ids"]) == "[CLS] one two three four five six"

    def test_of_sequence_to_sequence_is_the_target(self, tokenizer):
        row = Seq2Seq(tokenizer).prepare(ROWS).rows[1]
        assert tokenizer.decode(row["input_ids"]) == "[CLS] one two three four [SEP]"
        assert tokenizer.decode(row["labels"]) == "five six seven [SEP]"


class TestTheLoss:
    def test_is_that_of_transformers(self, tokenizer, gpt2):
        task = CausalLM(tokenizer)
        batch = task.collate(task.prepare(ROWS).rows)  # type: ignore[arg-type]
        with torch.no_grad():
            expected = gpt2(**batch).loss
            assert torch.allclose(task.loss(gpt2, batch), expected, atol=1e-6)

    def test_is_that_of_transformers_for_t5(self, tokenizer, t5):
        task = Seq2Seq(tokenizer)
        batch = task.collate(task.prepare(ROWS).rows)  # type: ignore[arg-type]
        with torch.no_grad():
            assert torch.allclose(task.loss(t5, batch), t5(**batch).loss, atol=1e-6)

    def test_does_not_depend_on_padding(self, tokenizer, gpt2):
        task = CausalLM(tokenizer)
        rows = task.prepare(ROWS).rows
        with torch.no_grad():
            together = task.measure(gpt2, task.collate(rows))  # type: ignore[arg-type]
            alone = [task.measure(gpt2, task.collate([row])) for row in rows]
        assert together.examples == sum(m.examples for m in alone) == 2 + 4
        assert together.loss == pytest.approx(sum(m.loss for m in alone), rel=1e-5)

    def test_is_smoothed_in_training_only(self, tokenizer, gpt2):
        plain, smooth = CausalLM(tokenizer), CausalLM(tokenizer, label_smoothing=0.1)
        batch = plain.collate(plain.prepare(ROWS).rows)  # type: ignore[arg-type]
        with torch.no_grad():
            assert smooth.loss(gpt2, batch) != plain.loss(gpt2, batch)
            assert smooth.measure(gpt2, batch) == plain.measure(gpt2, batch)

    def test_comes_with_a_perplexity(self, tokenizer, gpt2):
        found = evaluate(gpt2, CausalLM(tokenizer), ROWS)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert found["loss"] == pytest.approx(math.log(len(tokenizer)), abs=0.5)

    @pytest.mark.parametrize("kind", [CausalLM, Seq2Seq])
    def test_falls_in_training(self, kind, tokenizer, gpt2, t5):
        model = copy.deepcopy(gpt2 if kind is CausalLM else t5)
        task = kind(tokenizer)
        before = evaluate(model, task, ROWS)["loss"]
        settings = Training(steps=15, batch_size=2, learning_rate=1e-2, schedule="constant")
        Trainer(task, ROWS, settings).train(model, seed=0)
        assert evaluate(model, task, ROWS)["loss"] < before / 2


def test_tasks_can_be_sent_to_processes(tokenizer):
    task = pickle.loads(pickle.dumps(CausalLM(tokenizer)))
    assert task.prepare(ROWS).rows == CausalLM(tokenizer).prepare(ROWS).rows


def test_a_federation_of_language_models(tokenizer, gpt2):
    clients = {"a": ROWS, "b": ROWS[::-1]}
    run = toys.federation(
        gpt2, clients=clients, task=CausalLM(tokenizer), scheme=FedAvg(), test=ROWS
    )
    assert "perplexity" in run.run(1).rounds[0].measures["global"]


BAD = {
    "no column 'completion'": [{"prompt": "a"}],
    "has an empty answer": [{"prompt": "a", "completion": ""}],
    "holds no text": [{"prompt": 3, "completion": "a"}],
    "does not end with an answer": [{"messages": CHAT["messages"][:1] * 2}],
    "has no conversation": [{"messages": "hello"}],
    "no chat template": [CHAT],
    "leaves no room": [{"prompt": "one two three four five", "completion": "six"}],
    "is empty": [],
}


class TestBadInput:
    @pytest.mark.parametrize("problem", BAD)
    def test_is_named(self, problem, tokenizer):
        with pytest.raises(DataError, match=problem):
            CausalLM(tokenizer, max_length=6).prepare(BAD[problem])  # type: ignore[arg-type]

    def test_a_text_longer_than_the_model_reads(self, tokenizer, gpt2):
        rows = [{"text": "one " * 100}]
        with pytest.raises(DataError, match=r"longer than the model.*64"):
            evaluate(gpt2, CausalLM(tokenizer), rows)

    def test_a_tokenizer_without_padding(self, tokenizer):
        bare = copy.deepcopy(tokenizer)
        bare.pad_token = None
        with pytest.raises(ConfigurationError, match="no padding token"):
            CausalLM(bare)

    @pytest.mark.parametrize("words", [{"max_length": 1}, {"label_smoothing": 1.0}])
    def test_an_impossible_number(self, words, tokenizer):
        with pytest.raises(ConfigurationError, match=next(iter(words))):
            CausalLM(tokenizer, **words)


def test_pieces_of_a_step_count_by_their_tokens(tokenizer, gpt2):
    def trained(pieces):
        model = copy.deepcopy(gpt2)
        settings = Training(
            steps=2, batch_size=2, learning_rate=0.1, optimizer="sgd",
            gradient_accumulation_steps=pieces,
        )  # fmt: skip
        with torch.random.fork_rng():
            model.eval()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            Trainer(CausalLM(tokenizer), ROWS, settings).train(model, seed=0)
        return toys.weights(model)

    for name, tensor in trained(1).items():
        torch.testing.assert_close(trained(2)[name], tensor, atol=1e-5, rtol=1e-4)


class TestTemplates:
    def test_are_filled_from_columns(self, tokenizer):
        plain = [{"prompt": "say: red and green", "completion": "it is red"}]
        rows = [{"one": "red", "two": "green", "colour": "red"}]
        task = CausalLM(tokenizer, prompt="say: {one} and {two}", completion="it is {colour}")
        assert task.prepare(rows).rows == CausalLM(tokenizer).prepare(plain).rows

    def test_write_triples_as_data_to_text_sets_do(self, tokenizer):
        rows = [{"triples": [["a", "b", "c"], ["d", "e", "f"]], "target": "x"}]
        task = CausalLM(tokenizer, prompt="{triples} ||", completion="{target}")
        assert task.questions(rows)[0].prompt == "a : b : c | d : e : f ||"

    def test_doubled_braces_are_braces_and_no_code_is_run(self, tokenizer):
        rows = [{"q": "{q.__class__}", "completion": "x"}]
        task = CausalLM(tokenizer, prompt="{{q}} {q}")
        assert task.questions(rows)[0].prompt == "{q} {q.__class__}"

    @pytest.mark.parametrize("template", ["{", "{}", "{a!r}", "{a:>5}", "{a}}", "{a}{"])
    def test_that_are_none(self, tokenizer, template):
        with pytest.raises(ConfigurationError, match=r"Summarize: \{dialogue\}"):
            CausalLM(tokenizer, prompt=template)

    def test_name_the_column_and_the_row_that_is_missing(self, tokenizer):
        task = CausalLM(tokenizer, prompt="say {one}")
        with pytest.raises(DataError, match="no column 'one'"):
            task.prepare(ROWS)
        with pytest.raises(DataError, match=r'row 1 lacks a value.*"one"'):
            task.prepare([{"one": "a", "completion": "b"}, {"one": None, "completion": "b"}])


class TestQuestions:
    ROWS: ClassVar = [
        {"prompt": "a", "completion": " one"},
        {"prompt": "b", "completion": "two"},
        {"prompt": "a", "completion": "three"},
    ]

    def test_are_asked_once_with_all_their_answers(self, tokenizer):
        found = CausalLM(tokenizer).questions(self.ROWS)
        assert found == [(0, "a", ["one", "three"]), (1, "b", ["two"])]

    def test_have_the_references_of_their_column(self, tokenizer):
        rows = [{**row, "right": ["x", f"y{n}"]} for n, row in enumerate(self.ROWS)]
        found = CausalLM(tokenizer, references="right").questions(rows)
        assert [q.references for q in found] == [["x", "y0", "x", "y2"], ["x", "y1"]]

    @pytest.mark.parametrize("wrong", [None, [], "x", [1]])
    def test_references_must_be_lists_of_texts(self, tokenizer, wrong):
        rows = [{**self.ROWS[0], "right": wrong}]
        with pytest.raises(DataError, match=r'row 0 has no references.*"right"'):
            CausalLM(tokenizer, references="right").questions(rows)

    @pytest.mark.parametrize("wrong", [None, 3, []])
    def test_answers_must_be_texts(self, tokenizer, wrong):
        with pytest.raises(DataError, match=r'row 0 holds no text.*"completion"'):
            CausalLM(tokenizer).questions([{"prompt": "a", "completion": wrong}])

    def test_conversations_ask_too(self, tokenizer):
        found = CausalLM(tokenizer).questions([CHAT, CHAT])
        assert [q.references for q in found] == [["rome", "rome"]]

    def test_plain_texts_do_not(self, tokenizer):
        with pytest.raises(DataError, match="ask nothing"):
            CausalLM(tokenizer).questions([{"text": "a"}])


@pytest.mark.parametrize("kind", [CausalLM, Seq2Seq])
def test_tokens_beyond_the_vocabulary_are_refused(tokenizer, gpt2, t5, kind):
    model = copy.deepcopy(gpt2 if kind is CausalLM else t5)
    model.resize_token_embeddings(1000)
    with pytest.raises(DataError, match=r"beyond the model's vocabulary.*0 to 999.*resize"):
        evaluate(model, kind(tokenizer), ROWS)
