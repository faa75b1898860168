"""Fisher merging (Matena and Raffel, 2111.09832): parameters weighted by what depends on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError, ProtocolError, TrainingError
from fedveil.modes import evaluation_mode
from fedveil.state import read_state
from fedveil.tasks import Prepared, Task
from fedveil.tasks.task import device_of, to_device
from fedveil.training.modes import only_trainable
from fedveil.wire import Message, Statistics

__all__ = ["SMOOTHING", "decode_fisher", "encode_fisher", "fisher_diagonal", "fisher_step"]

PREFIX = "fisher/"
SMOOTHING = 1e-10
"""Added to every entry, so that a parameter on which no model depends takes the mean."""


def fisher_diagonal(
    model: nn.Module, task: Task, rows: Prepared, progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information, one number per parameter.

    F = mean over examples x of sum_y p(y|x) (d log p(y|x) / d parameter)^2, with p the model's own
    prediction: labels are not read. Each example takes one backward pass per class.

    Args:
        model: The model, where it is; in evaluation mode inside.
        task: A task whose ``logits`` are scores per class, such as text classification.
        rows: The examples.
        progress: Called with how many examples are done, and of how many.

    Returns:
        Float32 tensors of the parameters' shapes on the CPU, a tied parameter under its first name.

    Raises:
        ConfigurationError: The task has no classes.
        TrainingError: A gradient is not finite.
    """
    logits = getattr(task, "logits", None)
    if logits is None:
        raise ConfigurationError(
            "Fisher merging needs a task with classes",
            expected="text or image classification",
            found=task.name,
            fix="Use RegMean, which looks at layer inputs only.",
        )
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    device = device_of(model)
    with evaluation_mode(model), torch.enable_grad(), only_trainable(model, {*names}) as parameters:
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for done, row in enumerate(rows.select(range(len(rows)))):
            # One at a time: the square of a batch's gradient is not the sum of squares.
            scores = logits(model, to_device(task.collate([row]), device))
            _add_squares(scores.float().log_softmax(dim=-1).flatten(), parameters, sums)
            progress(done + 1, len(rows))
    diagonal = {n: (s / len(rows)).cpu() for n, s in zip(names, sums, strict=True)}
    for name, values in diagonal.items():
        if not bool(torch.isfinite(values).all()):
            raise TrainingError("A gradient is not finite", where=name)
    return diagonal


def _add_squares(log_p: Tensor, parameters: Sequence[nn.Parameter], sums: Sequence[Tensor]) -> None:
    for label, own in enumerate(log_p):
        gradients = torch.autograd.grad(
            own, parameters, retain_graph=label + 1 < len(log_p), allow_unused=True
        )
        probability = float(own.detach().exp())
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                gradient = gradient.to_dense() if gradient.is_sparse else gradient
                total.addcmul_(gradient, gradient, value=probability)


def encode_fisher(diagonal: Mapping[str, Tensor]) -> dict[str, Statistics]:
    """As sections of a message, ``fisher/<parameter>``."""
    return {f"{PREFIX}{name}": Statistics(values) for name, values in diagonal.items()}


def decode_fisher(message: Message, model: nn.Module) -> dict[str, Tensor]:
    """The diagonal of this model's parameters.

    Raises:
        ProtocolError: One is missing, too many, of another shape, or no mean of squares.
    """
    known = read_state(model)
    shapes = {n: p.shape for n, p in model.named_parameters() if n in known}
    odd = sorted(message.sections.keys() ^ {f"{PREFIX}{name}" for name in shapes})
    if odd:
        raise ProtocolError(
            "The statistics are not of this model's parameters",
            expected="one section per parameter",
            found="one too many" if odd[0] in message.sections else "one is missing",
            where=odd[0],
        )
    return {name: _read(message, name, shape) for name, shape in shapes.items()}


def _read(message: Message, name: str, shape: torch.Size) -> Tensor:
    section = message.sections[f"{PREFIX}{name}"]
    values = section.tensor if isinstance(section, Statistics) else None
    if values is None or values.dtype != torch.float32 or values.shape != shape:
        raise ProtocolError(
            "The statistics of a parameter have another shape or type",
            expected=f"float32 statistics {list(shape)}",
            found=f"{type(section).__name__} {list(getattr(values, 'shape', ()))}",
            where=name,
        )
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ProtocolError(
            "The statistics of a parameter are impossible", expected="means of squares", where=name
        )
    return values


def fisher_step(
    deltas: Sequence[Tensor], weights: Sequence[float], diagonals: Sequence[Tensor]
) -> Tensor:
    """``sum_k w_k F_k D_k / sum_k w_k F_k``, elementwise, F smoothed; computed in float64."""
    shares = [
        weight * (diagonal.double() + SMOOTHING)
        for weight, diagonal in zip(weights, diagonals, strict=True)
    ]
    products = [share * delta for share, delta in zip(shares, deltas, strict=True)]
    step: Tensor = torch.stack(products).sum(dim=0) / torch.stack(shares).sum(dim=0)
    return step.to(deltas[0].dtype)
