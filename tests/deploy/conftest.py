import datasets
import pytest
from deploy_samples import FILE, NET

import toys


@pytest.fixture(autouse=True)
def settings(tmp_path_factory, monkeypatch):
    """A home for a client's approvals, which is not that of whoever runs the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))


@pytest.fixture
def folder(tmp_path):
    """An owner's file, model and test set."""
    (tmp_path / "net.py").write_text(NET)
    rows = [{"image": r["image"].tolist(), "label": r["label"]} for r in toys.rows(20)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    text = FILE.format(model="net:build", task="image-classification")
    (tmp_path / "federation.toml").write_text(text)
    return tmp_path
