"""A model with other numbers in it for a while, and what it does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import cache
from types import TracebackType
from typing import Self
from zlib import crc32

import torch
from torch import Tensor, nn

from fedveil.modes import evaluation_mode
from fedveil.units.examples import Run, floating
from fedveil.units.group import Slice

__all__ = ["Probe", "Watch"]

_NORMAL = 1_048_583
"""How many numbers are drawn; a prime, so that no two rows of a matrix are alike."""


class Probe:
    """Inside, a model in float32 and evaluation mode whose tensors may be filled anew.

    A tensor whose values are all alike says nothing of what it does (a bias or an adapter that
    begins at zero, a norm's weight): inside it has others. Outside, everything is as before, to the
    very storage.

    Args:
        model: any.
        drawn: have others for all tensors.
    """

    def __init__(self, model: nn.Module, *, drawn: bool = False) -> None:
        self._model, self._drawn = model, drawn
        self._before: list[tuple[Tensor, Tensor, bool, Tensor | None]] = []
        self._mode = ExitStack()
        self._names: dict[str, Tensor] = {}
        self._start: dict[int, Tensor] = {}
        self._filled: dict[int, tuple[Tensor, set[object]]] = {}

    def __enter__(self) -> Self:
        """Take the model."""
        try:
            self._take()
        except BaseException:  # memory may be short
            self._give_back()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give it back."""
        self._give_back()

    def _take(self) -> None:
        named = [
            *self._model.named_parameters(remove_duplicate=False),
            *self._model.named_buffers(remove_duplicate=False),
        ]
        self._names = dict(named)
        for name, tensor in {id(t): (n, t) for n, t in reversed(named)}.values():
            self._before.append((tensor, tensor.data, tensor.requires_grad, tensor.grad))
            if tensor.is_floating_point():
                tensor.grad = None
                tensor.data = _telling(name, tensor, drawn=self._drawn)
            if not isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.clone()  # a model may count in it
            elif tensor.is_floating_point():
                tensor.requires_grad_(True)
            self._start[id(tensor)] = tensor.data
        self._mode.enter_context(evaluation_mode(self._model))

    def _give_back(self) -> None:
        for tensor, data, requires_grad, grad in self._before:
            tensor.grad = None
            tensor.data = data
            if tensor.is_leaf and tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            tensor.grad = grad
        self._mode.close()

    def reset(self) -> None:
        """Undo what was filled."""
        for tensor, _ in self._filled.values():
            tensor.data = self._start[id(tensor)]
        self._filled = {}

    def fill(self, cut: Slice, units: Tensor, *, random: bool) -> None:
        """Put zeros, or any numbers, where some units lie on a slice."""
        tensor = self._names.get(cut.tensor)
        if tensor is None:
            return
        if id(tensor) not in self._filled:
            tensor.data = self._start[id(tensor)].clone()
            self._filled[id(tensor)] = tensor, set()
        done = self._filled[id(tensor)][1]
        if (cut.axis, cut.offset) in done:  # the same tensor under another name
            return
        done.add((cut.axis, cut.offset))
        at = cut.indices(units).to(tensor.device)
        if not random:
            tensor.data.index_fill_(cut.axis, at, 0.0)
            return
        shape = [*tensor.shape]
        shape[cut.axis] = len(at)
        noise = _noise(f"{cut.tensor} {cut.axis}", tensor.data.new_empty(shape))
        noise *= _size(self._start[id(tensor)])
        if cut.tensor.endswith("running_var"):
            noise = noise.abs()
        tensor.data.index_copy_(cut.axis, at, noise)

    def without_derivatives(
        self, used: Mapping[str, Mapping[int, Tensor]]
    ) -> list[tuple[str, Tensor]]:
        """Tensors of real numbers of which :meth:`used` says nothing: buffers, detached gates."""
        return [
            (name, tensor)
            for name, tensor in self._names.items()
            if tensor.is_floating_point()
            and tensor.numel()
            and not any(bool(axis.any()) for axis in used.get(name, {}).values())
        ]

    @torch.no_grad()
    def outputs(self, run: Run) -> list[Tensor]:
        """What the model answers an example."""
        return [tensor.detach().clone() for tensor in self._run(run)]

    def used(self, run: Run) -> dict[str, dict[int, Tensor]]:
        """Per parameter and axis which positions have a say in the answer: bool [length]."""
        found: dict[str, dict[int, Tensor]] = {}
        names = {id(t): [n for n, o in self._names.items() if o is t] for t in self._names.values()}

        def look(parameter: Tensor) -> None:
            assert parameter.grad is not None
            used = parameter.grad != 0
            parameter.grad = None
            axes = {
                axis: used.movedim(axis, 0).flatten(1).any(dim=1) if used.dim() > 1 else used
                for axis in range(used.dim())
            }
            for name in names[id(parameter)]:
                found[name] = axes

        with ExitStack() as stack, torch.enable_grad():
            for tensor, *_ in self._before:
                if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                    handle = tensor.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
                    stack.callback(handle.remove)
            answers = [one for one in self._run(run) if one.requires_grad]
            if not all(bool(one.isfinite().any()) for one in answers):
                raise ValueError("the model's answer is not finite")
            # Sums of answers would be constants behind a norm or a softmax: weigh each number.
            generator = torch.Generator().manual_seed(0)
            total = sum(
                (one * torch.randn(one.shape, generator=generator).to(one.device)).sum()
                for one in answers
            )
            if isinstance(total, Tensor):
                total.backward()  # type: ignore[no-untyped-call]
        for name, tensor in self._names.items():
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                unused = {a: torch.zeros(n, dtype=torch.bool) for a, n in enumerate(tensor.shape)}
                found.setdefault(name, unused)
        return {name: {a: f.cpu() for a, f in axes.items()} for name, axes in found.items()}

    def _run(self, run: Run) -> list[Tensor]:
        answers: list[object] = []
        handle = self._model.register_forward_hook(lambda _, __, output: answers.append(output))
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                returned = run(self._model)
        finally:
            handle.remove()
        return floating(answers[-1] if answers else returned)


class Watch:
    """Inside, keeps what some layers put out, or read, in the order of computation."""

    def __init__(self, model: nn.Module, names: Iterable[str], *, inputs: bool = False) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._wanted, self._inputs = list(names), inputs
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.calls: list[tuple[str, Tensor]] = []

    def __enter__(self) -> Self:
        """Begin."""
        for name in self._wanted:
            if name in self.modules:
                self._handles.append(self.modules[name].register_forward_hook(self._keep(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            seen = floating(inputs if self._inputs else output)[:1]
            self.calls += ((name, one.detach().clone()) for one in seen)

        return hook


def _telling(name: str, tensor: Tensor, *, drawn: bool) -> Tensor:
    """A tensor's values in float32; others in their place if they are all alike."""
    values = tensor.data.float()
    if not values.numel() or not values.dim():
        return values
    first = float(values.flatten()[0])
    alike = bool((values == first).all())
    trained = isinstance(tensor, nn.Parameter) or name.endswith(("running_mean", "running_var"))
    if not alike and not (drawn and trained):
        return values
    noise = _noise(name, values)
    if values.dim() > 1:
        return noise.div_(max(values[0].numel(), 1) ** 0.5)
    if name.endswith(("weight", "running_var")) and not (alike and abs(first) < 0.01):
        return 1 + 0.2 * noise.clamp(-3, 3)
    return 0.2 * noise


@cache
def _normal() -> Tensor:
    return torch.randn(_NORMAL, generator=torch.Generator().manual_seed(0))


def _noise(name: str, values: Tensor) -> Tensor:
    """Normal numbers of a tensor's shape: of some that are repeated, from a place of its own on."""
    start = crc32(name.encode()) % _NORMAL
    times = -(-(start + values.numel()) // _NORMAL)
    few = _normal().repeat(times) if times > 1 else _normal()
    return few[start : start + values.numel()].view(values.shape).to(values.device, copy=True)


def _size(values: Tensor) -> float:
    """Of which size numbers are to be that could be among some."""
    some = values.flatten()[:: max(1, values.numel() // 4096)].abs()
    return float(some.median()) or 0.1
