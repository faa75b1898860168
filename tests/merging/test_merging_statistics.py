"""The file of statistics: whole, altered, foreign, of another model."""

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merging_samples import EXACT, data_of, measured, task_of
from safetensors.torch import save_file
from torch import nn

from fedveil import RegMean
from fedveil.errors import ConfigurationError, DataError, FedveilError, ProtocolError
from fedveil.merging import MergeStatistics, merge, statistics_of
from fedveil.wire import Dense, Message, Statistics
from toys import NextToken, bert, gpt2, mlp, rows, same, texts, weights

MODEL = mlp(0)
LOW_RANK = RegMean(form="low-rank", size=8)


@pytest.fixture(params=["regmean", "fisher"], scope="module")
def statistics(request):
    return statistics_of(MODEL, rows(10), task=task_of(MODEL), method=request.param)


@pytest.mark.parametrize("settings", [RegMean(), EXACT, LOW_RANK], ids=["8 bit", "exact", "rank"])
@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_a_file_gives_the_same_result(tmp_path, build, method, settings):
    models = [build(seed) for seed in range(2)]
    given = measured(models, method, settings)
    for number, one in enumerate(given):
        one.save(tmp_path / f"{number}")
    read = [MergeStatistics.load(str(tmp_path / f"{number}")) for number in range(2)]
    assert [one.examples for one in read] == [12, 20]
    (result,) = merge(models, method=method, statistics=read, settings=settings)
    (expected,) = merge(models, method=method, statistics=given, settings=settings)
    assert same(weights(result), weights(expected))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_truncated_file_is_refused(statistics, tmp_path):
    data, path = statistics.message.to_bytes(), tmp_path / "cut"
    for size in (0, 1, 7, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(FedveilError, match="cut"):
            MergeStatistics.load(path)


@given(position=st.integers(0, 10**9), flip=st.integers(1, 255))
def test_an_altered_file_is_refused(position, flip):
    with pytest.raises(FedveilError):
        MergeStatistics(Message.from_bytes(_altered(position, flip)))


def _altered(position, flip):
    data = bytearray(_BYTES)
    data[position % len(data)] ^= flip
    return bytes(data)


_BYTES = statistics_of(MODEL, rows(6), task=task_of(MODEL)).message.to_bytes()


@pytest.mark.parametrize("kind", ["pickle", "weights", "proxy", "text", "folder", "missing"])
def test_a_foreign_file_is_one_clear_error(tmp_path, kind):
    path = tmp_path / "foreign"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "weights":
        save_file({"a": torch.zeros(3)}, path)
    elif kind == "proxy":
        message = Message("proxy", "fedqsn", 1, "clinic", {"a": Dense(torch.zeros(3))})
        path.write_bytes(message.to_bytes())
    elif kind == "text":
        path.write_text("text,label\n")
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(FedveilError, match="foreign"):
        MergeStatistics.load(path)


def changed(statistics, **changes):
    return MergeStatistics(dataclasses.replace(statistics.message, **changes))


@pytest.mark.parametrize(
    "scalars",
    [
        {"examples": 0}, {"examples": True}, {"examples": "5"}, {"model": 5},
        {"form": "round"}, {"form": 3}, {"size": 0}, {"size": 2.0}, {"bits": 5}, {"bits": False},
        {"bits": "8"},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_words_are_refused(scalars):
    message = Message.from_bytes(_BYTES)
    with pytest.raises(ProtocolError):
        changed(MergeStatistics(message), scalars={**message.scalars, **scalars})
    without = {k: v for k, v in message.scalars.items() if k not in scalars}
    with pytest.raises(ProtocolError):
        changed(MergeStatistics(message), scalars=without)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_statistics_of_another_architecture_are_refused(method):
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 80), nn.ReLU(), nn.Linear(80, 3))
    foreign = statistics_of(other, rows(8), task=task_of(other), method=method)
    own = measured([MODEL, mlp(1)], method)
    with pytest.raises(ProtocolError, match=r"another model.*statistics 2"):
        merge([MODEL, mlp(1)], method=method, statistics=[own[0], foreign])
    # Someone who claims that they are this model's gets no further.
    claimed = {**foreign.message.scalars, "model": own[1].message.scalars["model"]}
    with pytest.raises(ProtocolError, match="statistics 2"):
        merge(
            [MODEL, mlp(1)], method=method, statistics=[own[0], changed(foreign, scalars=claimed)]
        )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.full((96, 16), -1.0), "impossible"),
        (torch.full((96, 16), float("nan")), "impossible"),
        (torch.zeros(96, 15), "another shape"),
        (torch.zeros(96, 16).half(), "another shape or type"),
        (None, "one is missing"),
    ],
    ids=["negative", "nan", "shape", "dtype", "missing"],
)
def test_a_well_formed_fisher_file_of_poison_is_refused(values, words):
    given = measured([MODEL, mlp(1)], "fisher")
    sections = dict(given[0].message.sections)
    del sections["fisher/1.weight"]
    if values is not None:
        sections["fisher/1.weight"] = Statistics(values)
    with pytest.raises(ProtocolError, match=f"statistics 1.*{words}|{words}.*statistics 1"):
        merge(
            [MODEL, mlp(1)], method="fisher",
            statistics=[changed(given[0], sections=sections), given[1]],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gram/1.weight/diagonal", torch.full((16,), -1.0)),
        ("gram/1.weight/diagonal", torch.full((16,), float("inf"))),
        ("gram/1.weight/pairs", torch.full((1, 120), 3.0)),
        ("gram/1.weight/pairs", torch.zeros(1, 119)),
        ("weights/1.weight", torch.zeros(3)),
        ("gram/9.weight/diagonal", torch.zeros(3)),
    ],
)
def test_a_well_formed_gram_file_of_poison_is_refused(name, values):
    given = measured([MODEL, mlp(1)], "regmean")
    sections = {**given[0].message.sections, name: Statistics(values)}
    with pytest.raises(ProtocolError, match="statistics 1"):
        merge([MODEL, mlp(1)], statistics=[changed(given[0], sections=sections), given[1]])


def test_different_forms_are_refused():
    models = [mlp(0), mlp(1)]
    given = [measured(models, "regmean", s)[i] for i, s in enumerate((RegMean(), LOW_RANK))]
    with pytest.raises(
        ConfigurationError, match=r"different forms.*statistics 2.*low-rank of size 8"
    ):
        merge(models, statistics=given)


def test_different_bits_are_fine():
    models = [mlp(0), mlp(1)]
    given = [measured(models, "regmean", RegMean(bits=b))[i] for i, b in enumerate((None, 4))]
    assert len(merge(models, statistics=given)) == 1


def test_labels_make_no_difference(statistics):
    relabelled = [{**row, "label": 2 - row["label"]} for row in rows(10)]
    again = statistics_of(MODEL, relabelled, task=task_of(MODEL), method=statistics.method)
    assert again.message.to_bytes() == statistics.message.to_bytes()


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_no_more_examples_are_looked_at_than_asked_for(method):
    data, told = rows(40), []
    some = statistics_of(
        MODEL, data, task=task_of(MODEL), method=method, settings=RegMean(examples=10),
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    chosen = statistics_of(MODEL, data[::4], task=task_of(MODEL), method=method)
    assert some.message.to_bytes() == chosen.message.to_bytes()
    assert told[-1] == (10, 10)


def test_what_cannot_be_measured_is_one_clear_error():
    with pytest.raises(ConfigurationError, match=r"regmean or fisher.*'mean'"):
        statistics_of(MODEL, rows(4), task=task_of(MODEL), method="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="needs a task with classes"):
        statistics_of(gpt2(0), texts(4), task=NextToken(), method="fisher")
    with pytest.raises(DataError, match="empty"):
        statistics_of(MODEL, [], task=task_of(MODEL))
    embedding = nn.Sequential(nn.Flatten(), nn.LayerNorm(16))
    with pytest.raises(ConfigurationError, match="needs linear layers"):
        statistics_of(embedding, rows(4), task=task_of(embedding))


def test_padding_does_not_count():
    """Beside a longer text in the batch, or alone: the same statistics."""
    model = bert(0)
    long, short = data_of(model, 2)
    short = {**short, "text": " ".join(short["text"].split()[:2])}
    both = statistics_of(model, [long, short], task=_Padding(), settings=EXACT).grams(model)
    alone = [
        statistics_of(model, [one], task=_Padding(), settings=EXACT).grams(model)
        for one in (long, short)
    ]
    for name, gram in both.items():
        expected = (alone[0][name].diagonal + alone[1][name].diagonal) / 2
        torch.testing.assert_close(gram.diagonal, expected, rtol=1e-4, atol=1e-6)


class _PaddingTokenizer:
    pad_token_id = 0

    def __call__(self, batch, truncation=True, max_length=16):
        ids = [[int(word) for word in text.split()] for text in batch]
        return {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]}

    def pad(self, batch, return_tensors="pt"):
        width = max(len(row["input_ids"]) for row in batch)
        return {
            key: torch.tensor([row[key] + [0] * (width - len(row[key])) for row in batch])
            for key in batch[0]
        }


def _Padding():  # noqa: N802
    from fedveil.tasks import TextClassification

    return TextClassification(_PaddingTokenizer())
