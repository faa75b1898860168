"""What an owner's files may not do on a client's machine: bring code, import, be unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedveil.errors import ConfigurationError
from fedveil.hub.settings import ModelTable

__all__ = ["refuse_code", "refuse_imports", "refuse_pickles"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_IMPORTS = "megatron_config"
"""The setting of an adapter with which PEFT imports a module that another setting names."""


def refuse_code(settings: Any, place: str) -> None:
    """Raise if a config.json or tokenizer_config.json names code that would come with it.

    Args:
        settings: Its content.
        place: The folder or hub name that it is of.

    Raises:
        ConfigurationError: It does: a class in a file of its own, or a kernel to be fetched.
    """
    if isinstance(settings, Mapping):
        kernel = str(settings.get("attn_implementation") or settings.get("_attn_implementation"))
        fetched = "/" in kernel
        if settings.get("auto_map") or fetched:
            raise ConfigurationError(
                "The model brings code of its own, which is not run here",
                expected="a model of a class that the installed transformers has",
                found=f"the kernel {kernel[:80]!r}" if fetched else '"auto_map"',
                where=place,
                fix="Ask the owner for a model without it.",
            )
        settings = list(settings.values())
    if isinstance(settings, list):
        for one in settings:
            refuse_code(one, place)


def refuse_pickles(folder: Path, wanted: str) -> None:
    """Raise for a folder whose weights only a pickle has; the hub's are refused by transformers."""
    if not folder.is_dir() or any(folder.glob(wanted)):
        return
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    raise ConfigurationError(
        "The model's weights are in no file that may be read here: nothing is unpickled",
        expected=wanted,
        found=", ".join(found[:3]) or "no weights",
        where=str(folder),
        fix="Whoever has the model converts it: save_pretrained(folder) writes safetensors.",
    )


def refuse_imports(table: ModelTable, folder: Path) -> None:
    """Raise for an adapter that names a module to import, or that is a pickle."""
    settings, where = table.lora, "[model.lora]"
    if table.adapter is not None:
        place = folder / Path(table.adapter).expanduser()
        where = str(place)
        if not (place / "adapter_config.json").is_file():
            return  # which is said where it is loaded
        refuse_pickles(place, "adapter_model.safetensors")
        try:
            settings = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigurationError(
                "An adapter's settings cannot be read", found=str(error)[:200], where=where
            ) from error
    if isinstance(settings, Mapping) and settings.get(_IMPORTS):
        raise ConfigurationError(
            "The adapter names a module to import, which is not done here",
            expected=f"no {_IMPORTS}",
            found=_IMPORTS,
            where=where,
        )
