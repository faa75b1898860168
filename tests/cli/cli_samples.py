"""A tiny federation on disk: words, a random BERT, a file of rows."""

import json
import os
import random
import subprocess
import sys

TOPICS = {
    "business": ("bank", "stock", "market"),
    "politics": ("vote", "law", "party"),
    "sports": ("goal", "match", "team"),
}
FILLERS = ("the", "a", "of")

CONFIG = """
[model]
name = "bert"

[data]
train = "train.jsonl"
test = "test.jsonl"
max_length = 16

[partition]
how = "iid"
clients = 2

[scheme]
name = "fedqsn"

[training]
steps = 3
batch_size = 8
learning_rate = 3e-3

[evaluation]
proxies_every = 1

[federation]
rounds = 3
keep_messages = true
"""


def make_rows(count, seed):
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = sorted(TOPICS)[number % 3]
        words = draw.choices(TOPICS[label] + FILLERS, k=8)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_bert(folder, **changes):
    import torch
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sum(TOPICS.values(), ()), *FILLERS]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    settings = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 32,
        "initializer_range": 0.1,
    }
    config = transformers.BertConfig(**settings | changes)
    kind = transformers.BertForSequenceClassification if changes else transformers.BertModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


def write_home(folder):
    folder.mkdir(exist_ok=True)
    write_rows(folder / "train.jsonl", make_rows(48, seed=0))
    write_rows(folder / "test.jsonl", make_rows(30, seed=1))
    write_bert(folder / "bert")
    (folder / "federation.toml").write_text(CONFIG)
    return folder


def run_fedveil(*arguments, home, **environment):
    """Run `python -m fedveil` as a user would; everything it writes, as text."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"} | environment
    return subprocess.run(
        [sys.executable, "-m", "fedveil", *map(str, arguments)],
        cwd=home,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
