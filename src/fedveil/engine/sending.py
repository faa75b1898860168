"""How what clients have gets into processes of their own."""

from __future__ import annotations

import io
import pickle
import shutil
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

from torch import Tensor

from fedveil.errors import ConfigurationError

__all__ = ["bytes_of_tensors", "fits_shared_memory", "taken", "written_out"]

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  no file of ours: it is asked how much room it has
_SPARE = 2**20
"""Bytes of shared memory that others are left: Python's own locks are there, too."""


class _Nowhere(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


class _Census(pickle.Pickler):
    """Pickles all but tensors, of which it counts what they take; keeps nothing of either."""

    def __init__(self) -> None:
        super().__init__(_Nowhere(), protocol=pickle.HIGHEST_PROTOCOL)
        self._sizes: dict[int, int] = {}

    def persistent_id(self, one: Any) -> int | None:
        if not isinstance(one, Tensor):
            return None
        storage = one.untyped_storage()
        # Each is a file of its own there, of whole pages.
        self._sizes[storage.data_ptr()] = -(-storage.nbytes() // PAGESIZE) * PAGESIZE
        return 0

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())


def bytes_of_tensors(one: Any) -> int:
    """Bytes of shared memory for all tensors in something that is to be handed to processes.

    Raises:
        ConfigurationError: It cannot be: something in it is not picklable.
    """
    census = _Census()
    try:
        census.dump(one)
    except Exception as error:
        raise ConfigurationError(
            "What clients have cannot be handed to processes of their own",
            expected="a model, a task and data that pickle can write",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="Run it with workers=1. Or define classes and functions at the top of a module, "
            "and take away parametrizations (torch.nn.utils.parametrize.remove_parametrizations).",
        ) from error
    return census.nbytes


def written_out(one: Any) -> bytes:
    """Something as bytes, tensors and all, for a pipe to a process that this one has started."""
    return pickle.dumps(one, protocol=pickle.HIGHEST_PROTOCOL)


def taken(handed: Any) -> Any:
    """What :func:`written_out` was given; anything else as it is.

    Only for what came through this very program's own pipe, which Python reads in the same way:
    nothing of a message or a file ever gets here.
    """
    return pickle.loads(handed) if isinstance(handed, bytes) else handed  # noqa: S301


def fits_shared_memory(nbytes: int) -> bool:
    """Whether so many bytes can be shared between processes; True where nobody can tell.

    In containers there are often 64 MB of it, and a process that writes beyond them is killed.
    """
    try:
        return nbytes + _SPARE <= shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return True
