import math
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedveil.errors import ConfigurationError, DataError
from fedveil.tasks import Prepared, Task, TextClassification
from fedveil.tasks.task import Classification
from fedveil.training import Trainer, Training, evaluate
from training_samples import same, state, texts


@pytest.fixture
def task(tokenizer):
    return TextClassification(tokenizer, num_labels=2)


def test_bert_learns(bert, task):
    trainer = Trainer(task, texts(80), Training(epochs=6, batch_size=8, learning_rate=1e-2))
    before = evaluate(bert, task, texts(30, seed=1))
    record = trainer.train(bert, seed=0)
    after = evaluate(bert, task, texts(30, seed=1))
    assert record.loss_last < 0.5 * record.loss_first
    assert after["loss"] < before["loss"]
    assert after["accuracy"] > 90


def test_classes_that_occur(task):
    prepared = task.prepare([{"text": "good film", "label": 1}, {"text": "fine", "label": 1}])
    assert task.classes_in(prepared) == [1]
    batch = task.collate(prepared.select([0]))
    model = lambda **inputs: SimpleNamespace(logits=torch.zeros(1, 2))  # noqa: E731
    assert task.restricted_to(prepared).loss(model, batch).item() == 0
    assert task.loss(model, batch).item() == pytest.approx(math.log(2))


def test_it_is_a_task(task):
    assert isinstance(task, Task)


def test_batches_are_padded_to_their_longest_text(task):
    prepared = task.prepare([
        {"text": "good film", "label": 1},
        {"text": "bad", "label": 0},
        {"text": "a " * 20, "label": 0},
    ])  # fmt: skip
    assert prepared.lengths == [4, 3, 22]
    batch = task.collate(prepared.select([0, 1]))
    assert batch["input_ids"].shape == (2, 4)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert task.prepare(prepared) is prepared


def test_padding_is_done_as_the_tokenizer_would(task, tokenizer):
    rows = texts(7)
    batch = task.collate(task.prepare(rows).rows)
    labels = batch.pop("labels")
    expected = tokenizer(
        [row["text"] for row in rows],
        padding=True,
        truncation=True,
        max_length=128,
        return_tensors="pt",
    )
    assert labels.tolist() == [row["label"] for row in rows]
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_long_texts_are_cut(tokenizer):
    task = TextClassification(tokenizer, max_length=6)
    assert task.prepare([{"text": "a " * 20, "label": 0}]).lengths == [6]


def test_pairs_of_texts(tokenizer):
    task = TextClassification(tokenizer, text="question", text_pair="answer")
    rows = [{"question": "good film", "answer": "a bad plot", "label": 0}]
    batch = task.collate(task.prepare(rows).rows)  # type: ignore[arg-type]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    with pytest.raises(DataError, match="answer"):
        task.validate([{"question": "good", "label": 0}])


def test_texts_are_tokenised_once(bert, tokenizer):
    class Counting:
        calls = 0
        pad = staticmethod(tokenizer.pad)

        def __call__(self, *arguments, **options):
            self.calls += 1
            return tokenizer(*arguments, **options)

    counting = Counting()
    trainer = Trainer(TextClassification(counting), texts(6), Training(batch_size=2))
    for seed in range(3):
        trainer.train(bert, seed=seed)
    assert counting.calls == 1


def test_one_example(bert, task):
    record = Trainer(task, texts(1), Training(epochs=2)).train(bert, seed=0)
    assert (record.examples, record.steps) == (1, 2)


def test_the_trainer_survives_pickling(bert, task):
    trainer = Trainer(task, texts(8), Training(batch_size=4, learning_rate=1e-3))
    start = state(bert)
    record = trainer.train(bert, seed=1)
    first = state(bert)
    bert.load_state_dict(start)
    assert pickle.loads(pickle.dumps(trainer)).train(bert, seed=1) == record
    assert same(state(bert), first)


def test_evaluation_is_deterministic_and_leaves_no_trace(bert, task):
    bert.train()
    bert.bert.embeddings.eval()
    rows, before = texts(11), torch.get_rng_state()
    results = [evaluate(bert, task, rows, batch_size=size) for size in (3, 3, 64)]
    assert results[0] == results[1]
    assert results[0]["accuracy"] == results[2]["accuracy"]
    assert results[0]["loss"] == pytest.approx(results[2]["loss"], rel=1e-5)
    assert results[0] == evaluate(bert, task, task.prepare(rows), batch_size=3)
    assert bert.training
    assert not bert.bert.embeddings.training
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigurationError, match="batch_size"):
        evaluate(bert, task, rows, batch_size=0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([{"text": "a", "label": 0}, {"text": "a", "label": 2}], r"row 1 .* 0 to 1, found 2"),
        ([{"text": "a", "label": -1}], r"row 0 .* found -1"),
        ([{"text": "a", "label": "pos"}], r"row 0 .* found 'pos'.*encode_labels"),
        ([{"text": "a", "label": None}], "found None"),
        ([{"text": "a", "label": 1.0}], r"found 1\.0"),
        ([{"text": 3, "label": 0}], r"row 0 holds no text.*found int"),
        ([{"text": None, "label": 0}], "found NoneType"),
        ([{"sentence": "a", "label": 0}], "no column 'text'.*'sentence', 'label'"),
        ([{"text": "a"}], "no column 'label'"),
        (["a"], "no named columns"),
    ],
)
def test_unusable_data(task, rows, message):
    with pytest.raises(DataError, match=message):
        task.validate(rows)
    with pytest.raises(DataError, match=message):
        task.prepare(rows)


def test_columns_of_a_hugging_face_data_set(task):
    datasets = pytest.importorskip("datasets")
    rows = texts(5)
    data = datasets.Dataset.from_list(rows)
    assert task.prepare(data) == task.prepare(rows)
    assert task.prepare(data.with_format("torch")).rows == task.prepare(rows).rows
    with pytest.raises(DataError, match=r"no column 'text'.*'words', 'label'"):
        task.validate(data.rename_column("text", "words"))


def test_a_label_beyond_the_model_is_found_when_the_task_does_not_know(bert, tokenizer):
    task = TextClassification(tokenizer)
    rows = [{"text": "good", "label": 2}]
    with pytest.raises(DataError, match="0 to 1, found 2"):
        Trainer(task, rows, Training()).train(bert, seed=0)
    with pytest.raises(DataError, match="0 to 1, found 2"):
        evaluate(bert, task, rows)


def test_a_tokenizer_without_padding_is_refused(tokenizer):
    class NoPad:
        pad_token_id = None

    with pytest.raises(ConfigurationError, match="padding"):
        TextClassification(NoPad())
    with pytest.raises(ConfigurationError, match="max_length"):
        TextClassification(tokenizer, max_length=0)


def test_bf16_loss_is_float32(bert, task):
    bert.bfloat16().train()
    loss = task.loss(bert, task.collate(task.prepare(texts(4)).rows))
    assert loss.dtype == torch.float32


def test_the_room_needs_no_transformers():
    code = (
        "import fedveil.training, sys;"
        "assert not {'transformers', 'datasets', 'flwr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestF1:
    """Of GLUE's MRPC and QQP; the oracle counts pairs of label and finding one by one."""

    @staticmethod
    def of_class(number, labels, found):
        pairs = list(zip(labels, found, strict=True))
        right = pairs.count((number, number))
        if not right:
            return 0.0
        precision, recall = right / found.count(number), right / labels.count(number)
        return 100 * 2 * precision * recall / (precision + recall)

    def measured(self, labels, found, classes):
        class Fixed(Classification):
            name = "fixed"

            def prepare(self, data):
                return Prepared(data)

            def collate(self, rows):
                label, scores = zip(*rows, strict=True)
                return {"labels": torch.tensor(label), "scores": torch.tensor(scores)}

            def logits(self, model, batch):
                return batch["scores"]

        scores = torch.eye(classes).tolist()
        rows = [(label, scores[number]) for label, number in zip(labels, found, strict=True)]
        task = Fixed(label="label", num_labels=classes)
        return evaluate(torch.nn.Identity(), task, rows, batch_size=3)["f1"]  # type: ignore[arg-type]

    @given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1))
    def test_of_two_classes_is_that_of_the_second(self, pairs):
        labels, found = map(list, zip(*pairs, strict=True))
        assert self.measured(labels, found, 2) == pytest.approx(self.of_class(1, labels, found))

    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
    def test_of_more_is_the_mean_over_those_that_occur(self, pairs):
        labels, found = map(list, zip(*pairs, strict=True))
        each = [self.of_class(number, labels, found) for number in {*labels, *found}]
        assert self.measured(labels, found, 4) == pytest.approx(sum(each) / len(each))


def test_texts_longer_than_roberta_reads_are_refused(tokenizer):
    transformers = pytest.importorskip("transformers")
    # Of its 20 places the first two are not for tokens: it counts from beyond the padding token.
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config)
    rows = [{"text": "word " * 40, "label": 0}]
    evaluate(model, TextClassification(tokenizer, max_length=18), rows)
    with pytest.raises(DataError, match=r"longer than the model.*at most 18 tokens.*19"):
        evaluate(model, TextClassification(tokenizer, max_length=19), rows)
