"""An owner's file, and the deployment that is made of it."""

import datasets

import toys

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 3))
"""
FILE = """
[model]
name = "{model}"
[data]
task = "{task}"
test = "test.parquet"
labels = ["0", "1", "2"]
[scheme]
units = "neurons"
client_mask = 0.25
[training]
steps = 3
batch_size = 8
[partners]
names = ["clinic-1", "clinic-2"]
"""


def put_rows(folder, seed):
    """Give a client's folder data, and name them in its file."""
    rows = [{"image": r["image"].tolist(), "label": r["label"]} for r in toys.rows(12, seed=seed)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    toml = folder / "partner.toml"
    toml.write_text(toml.read_text().replace("data.csv", "data.parquet"))
