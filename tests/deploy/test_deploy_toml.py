"""Settings that are written as TOML are read as they were, whatever texts are in them."""

import math
import tomllib
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import load_config
from fedveil.deploy import Address, write_deployment
from fedveil.deploy.files import to_toml
from fedveil.errors import ConfigurationError

TEXTS = st.text(st.characters(codec="utf-8"))
PLAIN = st.one_of(
    TEXTS, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False)
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
)


@given(st.dictionaries(TEXTS, st.dictionaries(TEXTS, VALUES, max_size=4), max_size=4))
def test_what_is_read_is_what_was_written(tables):
    assert tomllib.loads(to_toml(tables)) == tables


@dataclass(frozen=True)
class Bare:
    name = "mean"


@dataclass(frozen=True)
class Full:
    rate: float = 0.5
    limit: int | None = None
    name = "regmean"


def test_settings_classes_are_words_or_tables_and_none_is_left_out():
    written = to_toml({"t": {"a": Bare(), "b": Full(), "c": None, "d": (1, 2), "e": {"x.y": None}}})
    assert tomllib.loads(written) == {
        "t": {"a": "mean", "b": {"name": "regmean", "rate": 0.5}, "d": [1, 2], "e": {}}
    }
    assert math.isinf(tomllib.loads(to_toml({"t": {"x": math.inf}}))["t"]["x"])


@pytest.mark.parametrize("value", ["\ud800", object(), {1, 2}, [None]])
def test_what_toml_does_not_have_is_refused(value):
    with pytest.raises(ConfigurationError, match="cannot be written in TOML"):
        to_toml({"t": {"key": value}})


LABELS = [
    "👩\u200d💻 good",
    'a "quoted" \\ name',
    "two\nlines",
    "\x1b[31m\x7f\x00",
    "\u202e",
    "x" * 9999,
]


def test_a_clients_file_says_what_the_owners_does(folder):
    path = folder / "federation.toml"
    quoted = ", ".join(to_toml({"t": {"x": label}}).split(" = ", 1)[1].strip() for label in LABELS)
    text = path.read_text().replace('test = "test.parquet"', "")
    text = text.replace("net:build", "six_classes:build").replace(
        'labels = ["0", "1", "2"]', f"labels = [{quoted}]\nlabel = 'ä.b c'"
    )
    path.write_text(
        text.replace("[model]", f"[model]\nnum_labels = {len(LABELS)}").replace(
            "[training]", '[training]\nmax_grad_norm = "none"\nfrozen = ["*.a\\\\b"]'
        )
    )
    (folder / "six_classes.py").write_text(
        (folder / "net.py").read_text().replace("256, 3", "256, 6")
    )
    config = load_config(path)
    write_deployment(config, Address("fl.example.org"), folder / "deployment")
    theirs = load_config(folder / "deployment" / "clinic-1" / "partner.toml")
    assert theirs.data.labels == LABELS
    assert theirs.data.label == "ä.b c"
    assert theirs.training == config.training
    assert theirs.training.max_grad_norm is None
    flower = tomllib.loads((folder / "deployment/owner/flwr/config.toml").read_text())
    assert flower["superlink"]["owner"]["root-certificates"] == str(
        (folder / "deployment/owner/tls/ca.crt").absolute()
    )


def test_a_setting_is_in_the_line_of_its_name():
    written = to_toml({"t": {"a.b": {"c d": [1, "x"], "ä": {}}, "e": ["two\nlines"]}})
    assert written == '[t]\n"a.b" = { "c d" = [1, "x"], "ä" = {  } }\ne = ["two\\nlines"]\n'
