"""Models, tokenizers and data by name or file, shares for a simulation's clients, demo corpora.

Needs the `hf` extra, but only when a function is called. Nothing here is part of the protocol:
in a real federation each client loads its own data, and no function sees them all.
"""

from fedveil.hub.demo import (
    bbc_headlines,
    bbc_news,
    minilm_folder,
    mnist_5k,
    smollm2_folder,
)
from fedveil.hub.labels import encode_labels, in_order, is_whole_number
from fedveil.hub.loading import load_data
from fedveil.hub.partitioning import partition

__all__ = [
    "bbc_headlines",
    "bbc_news",
    "encode_labels",
    "in_order",
    "is_whole_number",
    "load_data",
    "minilm_folder",
    "mnist_5k",
    "partition",
    "smollm2_folder",
]
