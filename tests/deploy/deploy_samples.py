"""An owner's file, and the deployment that is made of it."""

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
