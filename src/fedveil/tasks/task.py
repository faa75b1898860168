"""What a task is: how rows of data become batches, and batches a loss and a score."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.errors import ConfigurationError, DataError

__all__ = ["Batch", "Dataset", "Measure", "Prepared", "Task"]

Batch = dict[str, Tensor]
"""Tensors by name; "labels" (int64, shape [B]) is among them."""


class Dataset(Protocol):
    """Rows by number: a datasets.Dataset, a list of dicts, or anything alike."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Prepared:
    """A data set that a task has checked and, if that is slow, encoded once for all rounds.

    Attributes:
        rows: What the task's `collate` takes, by number.
        lengths: Length of each row where batches are padded (it is cheaper to evaluate rows of
            like length together), or None.
    """

    rows: Sequence[Any] | Dataset
    lengths: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> list[Any]:
        """The rows with these numbers, in this order."""
        return [self.rows[index] for index in indices]

    def part(self, indices: Sequence[int]) -> Prepared:
        """A data set of the rows with these numbers, in this order; nothing is prepared again."""
        lengths = None if self.lengths is None else [self.lengths[index] for index in indices]
        return Prepared(self.select(indices), lengths)


class Measure(NamedTuple):
    """Sums over one batch, from which means over a data set are made."""

    examples: int
    loss: float
    correct: int
    classes: Tensor | None = None
    """int64 [3, C], of classifiers: how often each class was found rightly, was found at all, and
    was the label."""


@runtime_checkable
class Task(Protocol):
    """What a model is trained for. Must be picklable, as clients may run in other processes."""

    @property
    def name(self) -> str:
        """A short name, such as "text-classification"."""

    def validate(self, data: Dataset) -> None:
        """Raise DataError when `data` cannot be used: empty, a column missing, a label wrong."""

    def prepare(self, data: Dataset | Prepared) -> Prepared:
        """Check `data` and encode it once; what is prepared already is returned as it is."""

    def collate(self, rows: Sequence[Any]) -> Batch:
        """One batch of prepared rows, on the CPU."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss over the batch, a float32 scalar to differentiate."""

    def measure(self, model: nn.Module, batch: Batch) -> Measure:
        """How good the model is on the batch, as sums."""


class Classification:
    """What text and image classification share: labels, logits, cross entropy.

    Args:
        label: The column of class numbers.
        num_labels: How many classes there are; None to learn it from the model's output, when a
            label out of range is found only in training.
    """

    def __init__(self, *, label: str, num_labels: int | None) -> None:
        self.label = label
        self.num_labels = num_labels
        self._classes: tuple[int, ...] | None = None

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores per class, shape [B, C]."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy in nats, computed in float32 whatever the weights are."""
        logits = self._checked_logits(model, batch)
        if self._classes is not None:
            others = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            others[list(self._classes)] = False
            logits = logits.masked_fill(others, -torch.inf)
        return F.cross_entropy(logits, batch["labels"])

    def measure(self, model: nn.Module, batch: Batch) -> Measure:
        """Summed cross entropy in nats, and how many examples are classified correctly."""
        logits, labels = self._checked_logits(model, batch), batch["labels"]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        found = logits.argmax(dim=-1)
        right = found == labels
        counts = [
            torch.bincount(chosen, minlength=logits.shape[-1])
            for chosen in (found[right], found, labels)
        ]
        return Measure(len(labels), float(loss), int(right.sum()), torch.stack(counts).cpu())

    def restricted_to(self, data: Prepared) -> Self:
        """The same task, with a loss that knows no classes but those that occur in the data.

        How good a model is is measured over all classes as ever.
        """
        task = copy.copy(self)
        task._classes = tuple(self.classes_in(data))
        return task

    def labels_of(self, data: Prepared) -> list[int]:
        """The class of each row."""
        raise NotImplementedError

    def classes_in(self, data: Prepared) -> list[int]:
        """The classes of which there are examples, in order."""
        return sorted({*self.labels_of(data)})

    def commonest(self, data: Prepared) -> float:
        """How often the commonest class occurs, as a share: what always guessing it reaches."""
        return max(Counter(self.labels_of(data)).values()) / len(data)

    def check_labels(self, data: Dataset) -> list[int]:
        """The labels of all rows; DataError names the first that is no class number."""
        return [self._check_label(row, value) for row, value in enumerate(column(data, self.label))]

    def _check_label(self, row: int, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            self._refuse_label(row, repr(value), "Use encode_labels() to number named classes.")
        if number < 0 or (self.num_labels is not None and number >= self.num_labels):
            self._refuse_label(row, str(number), "Check num_labels, or drop rows without a label.")
        return number

    def _refuse_label(self, row: int, found: str, fix: str) -> NoReturn:
        top = "" if self.num_labels is None else f" to {self.num_labels - 1}"
        raise DataError(
            f"row {row} has a label that is no class",
            expected=f"a whole number from 0{top}",
            found=found,
            where=f'column "{self.label}"',
            fix=fix,
        )

    def _checked_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self.logits(model, batch).float()
        if len(logits) != len(batch["labels"]):
            raise ConfigurationError(
                "The model does not return scores for each example",
                expected=f"{len(batch['labels'])} rows of scores",
                found=str(len(logits)),
                where=f"the forward of {type(model).__name__}",
            )
        # Checked here too, as num_labels may be unknown, or differ from what the model has.
        # An out-of-range label would otherwise kill a CUDA process for good.
        highest = int(batch["labels"].max())
        if highest >= logits.shape[-1]:
            raise DataError(
                "a label is beyond the model's classes",
                expected=f"0 to {logits.shape[-1] - 1}",
                found=str(highest),
                where=f'column "{self.label}"',
                fix="Give the model more output classes, or correct the labels.",
            )
        return logits


def column(data: Dataset, name: str) -> Iterator[Any]:
    """All values of one column, without decoding the others where the data set can do that.

    Raises:
        DataError: The data set is empty, or a row lacks the column.
    """
    if len(data) == 0:
        raise DataError(
            "the data set is empty",
            expected="at least one row",
            found="0 rows",
            fix="Leave this client out, or partition with a larger min_size.",
        )
    names = getattr(data, "column_names", None)
    if names is not None and name not in names:
        raise missing_column(name, names)
    if names is not None:
        columns: Any = data
        return iter(columns[name])
    return (_cell(data[row], name, row) for row in range(len(data)))


def column_names(data: Dataset) -> list[str]:
    """Names of a data set's columns; those of its first row, if it has rows alone."""
    names = getattr(data, "column_names", None)
    if names is not None:
        return list(names)
    first = data[0] if len(data) else {}
    return [str(name) for name in first] if isinstance(first, Mapping) else []


def missing_column(name: str, found: Sequence[str], row: int | None = None) -> DataError:
    """The error for a data set, or one row of it, that lacks a column."""
    return DataError(
        f"{'the data set' if row is None else f'row {row}'} has no column {name!r}",
        expected=repr(name),
        found=", ".join(repr(other) for other in found) or "no columns",
        fix="Rename the column, or tell the task which one to use.",
    )


def logits_of(output: object, model: nn.Module, shape: str) -> Tensor:
    """The scores in what a model returns: its `logits`, or the output itself.

    Args:
        output: Of the model's forward.
        model: It is named if there are none.
        shape: What is expected, as "B, C".

    Raises:
        ConfigurationError: There are none, or not of so many axes.
    """
    logits = getattr(output, "logits", output)
    axes = shape.count(",") + 1
    if isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() == axes:
        return logits
    found = type(logits).__name__
    if isinstance(logits, Tensor):
        found = f"{str(logits.dtype).removeprefix('torch.')} of shape {list(logits.shape)}"
    raise ConfigurationError(
        "The task cannot read what the model returns",
        expected=f"scores of shape [{shape}], as a tensor or as its attribute `logits`",
        found=found,
        where=f"the forward of {type(model).__name__}",
        fix="Wrap the model in a module that returns them, or write a task that reads them.",
    )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def longest_input(model: nn.Module) -> int | None:
    """Tokens that a model can read at once; None if it does not say, or has no limit."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:  # of XLNet it is -1
        return None
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from beyond the padding token's number.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(longest, module.num_embeddings) - first
    return longest


def check_tokens(model: nn.Module, ids: Tensor) -> None:
    """Raise DataError for tokens, int64 [B, L], that the model cannot read.

    On a GPU the same would kill the process for good.
    """
    longest, length = longest_input(model), ids.shape[1]
    if longest is not None and length > longest:
        raise DataError(
            "a text is longer than the model can read",
            expected=f"at most {longest} tokens",
            found=str(length),
            fix="Lower max_length of the task.",
        )
    read = getattr(model, "get_input_embeddings", lambda: None)()
    highest = int(ids.max()) if ids.numel() else 0
    if isinstance(read, nn.Embedding) and highest >= read.num_embeddings:
        raise DataError(
            "a token is beyond the model's vocabulary",
            expected=f"0 to {read.num_embeddings - 1}",
            found=str(highest),
            fix="Use the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer)).",
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _cell(row: Any, name: str, number: int) -> Any:
    if not isinstance(row, Mapping):
        raise DataError(
            f"row {number} has no named columns",
            expected=f"a mapping with the key {name!r}",
            found=type(row).__name__,
        )
    if name not in row:
        raise missing_column(name, [str(key) for key in row], number)
    return row[name]
