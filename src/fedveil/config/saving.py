"""What a configured run leaves for its owner to use."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fedveil.config.file import Config
from fedveil.config.tokenizers import tokenizer_name
from fedveil.hub.library import quiet_transformers
from fedveil.hub.tokenizers import load_tokenizer
from fedveil.run.folder import RunFolder
from fedveil.shards import SHARD_BYTES, whole_folder, write_shards
from fedveil.state import read_state

__all__ = ["save_model"]


def save_model(config: Config, model: nn.Module) -> Path:
    """Save the model in its own format, or its tensors; a folder that is there is whole.

    Args:
        config: Of the run, whose folder it goes into.
        model: To be saved; with its tokenizer if it reads text.

    Raises:
        CheckpointError: A folder of that name is there that no run wrote.
    """
    folder = RunFolder(config.out).claim("model")
    with whole_folder(folder) as aside:
        if hasattr(model, "save_pretrained"):
            with quiet_transformers():
                model.save_pretrained(aside, max_shard_size=SHARD_BYTES)  # type: ignore[operator]
        else:
            write_shards(read_state(model), aside)
        if config.data.task != "image-classification":
            load_tokenizer(tokenizer_name(config), config.path.parent).save_pretrained(aside)
    return folder
