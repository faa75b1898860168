"""Model folders: tensors in safetensors shards, written whole or not at all, read by memory map.

The layout is Hugging Face's: ``model.safetensors`` alone if everything fits one shard, else
``model-00001-of-0000N.safetensors`` and ``model.safetensors.index.json``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedveil.errors import ConfigurationError, FedveilError
from fedveil.files import PRIVATE_FILE, PRIVATE_FOLDER, private_file, sync
from fedveil.ties import tied_names

__all__ = [
    "SHARD_BYTES",
    "Shards",
    "load_into",
    "model_files",
    "open_shards",
    "save_private",
    "save_shards",
    "whole_folder",
    "write_shards",
]

SHARD_BYTES: Final = 1_000_000_000
"""Most bytes of a shard that holds more than one tensor: what writing holds at most of tensors that
are made as they are asked for."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The only key: several would be written in a random order. Transformers asks for it.
_METADATA = {"format": "pt"}
_ENDING = ".safetensors"
_UNFINISHED, _REPLACED = "unfinished-", "replaced-"


class Shards(Mapping[str, Tensor]):
    """The tensors of a model folder, by name and shard by shard; :func:`open_shards` makes one.

    A tensor is a private map of its file: it takes memory only where it is read, and the system can
    take that back. What is written to a tensor never reaches the file, but whoever asks for the
    same tensor again may see it. Only the shard used last is kept open: tensors keep their own.

    Does NOT protect against a file that somebody cuts short while it is mapped, which ends the
    process; one that is replaced by renaming, as :func:`save_shards` does, does no harm.
    """

    def __init__(self, folder: Path, names: Mapping[str, str]) -> None:
        self._folder, self._names = folder, dict(names)
        self._last: tuple[str, Any] = ("", None)

    def __getitem__(self, name: str) -> Tensor:
        file = self._names[name]
        if self._last[0] != file:
            self._last = ("", None)  # closed before the next is opened
            self._last = (file, _open(self._folder / file))
        tensor: Tensor = self._last[1].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_shards(folder: str | Path) -> Shards:
    """Open a model folder without reading its tensors.

    Headers are checked: every file is there and as long as its header says, and the index names
    exactly the tensors that are in the shards.

    Args:
        folder: Holds ``model.safetensors``, or shards with their index.

    Raises:
        FedveilError: The folder holds no model, or a damaged one.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return Shards(folder, dict.fromkeys(_names_in(folder / SINGLE), SINGLE))
    index, names = _read_index(folder), dict[str, str]()
    for file in sorted(set(index.values())):
        held, wanted = _names_in(folder / file), {n for n, f in index.items() if f == file}
        if odd := sorted(wanted ^ set(held)):
            raise _damaged(
                "The index and a shard disagree about a tensor",
                folder / file,
                expected=f"{odd[0]!r} {'in it' if odd[0] in wanted else 'not in it'}",
                found="the opposite",
            )
        names |= dict.fromkeys(held, file)
    return Shards(folder, names)


def model_files(folder: str | Path) -> list[Path]:
    """The files of a model folder: the one, or the index and its shards in order.

    Raises:
        FedveilError: There is no model, or no readable index.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    shards = sorted(set(_read_index(folder).values()))
    return [folder / INDEX, *(folder / file for file in shards)]


def save_shards(
    tensors: Mapping[str, Tensor], folder: str | Path, *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Save tensors as a model folder: a folder of that name is whole, now and after a power cut.

    Args:
        tensors: By name; each tied tensor once, as :func:`fedveil.state.read_state` gives them. A
            mapping that makes its tensors as they are asked for is held one shard at a time.
        folder: An earlier one is replaced, with everything in it.
        shard_bytes: Most bytes of a shard; a larger tensor has one to itself.

    Returns:
        The files written. The same tensors give the same bytes.

    Does NOT protect: whoever can read the folder has the tensors.

    Raises:
        ConfigurationError: ``shard_bytes`` is below 1, or two tensors share memory or have no data.
        FedveilError: It could not be written (a full disk); an earlier one is untouched.
    """
    folder = Path(folder)
    with _explained(folder), whole_folder(folder) as aside:
        files = write_shards(tensors, aside, shard_bytes=shard_bytes)
    return [folder / file.name for file in files]


def load_into(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load a model folder into a model, tensor by tensor: never is there a second copy in memory.

    Tensors on the meta device (a model made under ``with torch.device("meta")``) become maps of the
    files instead and take no memory until they are read. Tied tensors need to be there once.

    Args:
        model: Changed in place.
        folder: As :func:`save_shards` or ``save_pretrained`` writes it.

    Returns:
        ``model``.

    Raises:
        FedveilError: The folder is damaged, or is of another model: names, shapes and dtypes must
            agree. Nothing was loaded then.
    """
    shards, own = open_shards(folder), model.state_dict(keep_vars=True)
    _check_unsaved(model, own)
    groups = list(dict.fromkeys(tied_names(own).values()))
    sources = {_source(names, shards, Path(folder)): names for names in groups}
    if unknown := sorted(shards.keys() - own.keys()):
        raise _misfit("The folder holds a tensor that the model has not", unknown[0], folder)
    for source, names in sources.items():
        _check_fit(own[names[0]], shards[source], source, folder)
    mapped: dict[str, Tensor] = {}
    with torch.no_grad():
        for source in sorted(sources, key=list(shards).index):
            target = own[sources[source][0]]
            if target.is_meta:
                mapped |= dict.fromkeys(sources[source], _in_place_of(target, shards[source]))
            else:
                target.copy_(shards[source])
    if mapped:
        model.load_state_dict(mapped, strict=False, assign=True)
    return model


def write_shards(
    tensors: Mapping[str, Tensor], folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write tensors into a folder that is there, under no name that it has yet.

    Nothing is synced and a failure leaves what was written: :func:`save_shards` sees to that.

    Args:
        tensors: As for :func:`save_shards`.
        folder: Where to.
        shard_bytes: As for :func:`save_shards`.

    Returns:
        The files written: shards in order, then the index if there is one.

    Raises:
        ConfigurationError: ``shard_bytes`` is below 1, or two tensors share memory or have no data.
        OSError, SafetensorError: It could not be written.
    """
    if not isinstance(shard_bytes, int) or isinstance(shard_bytes, bool) or shard_bytes < 1:
        raise ConfigurationError(
            "The setting 'shard_bytes' is impossible",
            expected="an integer of at least 1",
            found=repr(shard_bytes),
        )
    _check_savable(tensors)
    parts: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _divide(tensors, shard_bytes):
        # How many there will be is known at the end: they get their names then.
        part = folder / f"part-{len(parts) + 1:05d}"
        save_private(shard, part)
        parts.append((part, list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(parts) == 1:
        return [parts[0][0].rename(folder / SINGLE)]
    files, index = [], dict[str, str]()
    for number, (part, names) in enumerate(parts, start=1):
        file = part.rename(folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors")
        files.append(file)
        index |= dict.fromkeys(names, file.name)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    with private_file(folder / INDEX) as index_file:
        index_file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    return [*files, folder / INDEX]


def save_private(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file that only its owner may read, whatever the library makes of it.

    Raises:
        OSError, SafetensorError: It could not be written.
    """
    private_file(path).close()  # it has its mode before it has any content
    save_file(dict(tensors), path, metadata=_METADATA)
    path.chmod(PRIVATE_FILE)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``folder`` when all went well, safely on disk by then.

    Only its owner may enter it, or read what is in it, whoever wrote that, and with what umask.
    A crash inside leaves ``folder`` as it was, and beside it what was unfinished, which the next
    try removes; an error leaves nothing. While an earlier folder is replaced there is a moment when
    it is called ``replaced-...`` and the new one ``unfinished-...``, both whole.

    Raises:
        OSError: It cannot be made, synced or put in place.
    """
    aside = folder.with_name(_UNFINISHED + folder.name)
    earlier = folder.with_name(_REPLACED + folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(mode=PRIVATE_FOLDER, parents=True)
    try:
        yield aside
        for path in sorted(path for path in aside.rglob("*") if not path.is_symlink()):
            path.chmod(PRIVATE_FOLDER if path.is_dir() else PRIVATE_FILE)
            sync(path)
        sync(aside)
        if folder.exists():
            shutil.rmtree(earlier, ignore_errors=True)
            folder.rename(earlier)
        aside.rename(folder)
        sync(folder.parent)
    except Exception:
        if not folder.exists() and earlier.exists():
            earlier.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _divide(tensors: Mapping[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in their order, as many in a shard as fit; a shard is forgotten before the next."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name in tensors:
        tensor = tensors[name].detach()
        if shard and size + tensor.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    yield shard


def _check_savable(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tied tensors under two names, which safetensors refuses too, but shard by shard."""
    if not isinstance(tensors, dict):
        return  # made as they are asked for
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ConfigurationError("A tensor has no data", where=name)
    # Others are copied to be contiguous: a copy shares nothing.
    extents = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name)
        for name, tensor in tensors.items()
        if tensor.numel() and tensor.is_contiguous()
    )
    for (_, end, one), (start, _, other) in pairwise(extents):
        if start < end:
            raise ConfigurationError(
                "Two tensors share memory",
                found=" and ".join(map(repr, sorted((one, other)))),
                fix="Save each once: fedveil.state.read_state(model) leaves tied copies out.",
            )


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name.

    Raises:
        FedveilError: There is none, or it cannot be what was written.
    """
    path = folder / INDEX
    if not path.is_file():
        raise FedveilError(
            "The folder holds no model",
            expected=f"{SINGLE} or {INDEX}",
            found="neither" if folder.is_dir() else "no such folder",
            where=str(folder),
            fix="Name a folder that save_shards or save_pretrained has written.",
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged("The index cannot be read", path, found=f"{error!r}"[:200]) from error
    if not isinstance(index, dict):
        raise _damaged("The index names no tensors", path, found=type(index).__name__)
    for name, file in index.items():
        # A path could lead out of the folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(_ENDING):
            raise _damaged(
                "The index names no file of this folder", path, found=f"{file!r} for {name!r}"
            )
    return index


def _open(path: Path) -> Any:
    """A file's header, checked against its length by safetensors; its tensors are maps.

    Raises:
        FedveilError: It is not there, or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise _damaged("A file is missing", path) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(
            "A file is cut off or altered", path, found=f"{type(error).__name__}: {error}"[:200]
        ) from error


def _names_in(path: Path) -> list[str]:
    return list(_open(path).keys())


def _damaged(problem: str, path: Path, *, expected: str = "", found: str = "") -> FedveilError:
    return FedveilError(
        problem, expected=expected, found=found, where=str(path),
        fix="Fetch or save the folder again.",
    )  # fmt: skip


def _source(names: Sequence[str], shards: Shards, folder: Path) -> str:
    """The name under which a tensor of the model is in the folder.

    Raises:
        FedveilError: Under none, or under several with different values.
    """
    found = [name for name in names if name in shards]
    if not found:
        raise _misfit("The folder lacks a tensor of the model", names[0], folder)
    for other in found[1:]:
        if not torch.equal(shards[found[0]], shards[other]):
            raise _misfit(f"The folder holds another value of the tied {found[0]!r}", other, folder)
    return found[0]


def _check_fit(own: Tensor, found: Tensor, name: str, folder: str | Path) -> None:
    wanted, held = (f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in (own, found))
    if wanted != held:
        raise FedveilError(
            "A tensor of the folder does not fit the model",
            expected=wanted,
            found=held,
            where=f"{name}, {folder}",
            fix="Make the model as it was saved; model.to(dtype) gives it the folder's dtype.",
        )


def _check_unsaved(model: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Buffers that no folder holds need data of their own."""
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in own:
            raise FedveilError(
                "A buffer that is never saved has no data",
                where=name,
                fix="Make the model off the meta device, or fill this buffer afterwards.",
            )


def _in_place_of(own: Tensor, found: Tensor) -> Tensor:
    return nn.Parameter(found, own.requires_grad) if isinstance(own, nn.Parameter) else found


def _misfit(problem: str, name: str, folder: str | Path) -> FedveilError:
    return FedveilError(
        problem, where=f"{name}, {folder}", fix="Load it into the model that it was saved from."
    )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FedveilError(
            "The model could not be saved",
            found=str(error),
            where=str(folder),
            fix="Look for free space and the right to write there; what was there is untouched.",
        ) from error
