import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil import Bounds, ConfigurationError, Evaluation, FedAvg, FedQSN, RegMean, Training
from fedveil.config import load_config

BASE: dict[str, dict[str, Any]] = {
    "model": {"name": "models/bert"},
    "data": {"train": "train.csv"},
    "partition": {"clients": 4},
}


def as_toml(tables):
    lines = []
    for table, values in tables.items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {spell(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def spell(value):
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(spell, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {spell(inner)}' for key, inner in value.items())}}}"
    return repr(value)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")

    def run(text=None, **tables):
        path = folder / "federation.toml"
        path.write_text(text if text is not None else as_toml(BASE | tables))
        return load_config(path)

    return run


def refusal(read, text=None, **tables):
    with pytest.raises(ConfigurationError) as caught:
        read(text, **tables)
    return str(caught.value)


def test_least_file_has_the_defaults_of_the_library(read):
    config = read()
    assert config.scheme == FedQSN.once()
    assert config.training == Training()
    assert config.evaluation == Evaluation()
    assert config.scheme_name == "fedqsn-once"
    assert config.model.dtype == "float32"
    assert config.federation.workers == 1


def test_paths_are_relative_to_the_file(read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = read(federation={"secret_file": "keys/s", "out": "../elsewhere"})
    assert config.secret_path == config.path.parent / "keys" / "s"
    assert config.out == config.path.parent / ".." / "elsewhere"
    assert read().out == config.path.parent / "runs" / "federation"
    assert read(federation={"out": "/tmp/x"}).out.as_posix() == "/tmp/x"


def test_scheme_and_preset(read):
    assert read(scheme={"name": "fedavg", "update_bits": 8}).scheme == FedAvg(update_bits=8)
    config = read(scheme={"preset": "paper", "client_mask": 0.5})
    assert config.scheme == FedQSN.paper(client_mask=0.5)
    assert config.scheme_name == "fedqsn-paper"


def test_none_in_words_and_arrays_for_tuples(read):
    assert read(scheme={"bits": "none"}).scheme.bits is None
    training = read(training={"max_grad_norm": "none", "frozen": ["a.*", "b"]}).training
    assert training.max_grad_norm is None
    assert training.frozen == ("a.*", "b")


def test_clients_by_file(read):
    text = '[model]\nname = "m"\n[clients]\nnorth = "n.csv"\nsouth = "s.csv"\n'
    config = read(text)
    assert config.clients == {"north": "n.csv", "south": "s.csv"}
    assert config.partition is None


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"scheme": {"clent_mask": 0.2}}, ["[scheme]", "'clent_mask'", "mean 'client_mask'?"]),
        ({"training": {"learningrate": 1.0}}, ["[training]", "'learning_rate'"]),
        ({"evaluation": {"evry": 1}}, ["[evaluation]", "'every'"]),
        ({"federation": {"round": 1}}, ["[federation]", "'rounds'"]),
        ({"schema": {}}, ["table 'schema'", "'scheme'"]),
        ({"scheme": {"name": "fedqns"}}, ["scheme 'fedqns'", "'fedqsn'"]),
        ({"scheme": {"preset": "papr"}}, ["[scheme] preset", "'paper'", "'papr'"]),
        ({"scheme": {"name": "fedavg", "preset": "paper"}}, ["none at all"]),
        ({"scheme": {"client_mask": "half"}}, ["[scheme] client_mask", "number", "'half'"]),
        ({"scheme": {"client_mask": 1.5}}, ["[scheme]", "1.5"]),
        ({"scheme": {"bits": 5}}, ["[scheme]", "5"]),
        ({"scheme": {"policy": "frech"}}, ["[scheme] policy", "'fresh'", "'frech'"]),
        ({"scheme": {"unbiased": 1}}, ["[scheme] unbiased", "true or false"]),
        ({"training": {"steps": 2, "epochs": 2}}, ["[training]", "at most one"]),
        ({"training": {"steps": True}}, ["[training] steps", "whole number", "True"]),
        ({"training": {"frozen": "a"}}, ["[training] frozen", "array"]),
        ({"evaluation": {"proxies": -1}}, ["[evaluation]", "-1"]),
        ({"federation": {"rounds": 0}}, ["[federation] rounds", "at least 1"]),
        ({"federation": {"seed": -1}}, ["[federation] seed"]),
        (
            {"federation": {"keep_messages": "proxy"}},
            ["[federation] keep_messages): expected true or false or 'proxies', found 'proxy'"],
        ),
        ({"federation": {"clients_per_round": 5}}, ["clients_per_round", "at most 4", "5"]),
        ({"partition": {"how": "iid"}}, ["[partition] clients"]),
        ({"partition": {"clients": 4, "alpha": 0}}, ["[partition] alpha"]),
        ({"partition": {"clients": 4, "how": "uniform"}}, ["[partition] how", "'dirichlet'"]),
        ({"data": {}}, ["none of them"]),
        ({"clients": {"a": "a.csv"}}, ["train and [clients]"]),
        ({"data": {}, "clients": {"a": 3}}, ["[clients] a"]),
        ({"partners": {"names": ["a"]}}, ["train and [partners]"]),
        ({"data": {}, "partners": {"names": ["a"]}}, ["[data] labels", "number classes alike"]),
        ({"data": {}, "partners": {"names": []}}, ["[partners] names"]),
        ({"data": {}, "partners": {"names": ["a"], "quorum": 0}}, ["[partners] quorum"]),
        ({"data": {}, "partners": {"names": ["a"], "deadlin": 1.0}}, ["'deadline'"]),
        ({"partner": {"name": "a"}}, ["[data] labels"]),
        ({"partner": {"threads": 2}}, ["[partner] name"]),
        ({"model": {}}, ["[model] name", "missing"]),
        ({"model": {"name": "m", "dtype": "float8"}}, ["[model] dtype", "'float16'"]),
        ({"data": {"train": "a.csv", "task": "speech"}}, ["[data] task", "'image-classification'"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_named(read, tables, words):
    message = refusal(read, **tables)
    assert "federation.toml" in message
    assert all(word in message for word in words), message


def test_all_problems_come_at_once(read):
    message = refusal(
        read, scheme={"bit": 4}, federation={"rounds": "two"}, training={"steps": 0}, extra={}
    )
    assert message.startswith("federation.toml has 4 problems:\n")
    assert all(word in message for word in ("'bits'", "rounds", "steps", "'extra'"))


def test_top_level_values(read):
    assert "'rounds'" in refusal(read, 'rounds = 3\n[model]\nname = "m"\n')
    assert "Not a table" in refusal(read, 'model = "m"\n')


def test_file_that_cannot_be_read(tmp_path, read):
    with pytest.raises(ConfigurationError, match="no such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_config(tmp_path)
    assert "not TOML" in refusal(read, "[model\n")
    (tmp_path / "latin.toml").write_bytes(b'[model]\nname = "\xe9"\n')
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_config(tmp_path / "latin.toml")


def test_change_is_checked_and_leaves_the_rest(read):
    config = read(federation={"rounds": 7, "seed": 3})
    changed = config.change(rounds=2, workers=None)
    assert (changed.federation.rounds, changed.federation.seed) == (2, 3)
    assert config.federation.rounds == 7
    with pytest.raises(ConfigurationError, match="workers"):
        config.change(workers=0)


rates = st.floats(0, 0.99)
aggregations = st.just("mean") | st.builds(
    RegMean,
    off_diagonal=st.floats(0, 1),
    ridge=st.floats(0, 10),
    form=st.sampled_from(["blocks", "low-rank"]),
    bits=st.sampled_from([None, 4, 8]),
    clip=st.none() | st.floats(0.1, 10),
)
schemes = st.builds(
    FedQSN,
    server_mask=rates,
    client_mask=rates,
    bits=st.sampled_from([None, 2, 3, 4, 8]),
    units=st.sampled_from(["mlp", "neurons", "columns"]),
    policy=st.sampled_from(["sticky", "fresh"]),
    draw=st.sampled_from(["exact", "bernoulli"]),
    unbiased=st.booleans(),
    merge=st.sampled_from(["original", "server"]),
    aggregation=aggregations,
)
trainings = st.builds(
    Training,
    steps=st.none() | st.integers(1, 999),
    batch_size=st.integers(1, 999),
    learning_rate=st.floats(1e-9, 10),
    warmup=st.floats(0, 1),
    max_grad_norm=st.none() | st.floats(1e-3, 100),
    frozen=st.lists(st.from_regex(r"[a-z.*]{1,8}", fullmatch=True), max_size=3).map(tuple),
)


@given(scheme=schemes, training=trainings)
def test_every_setting_survives_the_file(read, scheme, training):
    written = {"name": "fedqsn", **dataclasses.asdict(scheme)}
    config = read(scheme=written, training=dataclasses.asdict(training) | {"epochs": None})
    assert config.scheme == scheme
    assert config.training == training


def test_an_aggregation_is_a_word_or_a_table(read):
    assert read(scheme={"aggregation": "regmean"}).scheme.aggregation == RegMean()
    settings = {"name": "regmean", "ridge": 0.5}
    assert read(scheme={"aggregation": settings}).scheme.aggregation == RegMean(ridge=0.5)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("median", "aggregation"),
        ({"name": "regmaen"}, "regmean"),
        ({"name": "regmean", "rigde": 1}, "ridge"),
        ({"name": "regmean", "ridge": -1.0}, "ridge"),
    ],
)
def test_a_wrong_aggregation_is_named(read, value, named):
    assert named in refusal(read, scheme={"aggregation": value})


@given(key=st.from_regex(r"[a-z_]{1,12}", fullmatch=True), table=st.sampled_from(
    ["model", "data", "partition", "scheme", "training", "evaluation", "federation"]
))  # fmt: skip
def test_no_unknown_key_passes(read, key, table):
    unknown = f"zz_{key}"
    message = refusal(read, **{table: BASE.get(table, {}) | {unknown: 1}})
    assert f"[{table}]" in message
    assert repr(unknown) in message


@given(text=st.text(max_size=80))
def test_any_text_is_a_configuration_error(read, text):
    with pytest.raises(ConfigurationError):
        read(text.encode("utf-8", "ignore").decode())


class TestBounds:
    def read(self, folder, text):
        (folder / "f.toml").write_text(
            '[model]\nname = "m"\n[data]\ntrain = "t.csv"\n[partition]\nclients = 3\n' + text
        )
        return load_config(folder / "f.toml").bounds

    def test_are_those_of_the_library_unless_told(self, tmp_path):
        assert self.read(tmp_path, "") == Bounds()

    def test_are_read_with_none_for_none(self, tmp_path):
        text = '[bounds]\nweight = "none"\nnorm = 2\npull = 4.5\nmax_examples = 900\n'
        text += 'examples = { "client-00" = 40 }\n'
        expected = Bounds({"client-00": 40}, 900, weight=None, norm=2, pull=4.5)
        assert self.read(tmp_path, text) == expected

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("weight = 0.5", "'weight'"), ('norm = "many"', "norm"), ("wieght = 3", "Did you mean"),
            ("max_examples = 0", "max_examples"), ('examples = { "a" = 0 }', "examples.a"),
        ],
    )  # fmt: skip
    def test_that_are_impossible_are_refused(self, text, word, tmp_path):
        with pytest.raises(ConfigurationError, match=word):
            self.read(tmp_path, f"[bounds]\n{text}\n")
