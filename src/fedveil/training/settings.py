"""How a client trains: the settings, and the optimizer and schedule they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fedveil.errors import ConfigurationError

__all__ = ["Training", "schedule_factor"]

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("linear", "constant")


@dataclass(frozen=True)
class Training:
    """The settings of local training, the same in every round.

    Optimizer and schedule start afresh in every round: momentum does not travel between rounds,
    and a client that skips rounds has nothing stale.

    Attributes:
        steps: Optimizer steps per round. Beyond one pass over the data the client starts over in a
            new order. At most one of `steps` and `epochs` may be given; neither means one epoch.
        epochs: Passes over the client's data per round.
        batch_size: Examples per step.
        learning_rate: The highest learning rate of a round.
        optimizer: "adamw" or "sgd".
        weight_decay: Applied to every trained tensor, biases and norms included.
        momentum: For "sgd" only.
        schedule: "linear" (warm up, then fall towards 0) or "constant" (no warm-up either).
        warmup: Share of a round's steps that warm up, 0 to 1, for "linear" only.
        max_grad_norm: Gradients longer than this (L2 norm over all trained tensors) are scaled down
            to it; None for no limit. It steadies training; it is no protection of the data, which
            needs the *update* clipped and noised.
        gradient_accumulation_steps: Pieces in which a step's examples go through the model, one
            after the other: less memory for the same gradient, but for rounding and BatchNorm.
        gradient_checkpointing: Compute activations twice instead of keeping them: less memory, more
            time. For models of transformers.
        own_classes: Classes of which a client has no example are no part of its softmax (FedRS, Li
            and Zhan 2021, with a factor of 0): clients of few classes do not teach the model that
            the others never occur. For classification.
        device: Where models train and are measured, such as "cuda"; None where they are. Everything
            else of a federation is done on the CPU.
        frozen: Patterns (as in the shell, case-sensitive) of parameter names that clients leave
            alone, such as "*.embeddings.*".

    Raises:
        ConfigurationError: A value is impossible.
    """

    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 16
    learning_rate: float = 5e-5
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    momentum: float = 0.0
    schedule: str = "linear"
    warmup: float = 0.06
    max_grad_norm: float | None = 1.0
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    own_classes: bool = False
    device: str | None = None
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ConfigurationError(
                "steps and epochs both say how long a round of local training is",
                expected="at most one of them",
                found=f"steps={self.steps}, epochs={self.epochs}",
                where="Training",
                fix="Leave one out.",
            )
        for name in ("steps", "epochs"):
            if getattr(self, name) is not None:
                self._whole(name)
        self._whole("batch_size")
        self._whole("gradient_accumulation_steps")
        if self.gradient_accumulation_steps > self.batch_size:
            self._refuse("gradient_accumulation_steps", "at most batch_size, an example for each")
        self._flag("gradient_checkpointing")
        self._flag("own_classes")
        self._between("learning_rate", 0, math.inf, open_below=True)
        self._between("weight_decay", 0, math.inf)
        self._between("momentum", 0, 1)
        self._between("warmup", 0, 1)
        if self.max_grad_norm is not None:
            self._between("max_grad_norm", 0, math.inf, open_below=True)
        self._one_of("optimizer", OPTIMIZERS)
        self._one_of("schedule", SCHEDULES)
        if self.momentum and self.optimizer != "sgd":
            self._refuse("momentum", "0 with adamw, which has its own")
        self._check_frozen()

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of one round, for a client whose data make `steps_per_epoch` batches."""
        return self.steps if self.steps is not None else (self.epochs or 1) * steps_per_epoch

    def build_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """A fresh optimizer over `parameters`."""
        if self.optimizer == "sgd":
            return SGD(
                parameters,
                lr=self.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
        # Fused: one pass over each tensor instead of one per operation.
        return AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)

    def build_schedule(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        """The learning rate of each of `steps` steps, as a scheduler to be stepped after each."""
        if self.schedule == "constant":
            return LambdaLR(optimizer, lambda _: 1.0)
        return LambdaLR(optimizer, lambda step: schedule_factor(step, steps, self.warmup))

    def _whole(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self._refuse(name, "a whole number of at least 1")

    def _between(self, name: str, low: float, high: float, *, open_below: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            self._refuse(name, _interval(low, high, open_below))
        if open_below and value == low:
            self._refuse(name, _interval(low, high, open_below))

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            self._refuse(name, " or ".join(f'"{choice}"' for choice in allowed))

    def _flag(self, name: str) -> None:
        if type(getattr(self, name)) is not bool:
            self._refuse(name, "True or False")

    def _check_frozen(self) -> None:
        # A lone string would be taken apart into one pattern per letter, "*" among them.
        if not isinstance(self.frozen, tuple) or not all(isinstance(p, str) for p in self.frozen):
            self._refuse("frozen", 'a tuple of patterns, such as ("*.embeddings.*",)')

    def _refuse(self, name: str, expected: str) -> None:
        raise ConfigurationError(
            f"{name} is impossible",
            expected=expected,
            found=repr(getattr(self, name)),
            where="Training",
        )


def schedule_factor(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate that step `step` (from 0) of `steps` uses.

    With w = int(warmup * steps) + 1 warm-up steps (at most `steps`): (step + 1) / w while warming
    up, then down in a straight line that would reach 0 one step after the last. So every step
    trains, even in a round of one step; the usual formula gives its first step a rate of 0.
    """
    rising = min(int(warmup * steps) + 1, steps)
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (steps - step) / (steps - rising + 1))


def _interval(low: float, high: float, open_below: bool) -> str:
    words = f"a number {'above' if open_below else 'of at least'} {low:g}"
    return words if high == math.inf else f"{words} and at most {high:g}"
