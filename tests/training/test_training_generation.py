"""What models write, and how close it is to what was wanted."""

from typing import ClassVar

import pytest
import torch
import transformers

from fedveil.errors import ConfigurationError, DataError
from fedveil.hub import minilm_folder
from fedveil.tasks import CausalLM, Seq2Seq, Task
from fedveil.training import Generation, Trainer, Training, answer, generate, score
from training_samples import perceptron

ROWS = [
    {"prompt": "the capital of france is", "completion": "paris"},
    {"prompt": "one two three four", "completion": "five six seven"},
    {"prompt": "red", "completion": "green blue"},
]
GREEDY = transformers.GenerationConfig(max_new_tokens=8, do_sample=False)


@pytest.fixture(scope="module")
def tokenizer():
    found = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    found.eos_token = "[SEP]"
    return found


@pytest.fixture(scope="module", params=["causal", "seq2seq"])
def trained(request, tokenizer):
    """A task, and a model that knows its rows by heart."""
    torch.manual_seed(0)
    if request.param == "causal":
        task: Task = CausalLM(tokenizer)
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        task = Seq2Seq(tokenizer)
        config = transformers.T5Config(
            vocab_size=len(tokenizer), d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    settings = Training(steps=60, batch_size=3, learning_rate=1e-2, schedule="constant")
    Trainer(task, ROWS, settings).train(model, seed=0)
    return task, model


class TestGenerate:
    def test_what_was_learned_is_written(self, trained):
        task, model = trained
        assert generate(model, task, ROWS, config=GREEDY) == [row["completion"] for row in ROWS]

    def test_padding_changes_nothing(self, trained):
        task, model = trained
        together = generate(model, task, ROWS, config=GREEDY)
        assert generate(model, task, ROWS, config=GREEDY, batch_size=1) == together

    def test_answers_of_the_rows_are_not_looked_at(self, trained):
        task, model = trained
        others = [{**row, "completion": "zebra"} for row in ROWS]
        expected = generate(model, task, ROWS, config=GREEDY)
        assert generate(model, task, others, config=GREEDY) == expected

    def test_a_model_that_cannot(self, tokenizer):
        with pytest.raises(ConfigurationError, match="cannot generate"):
            generate(perceptron(), CausalLM(tokenizer), ROWS)


class TestAnswers:
    SETTINGS: ClassVar = {"max_new_tokens": 8, "do_sample": False}

    def test_each_prompt_is_asked_once_and_scored_against_all_its_answers(self, trained):
        task, model = trained
        rows = [{"prompt": "red", "completion": "something else"}, *ROWS]
        found = answer(model, task, rows, Generation(("rouge",), settings=self.SETTINGS))
        assert found.prompts == ["red", ROWS[0]["prompt"], ROWS[1]["prompt"]]
        assert found.references[0] == ["something else", "green blue"]
        assert found.texts == ["green blue", "paris", "five six seven"]
        assert found.scores["rouge1"] == 100

    def test_only_so_many_are_asked(self, trained):
        task, model = trained
        found = answer(model, task, ROWS, Generation(rows=2, settings=self.SETTINGS))
        assert len(found.texts) == 2

    def test_settings_are_those_of_transformers(self, trained):
        task, model = trained
        wanted = {"num_beams": 3, "no_repeat_ngram_size": 4, "length_penalty": 0.9}
        config = Generation(settings=wanted).config(model)
        assert {name: getattr(config, name) for name in wanted} == wanted
        short = Generation((), settings={**self.SETTINGS, "max_new_tokens": 1})
        written = answer(model, task, ROWS, short).texts
        assert all(
            len(task.tokenizer(text, add_special_tokens=False).input_ids) <= 1 for text in written
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"num_beems": 2}, "no such setting.*num_beams"),
         ({"max_new_tokens": 0}, "impossible"), ({"num_beams": -1}, "cannot generate so"),
         ({"_from_model_config": True}, "no such setting")],
    )  # fmt: skip
    def test_settings_that_are_none(self, trained, settings, message):
        with pytest.raises(ConfigurationError, match=message):
            Generation(settings=settings).check(trained[1], trained[0], ROWS)

    @pytest.mark.parametrize("wrong", [{"rows": 0}, {"batch_size": True}, {"scores": ("fluency",)}])
    def test_impossible_values(self, wrong):
        with pytest.raises(ConfigurationError):
            Generation(**wrong)


class TestScore:
    WANTED = ("the cat sat on the mat today", "there is a dog in the small garden")
    ALL = ("bleu", "chrf", "rouge", "meteor", "nist")

    def test_the_same_text_is_perfect(self):
        found = score(self.WANTED, self.WANTED, self.ALL)
        for name in ("bleu", "chrf", "rouge1", "rouge2", "rougeL"):
            assert found[name] == pytest.approx(100)
        assert found["meteor"] > 99
        assert found["nist"] > 2

    def test_is_that_of_the_libraries(self):
        import sacrebleu
        from rouge_score import rouge_scorer

        texts = ["the cat sat on a mat", "a dog is in the garden"]
        found = score(texts, self.WANTED)
        assert found["bleu"] == sacrebleu.corpus_bleu(texts, [list(self.WANTED)]).score
        assert found["chrf"] == sacrebleu.corpus_chrf(texts, [list(self.WANTED)]).score
        scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
        each = [
            scorer.score(w, t)["rougeL"].fmeasure for t, w in zip(texts, self.WANTED, strict=True)
        ]
        assert found["rougeL"] == pytest.approx(50 * sum(each))

    def test_the_closest_of_several_references_counts(self):
        texts = list(self.WANTED)
        several = [["something else entirely here", texts[0]], [texts[1]]]
        found = score(texts, several, self.ALL)
        assert found["bleu"] == pytest.approx(100)
        assert found["rougeL"] == pytest.approx(100)
        assert found["meteor"] > 99

    def test_nothing_written_is_worth_nothing(self):
        found = score(["", ""], self.WANTED, self.ALL)
        assert all(value == 0 for value in found.values())

    @pytest.mark.parametrize(
        ("texts", "references"), [([], []), (["a"], []), (["a"], [[]]), (["a"], ["b", "c"])]
    )
    def test_texts_and_references_must_fit(self, texts, references):
        with pytest.raises(DataError, match="do not fit"):
            score(texts, references)

    def test_an_unknown_score(self):
        with pytest.raises(ConfigurationError, match="bleu or chrf"):
            score(["a"], ["a"], ["accuracy"])
