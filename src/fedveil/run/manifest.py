"""What a run is about: the file ``run.json`` in its folder, from which it can be audited later."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedveil.errors import CheckpointError, ConfigurationError
from fedveil.files import read_record, write_whole
from fedveil.schemes import Facts, scheme_class
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
        facts: What the scheme states of its releases; checks compare the bytes with it.
    """

    configuration: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    groups: tuple[UnitGroup, ...] = ()
    config_file: str | None = None
    facts: Facts = field(default_factory=Facts)

    @classmethod
    def of(
        cls,
        state: Mapping[str, Tensor],
        groups: tuple[UnitGroup, ...],
        configuration: Mapping[str, Any],
        config_file: Path | None = None,
        facts: Facts | None = None,
    ) -> Manifest:
        """The manifest of a run that is about to begin, with what it releases and trains."""
        tensors = {
            name: TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in state.items()
        }
        file = str(config_file) if config_file else None
        return cls(configuration, tensors, groups, file, facts or Facts())

    @property
    def is_of_public(self) -> bool:
        """Whether the run says that releases are of a public model, with nothing of the owner's.

        What a run does not say is taken for the owner's.
        """
        return self.facts.of_owner is False

    @property
    def parameters(self) -> int:
        """Floating-point numbers in the model."""
        return sum(info.numel for info in self.tensors.values() if info.is_floating_point)

    def write(self, folder: Path) -> None:
        """Write ``run.json``, whole or not at all.

        Raises:
            CheckpointError: It cannot be written.
        """
        values = {"format": FORMAT, **asdict(self), "facts": self.facts.to_json()}
        text = json.dumps(values, indent=1)
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
        configuration = values["configuration"]
        known = "facts" in values
        facts = _read_facts(values["facts"]) if known else _facts_before(configuration)
        return cls(configuration, tensors, groups, values["config_file"], facts)


_SAID_BEFORE: Mapping[str, frozenset[str]] = {
    "fedavg": frozenset(),
    "fedlpp": frozenset({"bits"}),
    "fedqsn": frozenset({"server_mask", "client_mask", "draw", "policy", "bits", "adapter_bits"}),
}
"""Settings that a run.json must have, for facts to be read from it that it does not state."""


def _read_facts(values: Mapping[str, Any]) -> Facts:
    try:
        return Facts.from_json(values)
    except ConfigurationError as error:
        raise ValueError(str(error)) from error


def _facts_before(configuration: Mapping[str, Any]) -> Facts:
    """Of a run from before schemes stated facts: what our own schemes did then, by its settings.

    Of a scheme of somebody else's, and of settings that are not there, nothing is assumed.
    """
    settings = dict(configuration.get("scheme") or {})
    needed = _SAID_BEFORE.get(settings.pop("name", ""))
    facts = Facts()
    if needed is not None and needed <= settings.keys():
        kind: Any = scheme_class(configuration["scheme"]["name"])
        try:
            facts = kind(**{name: settings[name] for name in needed}).facts()
        except ConfigurationError as error:
            raise ValueError(str(error)) from error
    return replace(facts, of_owner=False) if "public" in configuration else facts
