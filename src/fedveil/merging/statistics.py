"""What the owner of a model measures on its own data, for others to merge it by."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from fedveil.aggregation import RegMean
from fedveil.aggregation.gram import Gram
from fedveil.aggregation.linear import linear_layers
from fedveil.errors import ConfigurationError, ProtocolError, WireError
from fedveil.files import whole_file
from fedveil.merging.common import uncompiled, widened
from fedveil.merging.fisher import decode_fisher, encode_fisher, fisher_diagonal
from fedveil.selection import Selection
from fedveil.state import read_state
from fedveil.tasks import Dataset, Prepared, Task
from fedveil.tasks.task import Batch
from fedveil.training import Trainer, Training
from fedveil.wire import Message, Section

__all__ = ["EVERYTHING", "MergeStatistics", "Progress", "StatisticsMethod", "statistics_of"]

StatisticsMethod = Literal["regmean", "fisher"]
METHODS = get_args(StatisticsMethod)

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""

EVERYTHING = Selection((), {}, {})
KIND = "statistics"
_KEPT = ("form", "size", "bits")
_DEFAULTS = RegMean()


@dataclass(frozen=True, eq=False)
class MergeStatistics:
    """The statistics of one model on its owner's data: what :func:`fedveil.merging.merge` needs.

    Attributes:
        message: Kind "statistics", scheme "regmean" (one Gram per distinct input of the linear
            layers) or "fisher" (one float32 number per parameter). Scalars: ``examples``, and
            ``model``, a digest of the weights that they belong to.

    Does NOT protect: whoever has the file learns what :func:`statistics_of` says. The digest shows
    that a file belongs to a model, not who made it.

    Raises:
        ProtocolError: The message holds something else.
    """

    message: Message

    def __post_init__(self) -> None:
        message = self.message
        if message.kind != KIND or message.scheme not in METHODS:
            raise ProtocolError(
                "These are no statistics to merge by",
                expected=f"{KIND} of {' or '.join(METHODS)}",
                found=f"{message.kind} of {message.scheme}",
            )
        examples, model = message.scalars.get("examples"), message.scalars.get("model")
        if type(examples) is not int or examples < 1 or not isinstance(model, str):
            raise ProtocolError(
                "Statistics do not say what they are of",
                expected="scalars examples, at least 1, and model, a digest",
                found=f"{examples!r} and {model!r}"[:80],
            )
        if self.method == "regmean":
            _ = self.settings

    @property
    def method(self) -> str:
        """What they are for: "regmean" or "fisher"."""
        return self.message.scheme

    @property
    def examples(self) -> int:
        """How many examples they were taken from."""
        return int(self.message.scalars["examples"])

    @property
    def settings(self) -> RegMean:
        """How the Grams are kept; other settings at their defaults.

        Raises:
            ProtocolError: The message says nothing possible.
        """
        said: dict[str, Any] = {key: self.message.scalars.get(key) for key in _KEPT}
        # No bits are written as 0; what is no number at all must not be taken for that.
        bits = (said["bits"] or None) if type(said["bits"]) is int else -1
        try:
            return replace(_DEFAULTS, **said | {"bits": bits})
        except ConfigurationError as error:
            raise ProtocolError(
                "Statistics do not say how they are kept",
                expected="scalars form, size and bits, as in RegMean",
                found=repr(said)[:80],
            ) from error

    def check_model(self, model: nn.Module) -> None:
        """Make sure that they were taken with exactly this model.

        Raises:
            ProtocolError: They were taken with another.
        """
        own = _digest(model)
        if self.message.scalars["model"] != own:
            raise ProtocolError(
                "The statistics were taken with another model",
                expected=f"the digest {own[:16]}",
                found=str(self.message.scalars["model"])[:16],
                fix="Give statistics in the order of the models, each taken with the very weights "
                "that are merged.",
            )

    def grams(self, model: nn.Module) -> dict[str, Gram]:
        """Grams by weight name, checked against the model's linear layers.

        Raises:
            ProtocolError: They do not fit the model.
        """
        shapes = {name: tensor.shape for name, tensor in read_state(model).items()}
        codec = self.settings.codec
        others, grams = codec.decode(self.message, linear_layers(model), shapes, EVERYTHING)
        if others:
            raise ProtocolError("A section is no part of a Gram", where=min(others))
        return grams

    def fisher(self, model: nn.Module) -> dict[str, Tensor]:
        """Means of squared gradients by parameter name, float32, checked against the model.

        Raises:
            ProtocolError: They do not fit the model.
        """
        return decode_fisher(self.message, model)

    def save(self, path: str | Path) -> None:
        """Write them to a file that only its owner may read, whole or not at all."""
        with whole_file(Path(path)) as aside:
            aside.write_bytes(self.message.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> MergeStatistics:
        """Read a file that anyone may have written; nothing is unpickled.

        Raises:
            FedveilError: There is no such file, or it holds something else or was altered.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigurationError("There is no such file", where=str(path))
        try:
            return cls(Message.from_bytes(path.read_bytes()))
        except (ProtocolError, WireError) as error:
            fix = error.fix or "Such a file is made by `fedveil statistics`."
            raise error.within(str(path), fix=fix) from error


def statistics_of(
    model: nn.Module,
    data: Dataset | Prepared,
    *,
    task: Task,
    method: StatisticsMethod = "regmean",
    settings: RegMean = _DEFAULTS,
    progress: Progress | None = None,
) -> MergeStatistics:
    """Measure a model on its owner's data, for merging it with others.

    The model is left as it was, but for gradients that it held. Half-precision models are measured
    in float32.

    Args:
        model: The trained model; of a compiled one what it was compiled from.
        data: Examples of what it was trained on, as the task takes them. Labels are not used.
        task: What it was trained for; "fisher" needs one with classes.
        method: "regmean" (Jin et al., 2212.09849): the Gram of each linear layer's inputs.
            "fisher" (Matena and Raffel, 2111.09832): the mean squared gradient per parameter of
            log p of labels drawn from the model's own prediction.
        settings: How many examples to look at, spread over the data; for RegMean also form, size,
            bits, clip and noise of a Gram, and layers to exclude. Its off-diagonal factor and ridge
            are for merging.
        progress: Called with how many examples are done, and of how many.

    Raises:
        ConfigurationError: The method is unknown, or the model or the task does not fit it.
        DataError: The data cannot be used.

    Does NOT protect: a Gram is the second moment of what each layer sees. With few examples it all
    but holds them, with many it shows which words and topics the data are about, and it can be
    compared with candidates. A Fisher diagonal shows less of each example, but which embeddings
    have gradients shows which words occur. Only ``clip`` and ``noise`` bound what one example adds
    to a Gram; nothing bounds it in a Fisher diagonal.
    """
    progress = progress or _silent
    model = _in_full_precision(uncompiled(model))
    prepared = _spread(task.prepare(data), settings.examples)
    scalars: dict[str, int | float | str | bool]
    scalars = {"examples": len(prepared), "model": _digest(model)}
    sections: Mapping[str, Section]
    if method == "regmean":
        trainer = Trainer(task, prepared, Training())

        def replay(model: nn.Module, examples: int, batch_size: int = 32) -> Iterator[Batch]:
            done = 0
            for batch in trainer.replay(model, examples, batch_size=batch_size):
                yield batch
                done += len(batch["labels"])
                progress(done, len(prepared))

        layers = linear_layers(model)
        observed = settings.observe(model, replay, layers, EVERYTHING)
        if not observed.sections:
            raise ConfigurationError(
                "RegMean needs linear layers, and none was run",
                found=f"{len(layers)} linear layers in the model",
            )
        sections = observed.sections
        scalars |= {**observed.scalars, **{key: getattr(settings, key) or 0 for key in _KEPT}}
    elif method == "fisher":
        if settings.exclude:
            raise ConfigurationError(
                "Only RegMean can exclude layers", found=f"exclude={settings.exclude!r}"
            )
        sections = encode_fisher(fisher_diagonal(model, task, prepared, progress))
    else:
        raise ConfigurationError(
            "There are no statistics for this method",
            expected=" or ".join(METHODS),
            found=repr(method),
        )
    return MergeStatistics(Message(KIND, method, 0, "owner", sections, scalars))


def _spread(rows: Prepared, examples: int) -> Prepared:
    """At most so many rows, spread evenly."""
    count = min(examples, len(rows))
    return Prepared(rows.select([index * len(rows) // count for index in range(count)]))


def _in_full_precision(model: nn.Module) -> nn.Module:
    narrow = (t.is_floating_point() and t.dtype.itemsize < 4 for t in read_state(model).values())
    if any(narrow):
        return copy.deepcopy(model).float()
    return model


def _digest(model: nn.Module) -> str:
    """Of the weights' values; the same in half precision and in float32, if the values are."""
    whole = hashlib.sha256()
    for name, tensor in sorted(read_state(model).items()):
        if tensor.is_floating_point():
            values = widened(tensor).contiguous()
            whole.update(f"{name} {list(values.shape)} ".encode())
            whole.update(values.numpy().data)
    return whole.hexdigest()


def _silent(done: int, total: int) -> None:
    """Say nothing."""
