"""Reads a model file that somebody has published, and finds a run's tensors in it.

The file is a stranger's: nothing in it is ever unpickled or run, and tensors are read one by one.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedveil.errors import AuditError, FedveilError
from fedveil.run.manifest import Manifest
from fedveil.shards import Shards, open_shards

__all__ = ["fit", "read_model"]

_PICKLED = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib"}
_CONVERT = (
    "Convert it where it can do no harm (a machine without a network): "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
)
_BROKEN = (zipfile.BadZipFile, zlib.error)
_DENSEST, _SMALL = 100, 10_000_000
_ENOUGH = 0.5
"""Share of the elements of all cut tensors that a file must have, to be called the same network."""


def read_model(path: str | Path) -> Mapping[str, Tensor]:
    """Open a published model without reading its tensors.

    Args:
        path: A .safetensors file, a folder as Hugging Face saves it (safetensors, in shards or
            not), or an .npz file of arrays.

    Returns:
        Its tensors by name, read as they are asked for.

    Does NOT protect against a file that is cut short while it is read: see
    :class:`fedveil.shards.Shards`.

    Raises:
        FedveilError: It is not there, damaged, or of a format that would have to be unpickled.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FedveilError(
            "The model file is not there", expected="a file or folder", where=str(path)
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _Arrays(path)
    if path.suffix in _PICKLED:
        raise _pickled(path)
    raise FedveilError(
        "The model file is of an unknown format",
        expected=".safetensors, .npz, or a folder with model.safetensors",
        found=path.suffix or "no suffix",
        where=str(path),
        fix="Convert it to safetensors.",
    )


def fit(
    tensors: Mapping[str, Tensor], manifest: Manifest, what: str, *, whole: bool = True
) -> dict[str, Tensor]:
    """Find the tensors that a run's masks cut among those of a file.

    Names may have other first parts, as wrappers add them ("module.", "base_model.model.") or
    leave them out ("bert."); other tensors, another head for instance, may be there or missing. An
    axis that is cut may be shorter: units can be left out of a file altogether.

    Args:
        tensors: Of the file.
        manifest: Of the run.
        what: What the file is called in errors.
        whole: Whether cut axes must have their full length, as in a base.

    Returns:
        The file's tensors by the run's names, with the run's number of axes.

    Raises:
        AuditError: Too little of the run's network is in it: it is of another architecture.
    """
    wanted = _cut_axes(manifest)
    best: dict[str, str] = {}
    for strip, lead in itertools.product(_leads(tensors), _leads(wanted)):
        names = {name: strip + name[len(lead) :] for name in wanted if name.startswith(lead)}
        # Shapes wait for the end: reading them may mean reading the tensors.
        there = {name: theirs for name, theirs in names.items() if theirs in tensors}
        if len(there) > len(best):
            best = there
        if len(best) == len(wanted):
            break
    found: dict[str, Tensor] = {}
    misfit = ""
    for name, theirs in best.items():
        tensor, shape = tensors[theirs], manifest.tensors[name].shape
        axes = frozenset[int]() if whole else wanted[name]
        if tensor.is_floating_point() and _fits(tuple(tensor.shape), shape, axes):
            found[name] = tensor
        else:
            misfit = misfit or f"{theirs} {list(tensor.shape)} for {list(shape)}"
    size = {name: manifest.tensors[name].numel for name in wanted}
    if sum(size[name] for name in found) < _ENOUGH * sum(size.values()):
        raise _foreign(wanted, best, misfit, tensors, what)
    return found


def _cut_axes(manifest: Manifest) -> dict[str, frozenset[int]]:
    """The axes that are cut, per tensor of weights that any mask cuts."""
    axes: dict[str, set[int]] = {}
    for group in manifest.groups:
        for part in group.slices:
            if part.tensor in manifest.tensors and manifest.tensors[part.tensor].is_floating_point:
                axes.setdefault(part.tensor, set()).add(part.axis)
    return {name: frozenset(found) for name, found in axes.items()}


def _leads(names: Mapping[str, object]) -> list[str]:
    """First parts of names, up to three components, that could be a wrapper's; "" foremost."""
    leads = {""}
    for name in names:
        parts = name.split(".")
        leads |= {".".join(parts[:n]) + "." for n in range(1, min(4, len(parts)))}
    # A model has few first parts and many third ones: numbers of layers are no wrappers.
    leads = {lead for lead in leads if not any(part.isdigit() for part in lead.split("."))}
    return sorted(leads, key=lambda lead: (lead.count("."), lead))[:64]


def _fits(found: tuple[int, ...], full: tuple[int, ...], cut: frozenset[int]) -> bool:
    return len(found) == len(full) and all(
        one == other or (axis in cut and 0 < one < other)
        for axis, (one, other) in enumerate(zip(found, full, strict=True))
    )


def _foreign(
    wanted: Mapping[str, object],
    best: Mapping[str, str],
    misfit: str,
    tensors: Mapping[str, Tensor],
    what: str,
) -> AuditError:
    missing = next((name for name in wanted if name not in best), "")
    adapter = any("lora_" in name for name in tensors)
    return AuditError(
        f"{what} is of another architecture than the run",
        expected=f"at least half of the weights of {len(wanted)} tensors that masks cut",
        found=misfit or f"no {missing}" if tensors else "no tensors",
        where=what,
        fix="Merge the adapter into its model first." if adapter else "Give a file of this model.",
    )


def _read_folder(folder: Path) -> Mapping[str, Tensor]:
    names = {path.name for path in folder.iterdir()}
    if not names & {"model.safetensors", "model.safetensors.index.json"}:
        pickled = sorted(name for name in names if Path(name).suffix in _PICKLED)
        if pickled:
            raise _pickled(folder / pickled[0])
        loose = sorted(name for name in names if name.endswith(".safetensors"))
        if len(loose) == 1:
            return _read_safetensors(folder / loose[0])
    return open_shards(folder)


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return Shards(path.parent, dict.fromkeys(names, path.name))


class _Arrays(Mapping[str, Tensor]):
    """The numeric arrays of an .npz file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # Opened here: numpy would leave a file open that it cannot read.
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                self._names = list(file.files)
        except (OSError, ValueError, *_BROKEN) as error:
            raise _damaged(path, error) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        self._check_density(name)
        try:
            with self._path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                return torch.from_numpy(np.ascontiguousarray(file[name]))
        except (OSError, ValueError, TypeError, MemoryError, *_BROKEN) as error:
            raise _damaged(self._path, error, name) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _check_density(self, name: str) -> None:
        """Refuse what would fill the memory: few bytes that unpack to very many."""
        with zipfile.ZipFile(self._path) as file:
            entry = {info.filename.removesuffix(".npy"): info for info in file.infolist()}[name]
        if entry.file_size > max(_DENSEST * entry.compress_size, _SMALL):
            raise FedveilError(
                "An array unpacks to far more bytes than weights ever do",
                expected=f"at most {_DENSEST} times its {entry.compress_size} bytes",
                found=f"{entry.file_size} bytes",
                where=f"{self._path}, {name}",
            )


def _pickled(path: Path) -> FedveilError:
    return FedveilError(
        "The model file may be a pickle, which runs its maker's code when it is opened",
        expected=".safetensors, .npz, or a folder with model.safetensors",
        found=path.suffix,
        where=str(path),
        fix=_CONVERT,
    )


def _damaged(path: Path, error: Exception, name: str = "") -> FedveilError:
    return FedveilError(
        "The model file is damaged, or not what its name says",
        found=f"{type(error).__name__}: {error}"[:200],
        where=f"{path}, {name}" if name else str(path),
        fix="Fetch the file again.",
    )
