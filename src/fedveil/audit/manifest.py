"""What a run is about: the file ``run.json`` in its folder, from which it can be audited later."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedveil.errors import CheckpointError
from fedveil.files import read_record, write_whole
from fedveil.units import Slice, UnitGroup

__all__ = ["Manifest", "TensorInfo"]

FORMAT = 1
NAME = "run.json"


@dataclass(frozen=True)
class TensorInfo:
    """What everybody knows of one tensor.

    Attributes:
        dtype: In the owner's model, as "float32".
        shape: Whole, before anything is cut.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def is_floating_point(self) -> bool:
        """Whether it holds weights; counters and the like are nobody's secret."""
        return bool(getattr(torch, self.dtype).is_floating_point)


@dataclass(frozen=True)
class Manifest:
    """The architecture of a run, its units, and its configuration.

    Nothing in it is secret: the secret appears as its fingerprint, the base as a digest.

    Attributes:
        configuration: What decides the result; see :meth:`fedveil.Federation.configuration`.
        tensors: By name, each tied tensor once.
        groups: The unit groups that masks cut; none where everything is released whole.
        config_file: The TOML file that describes the run, if there is one.
    """

    configuration: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    groups: tuple[UnitGroup, ...] = ()
    config_file: str | None = None

    @classmethod
    def of(
        cls,
        state: Mapping[str, Tensor],
        groups: tuple[UnitGroup, ...],
        configuration: Mapping[str, Any],
        config_file: Path | None = None,
    ) -> Manifest:
        """The manifest of a run that is about to begin, with what it releases and trains."""
        tensors = {
            name: TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in state.items()
        }
        return cls(configuration, tensors, groups, str(config_file) if config_file else None)

    @property
    def is_of_public(self) -> bool:
        """Whether releases are of a public model, and hold nothing of the owner's."""
        return "public" in self.configuration

    @property
    def parameters(self) -> int:
        """Floating-point numbers in the model."""
        return sum(info.numel for info in self.tensors.values() if info.is_floating_point)

    def write(self, folder: Path) -> None:
        """Write ``run.json``, whole or not at all.

        Raises:
            CheckpointError: It cannot be written.
        """
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        write_whole(folder / NAME, text + "\n", CheckpointError)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a run.

        Raises:
            CheckpointError: There is none, or it is damaged or of another version.
        """
        absent = CheckpointError(
            "This is not the folder of a run",
            expected=f"a folder with a file {NAME}",
            where=str(folder),
            fix="Give the folder that the run was told to write to (out).",
        )
        return read_record(folder / NAME, FORMAT, cls._from_json, CheckpointError, absent)

    @classmethod
    def _from_json(cls, values: Mapping[str, Any]) -> Manifest:
        tensors = {
            name: TensorInfo(info["dtype"], tuple(info["shape"]))
            for name, info in values["tensors"].items()
        }
        groups = tuple(
            UnitGroup(
                group["name"],
                group["kind"],
                group["size"],
                tuple(Slice(**part) for part in group["slices"]),
            )
            for group in values["groups"]
        )
        return cls(values["configuration"], tensors, groups, values["config_file"])
