"""Whether the folders that a file names fit together, as far as can be told without weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedveil.config.classes import settled_classes
from fedveil.config.file import Config
from fedveil.config.sources import class_names, is_file, load_source
from fedveil.config.tokenizers import check_length, check_vocabulary, tokenizer_name
from fedveil.errors import ConfigurationError
from fedveil.hub.classes import check_public_order
from fedveil.hub.library import quiet, quiet_transformers
from fedveil.hub.models import architecture_class
from fedveil.hub.names import explained, place_of
from fedveil.hub.settings import RANDOM, is_function
from fedveil.hub.tokenizers import load_tokenizer

__all__ = ["check_folders", "settings_of"]

_WEIGHTS = ("*.safetensors", "*.bin")


def settings_of(config: Config, name: str) -> dict[str, Any] | None:
    """What the config.json in a local folder says; None of what is no such folder.

    Raises:
        ConfigurationError: It cannot be read.
    """
    if is_function(name) or name == RANDOM:
        return None
    file = Path(place_of(name, config.path.parent)) / "config.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            "A model's settings cannot be read", found=str(error)[:200], where=str(file)
        ) from error
    return found if isinstance(found, dict) else None


def check_folders(config: Config) -> None:
    """Refuse what would be refused when models are loaded, of those that are local folders.

    That are weights that are not there, a head for other classes than the data have, a tokenizer
    that is absent or another model's, texts that are too long for it, and a public model of another
    architecture.

    Raises:
        FedveilError: The same as without a dry run.
    """
    own = settings_of(config, config.model.name)
    names = _classes(config)
    if own is not None:
        _check_weights(config, config.model.name)
        if config.data.has_classes:
            _check_head(config, own, names)
    if config.data.task != "image-classification":
        _check_tokenizer(config, own)
        if own is not None:
            check_length(_without_weights(config, config.model.name, len(names) or 2), config)
    public = config.model.public
    theirs = None if public is None else settings_of(config, public)
    if public is None or theirs is None:
        return
    _check_weights(config, public)
    if config.data.has_classes and not is_function(config.model.name):
        check_public_order(config.model, names, config.path.parent)
    if own is not None:
        _check_alike(config, public, config.model.num_labels or len(names) or 2)


def _classes(config: Config) -> list[str]:
    """The classes of local rows, in order; none if the rows are elsewhere, and nobody says."""
    data, sources = config.data, [*config.clients.values()]
    if not data.has_classes:
        return []
    if data.labels is not None:
        return settled_classes(config, data.labels)
    sources = sources or ([] if data.train is None else [data.train])
    if not sources or not all(is_file(config, source) for source in sources):
        return []
    with quiet():
        rows = {source: load_source(config, source, data.train_split) for source in sources}
    return settled_classes(config, class_names(rows, data.label, config.model.num_labels))


def _check_weights(config: Config, name: str) -> None:
    place = Path(place_of(name, config.path.parent))
    if not any(any(place.glob(pattern)) for pattern in _WEIGHTS):
        raise ConfigurationError(
            "There are no weights in the model's folder",
            expected=" or ".join(_WEIGHTS),
            found=", ".join(sorted(path.name for path in place.iterdir())[:8]),
            where=str(place),
        )


def _check_head(config: Config, settings: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse a head for another number of classes, if there is one and it is to stay."""
    wanted = config.model.num_labels or len(names)
    kinds = settings.get("architectures") or ()
    has_head = any("Classification" in str(kind) for kind in kinds)
    if not wanted or config.model.new_head or not has_head:
        return
    # What transformers leaves out of the file are two classes.
    found = len(settings.get("id2label") or ()) or settings.get("num_labels", 2)
    if found != wanted:
        raise ConfigurationError(
            "The model has a head for another number of classes",
            expected=str(wanted),
            found=str(found),
            where=place_of(config.model.name, config.path.parent),
            fix=f"Set num_labels = {found} in [model] if rows lack some of its classes, or "
            "`new_head = true` to start with a new head.",
        )


def _check_tokenizer(config: Config, own: dict[str, Any] | None) -> None:
    name = tokenizer_name(config)
    if not Path(place_of(name, config.path.parent)).is_dir():
        return
    tokenizer = load_tokenizer(name, config.path.parent)
    size = None if own is None else own.get("vocab_size")
    check_vocabulary(tokenizer, size if isinstance(size, int) else None, config)


def _check_alike(config: Config, public: str, classes: int) -> None:
    """Refuse a public model whose tensors are of other shapes, or another family's."""
    mine, theirs = (_shapes(config, name, classes) for name in (config.model.name, public))
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise ConfigurationError(
                "The public model is of another architecture",
                expected=str(mine.get(name, "no such tensor")),
                found=str(theirs.get(name, "no such tensor")),
                where=name,
                fix="It is what your model was fine-tuned from.",
            )


def _shapes(config: Config, name: str, classes: int) -> dict[str, list[int]]:
    """Shapes of a model's tensors, by name."""
    state = _without_weights(config, name, classes).state_dict()
    return {name: [*tensor.shape] for name, tensor in state.items()}


def _without_weights(config: Config, name: str, classes: int) -> nn.Module:
    """The model that a folder describes, on the meta device."""
    place = place_of(name, config.path.parent)
    words = {"num_labels": classes} if config.data.has_classes else {}
    with quiet_transformers() as transformers, explained("model", place):
        settings = transformers.AutoConfig.from_pretrained(place, **words)
        with torch.device("meta"):
            kind = getattr(transformers, architecture_class(config.data.task))
            model: nn.Module = kind.from_config(settings)
    return model
