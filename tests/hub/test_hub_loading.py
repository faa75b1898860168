import json
import os
import pathlib
import subprocess
import sys

import datasets
import pytest

from fedveil.errors import ConfigurationError, DataError
from fedveil.hub import load_data

ROWS = [
    {"text": 'a "quoted", text\nover two lines', "label": 1},
    {"text": "NA", "label": 0},
    {"text": "2020-01-02", "label": 1},
]


@pytest.fixture
def written(tmp_path):
    """The rows in every kind of file, written by the data library itself."""
    data = datasets.Dataset.from_list(ROWS)
    datasets.disable_progress_bars()
    try:
        data.to_csv(tmp_path / "rows.csv")
        data.to_json(tmp_path / "rows.jsonl")
        data.to_parquet(tmp_path / "rows.parquet")
    finally:
        datasets.enable_progress_bars()
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("as_type", [str, pathlib.Path])
def test_files_come_back_as_they_were(written, kind, as_type, capfd):
    loaded = load_data(as_type(written / f"rows.{kind}"))
    assert loaded.to_list() == ROWS
    assert capfd.readouterr() == ("", "")


def test_no_copy_of_private_rows_is_left_behind(written):
    for kind in ("csv", "jsonl", "parquet"):
        assert load_data(written / f"rows.{kind}").cache_files == []


def test_parquet_keeps_class_names(tmp_path):
    names = datasets.ClassLabel(names=["no", "yes"])
    data = datasets.Dataset.from_list(ROWS).cast_column("label", names)
    data.to_parquet(tmp_path / "rows.parquet")
    assert load_data(tmp_path / "rows.parquet").features["label"] == names


def test_an_empty_cell_is_a_missing_value(tmp_path):
    (tmp_path / "gap.csv").write_text("text,label\n,0\nnull,1\n")
    assert list(load_data(tmp_path / "gap.csv")["text"]) == [None, "null"]


@pytest.mark.parametrize(
    "content", ['[{"a": 1}, {"a": 2, "b": 3}]', '{"a": 1}\n\n{"a": 2, "b": 3}']
)
def test_records_may_differ_in_their_columns(tmp_path, content):
    path = tmp_path / ("rows.json" if content.startswith("[") else "rows.jsonl")
    path.write_text(content)
    assert load_data(path).to_list() == [{"a": 1, "b": None}, {"a": 2, "b": 3}]


def test_the_nearest_name_is_suggested(written):
    with pytest.raises(DataError, match=r"no such file.*Did you mean .*rows\.jsonl"):
        load_data(str(written / "row.jsonl"))
    with pytest.raises(DataError, match="Look in"):
        load_data(written / "nowhere" / "x.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"a", r"expected \.csv, .*found \.txt"),
        ("rows", b"a", "no suffix"),
        ("empty.csv", b"", "cannot be read"),
        ("header.csv", b"text,label\n", "empty"),
        ("broken.json", b"[{", "cannot be read"),
        ("mixed.json", b'[{"text": "a"}, {"text": 1}]', "cannot be read"),
        ("object.json", b'{"text": "a"}', "not a list of records"),
        ("strings.jsonl", b'"a"\n', "not a list of records"),
        ("none.jsonl", b"\n", "empty"),
        ("broken.parquet", b"PAR1", "cannot be read"),
        ("latin.csv", b"text,label\n\xa3,1\n", "cannot be read.*UnicodeDecodeError"),
    ],
)
def test_files_that_do_not_serve(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / name)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="folder"):
        load_data(tmp_path)


@pytest.mark.parametrize("options", [{"split": "test"}, {"config": "sst2"}])
def test_files_have_no_splits(written, options):
    with pytest.raises(ConfigurationError, match="no splits"):
        load_data(written / "rows.csv", **options)


def test_an_unreachable_hub_is_explained(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"owner/nothing.*local file"):
        load_data("owner/nothing")


def test_hub_names_are_passed_on(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_data("owner/some.v2", split="train[:10%]", config="x", revision="y")) == 3
    assert asked == [("owner/some.v2", "x", "train[:10%]", "y")]


def test_sets_that_are_made_by_a_program_are_pointed_to_their_rows(monkeypatch):
    def load_dataset(*args, **words):
        raise RuntimeError("Dataset scripts are no longer supported, but found nothing.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/nothing.*refs/convert/parquet"):
        load_data("owner/nothing")


def run(code, **environment):
    variables = {"HF_HUB_DISABLE_TELEMETRY", "FLWR_TELEMETRY_ENABLED", "HF_UPDATE_DOWNLOAD_COUNTS"}
    kept = {key: value for key, value in os.environ.items() if key not in variables}
    subprocess.run([sys.executable, "-c", code], check=True, env={**kept, **environment})


def test_usage_reports_are_off_but_may_be_asked_for():
    code = (
        "import sys, fedveil.hub; assert 'datasets' not in sys.modules\n"
        "from fedveil.hub.library import library\n"
        "library('flwr_datasets'); library('datasets')\n"
        "import huggingface_hub.constants as h, flwr_datasets.common.telemetry as f, datasets\n"
        "assert f.FLWR_TELEMETRY_ENABLED == {flower!r}, f.FLWR_TELEMETRY_ENABLED\n"
        "assert h.HF_HUB_DISABLE_TELEMETRY is True\n"
        "assert not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS\n"
    )
    run(code.format(flower="0"))
    run(code.format(flower="1"), FLWR_TELEMETRY_ENABLED="1")


def test_a_missing_extra_is_explained():
    run(
        "import sys; sys.modules['datasets'] = None\n"
        "from fedveil.hub import load_data\n"
        "from fedveil.errors import ConfigurationError\n"
        "try: load_data('x.csv')\n"
        "except ConfigurationError as e: assert 'pip install \"fedveil[hf]\"' in str(e), e\n"
        "else: raise SystemExit('no error')\n"
    )
