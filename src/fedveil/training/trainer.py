"""Local training: what a client does with the proxy it was given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError, TrainingError
from fedveil.modes import evaluation_mode, training_mode
from fedveil.tasks.task import (
    Batch,
    Classification,
    Dataset,
    Prepared,
    Task,
    device_of,
    to_device,
)
from fedveil.training.batches import Batches, has_batch_norm, pieces_of
from fedveil.training.modes import (
    check_device,
    checkpointing,
    make_dense,
    on_device,
    only_trainable,
    seeded,
)
from fedveil.training.settings import Training

__all__ = ["LocalRun", "Trainer", "TrainingRecord", "trained_names"]


@dataclass(frozen=True)
class TrainingRecord:
    """What one round of local training was.

    Attributes:
        examples: Distinct examples in the client's data set (not examples seen).
        steps: Optimizer steps taken.
        loss_first: Mean loss of the first batch, before any step, in nats.
        loss_last: Mean loss of the last batch, before the last step, in nats.
    """

    examples: int
    steps: int
    loss_first: float
    loss_last: float


@dataclass(frozen=True)
class LocalRun:
    """One client's training in one round, as a scheme's client side calls it."""

    trainer: Trainer
    seed: int

    def __call__(self, model: nn.Module) -> TrainingRecord:
        """See :meth:`Trainer.train`."""
        return self.trainer.train(model, seed=self.seed)

    def replay(self, model: nn.Module, examples: int, batch_size: int = 32) -> Iterator[Batch]:
        """See :meth:`Trainer.replay`."""
        return self.trainer.replay(model, examples, seed=self.seed, batch_size=batch_size)


class Trainer:
    """One client's task, data and settings. Picklable if its task and data are.

    It trains whatever model it is handed and keeps nothing of it: no optimizer state, no weights.
    It does not bound what the trained model tells about the data; clip and noise the update.

    Args:
        task: What the model is trained for.
        data: The client's rows, or what `task.prepare` made of them.
        training: How to train.

    Raises:
        DataError: The data cannot be used for the task.
        ConfigurationError: This machine lacks the device, or the task has no classes that could be
            a client's own.
    """

    def __init__(self, task: Task, data: Dataset | Prepared, training: Training) -> None:
        if training.device is not None:
            check_device(training.device)
        self.task, self.training = task, training
        self._data = task.prepare(data)
        self._taught = _restricted(task, self._data) if training.own_classes else task

    @property
    def data(self) -> Prepared:
        """The client's rows, as the task prepared them."""
        return self._data

    @property
    def examples(self) -> int:
        """Distinct examples in the client's data set."""
        return len(self._data)

    def trainable(self, model: nn.Module) -> set[str]:
        """Names of the parameters that training changes.

        A parameter is left alone when it does not require gradients, or when any of its names (a
        tied parameter has several) matches a `frozen` pattern.

        Raises:
            ConfigurationError: A pattern matches nothing, nothing is left to train, or a parameter
                to be trained is fp16.
        """
        return trained_names(model, self.training)

    def train(self, model: nn.Module, *, seed: int) -> TrainingRecord:
        """Train `model` in place, where it is, for one round.

        The same model, data, settings and seed give the same weights, on the CPU with the same
        number of threads (CUDA kernels may add in another order). The caller's random generators,
        the modules' modes and `requires_grad` are afterwards as they were. After an error the
        model is partly trained: discard it.

        Args:
            model: The proxy. Weights in bf16 train, but steps smaller than about 1/256 of a
                weight are lost to rounding: prefer float32 for small learning rates.
            seed: Decides the order of examples and dropout. It need not be secret.

        Raises:
            TrainingError: A loss or gradient is not finite, or the model cannot be trained on
                this little data.
            ConfigurationError: See `trainable`.
        """
        names = self.trainable(model)
        with on_device(model, self.training.device):
            return self._train(model, names, seed)

    def _train(self, model: nn.Module, names: set[str], seed: int) -> TrainingRecord:
        batches = Batches(
            self.examples, self.training.batch_size, avoid_single=has_batch_norm(model)
        )
        steps = self.training.total_steps(len(batches))
        device = device_of(model)
        losses: list[float] = []
        with (
            seeded(seed, device),
            training_mode(model),
            torch.enable_grad(),
            only_trainable(model, names) as parameters,
            checkpointing(model, self.training.gradient_checkpointing),
        ):
            optimizer = self.training.build_optimizer(parameters)
            schedule = self.training.build_schedule(optimizer, steps)
            for indices in islice(batches.endless(seed), steps):
                where = f"step {len(losses) + 1} of {steps}"
                rate = float(schedule.get_last_lr()[0])
                losses.append(self._accumulate(model, indices, where, rate))
                if all(parameter.grad is None for parameter in parameters):
                    raise _no_gradient(self.task)
                make_dense(parameters)
                norm = self._clip(parameters)
                _check_finite("gradient norm", norm.item(), where, rate)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
        return TrainingRecord(self.examples, steps, losses[0], losses[-1])

    def replay(
        self, model: nn.Module, examples: int, *, seed: int = 0, batch_size: int = 32
    ) -> Iterator[Batch]:
        """Run `model` on the client's own data without training it, for someone who watches it.

        Args:
            model: The model, where it is.
            examples: Run at most this many examples, spread evenly over the data set.
            seed: Decides random transforms of the data.
            batch_size: Examples at a time.

        Yields:
            Each batch just before the model gets it.
        """
        count = min(examples, self.examples)
        chosen = [index * self.examples // count for index in range(count)]
        with on_device(model, self.training.device), evaluation_mode(model):
            device = device_of(model)
            for start in range(0, count, batch_size):
                rows = self._data.select(chosen[start : start + batch_size])
                with seeded(seed + start, device):
                    batch = to_device(self.task.collate(rows), device)
                yield batch
                with torch.no_grad(), seeded(seed + start, device):
                    self.task.loss(model, batch)

    def _accumulate(
        self, model: nn.Module, indices: Sequence[int], where: str, rate: float
    ) -> float:
        """Add up the gradient of the mean loss over some examples, piece by piece; that loss."""
        steps = self.training.gradient_accumulation_steps
        pieces = pieces_of(indices, steps, avoid_single=has_batch_norm(model))
        batches = [self.task.collate(self._data.select(piece)) for piece in pieces]
        weights = [
            _weight(self.task, batch, len(piece))
            for batch, piece in zip(batches, pieces, strict=True)
        ]
        device, mean = device_of(model), 0.0
        for batch, weight in zip(batches, weights, strict=True):
            loss = self._loss(model, to_device(batch, device))
            if len(batches) > 1:
                loss = loss * (weight / sum(weights))
            mean += loss.item()
            _check_finite("loss", mean, where, rate)
            loss.backward()  # type: ignore[no-untyped-call]
        return mean

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        """Scale gradients down if they are too long; how long they were."""
        if self.training.max_grad_norm is not None:
            return nn.utils.clip_grad_norm_(parameters, self.training.max_grad_norm)
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        try:
            return _checked_loss(self._taught.loss(model, batch), self.task)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                "BatchNorm cannot be trained on a batch of one example",
                expected="at least 2 examples per batch",
                found=f"{self.examples} in the data set, batch_size={self.training.batch_size}",
                fix="Leave this client out, or raise batch_size.",
            ) from error


def trained_names(model: nn.Module, training: Training) -> set[str]:
    """What settings have a client train of a model: see :meth:`Trainer.trainable`.

    Raises:
        ConfigurationError: As of that.
    """
    names = list(model.named_parameters(remove_duplicate=False))
    frozen: set[nn.Parameter] = set()
    for pattern in training.frozen:
        matching = {p for name, p in names if fnmatchcase(name, pattern)}
        if not matching:
            raise _unmatched(pattern, [name for name, _ in names])
        frozen |= matching
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in frozen
    }
    _check_trainable(chosen)
    return set(chosen)


def _restricted(task: Task, data: Prepared) -> Task:
    if not isinstance(task, Classification):
        raise ConfigurationError(
            "The task has no classes that could be a client's own",
            expected="a classification of texts or images",
            found=getattr(task, "name", type(task).__name__),
            where="Training.own_classes",
            fix="Leave own_classes out.",
        )
    return task.restricted_to(data)


def _weight(task: Task, batch: Batch, examples: int) -> int:
    """What a batch's mean loss is the mean over: examples, or what the task counts instead."""
    count = getattr(task, "count", None)
    return examples if count is None else int(count(batch))


def _checked_loss(loss: object, task: Task) -> Tensor:
    """What a task calls the loss, if it can be differentiated.

    Raises:
        TrainingError: It is no number, or no gradient leads from it to what is trained.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        found = type(loss).__name__
        if isinstance(loss, Tensor):
            found = f"{str(loss.dtype).removeprefix('torch.')} of shape {list(loss.shape)}"
        raise TrainingError(
            "The loss is no single number that could be differentiated",
            expected="a tensor of one floating-point number, the mean over the batch",
            found=found,
            where=_loss_of(task),
        )
    if not loss.requires_grad:
        raise _no_gradient(task)
    return loss


def _no_gradient(task: Task) -> TrainingError:
    return TrainingError(
        "No gradient reaches anything that is trained",
        expected="a loss that depends on the parameters to be trained",
        found="one that does not",
        where=_loss_of(task),
        fix="Does the forward detach what it computes, or run under no_grad? Are all layers "
        "that it uses frozen?",
    )


def _loss_of(task: Task) -> str:
    return f"the loss of {getattr(task, 'name', type(task).__name__)!r}"


def _check_finite(what: str, value: float, where: str, rate: float) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"the {what} is not finite",
            found=f"{value} at learning rate {rate:.3g}",
            where=where,
            fix="Lower the learning rate, or set max_grad_norm.",
        )


def _check_trainable(chosen: dict[str, nn.Parameter]) -> None:
    if not chosen:
        raise ConfigurationError(
            "nothing is left to train",
            expected="a parameter that requires gradients and that no pattern freezes",
            found="none",
            fix="Training.frozen may match everything. Of an adapter that was saved: "
            "PeftModel.from_pretrained(..., is_trainable=True).",
        )
    half = [name for name, parameter in chosen.items() if parameter.dtype == torch.float16]
    if half:
        raise ConfigurationError(
            "fp16 weights cannot be trained: their gradients underflow",
            expected="float32 or bfloat16",
            found=f"float16 in {len(half)} of {len(chosen)} tensors",
            where=half[0],
            fix="Call model.float() or model.bfloat16() first.",
        )


def _unmatched(pattern: str, names: list[str]) -> ConfigurationError:
    return ConfigurationError(
        "a frozen pattern matches no parameter",
        expected=f"a pattern for names such as {', '.join(names[:3])}",
        found=repr(pattern),
        where="Training.frozen",
    )
