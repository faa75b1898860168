"""What a client measures of its data for RegMean: Grams of layer inputs, by forward hooks."""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedveil.aggregation.alone import Alone, Call, Known, UnclearError, run_alone
from fedveil.aggregation.gram import Form, Moments
from fedveil.aggregation.linear import LinearLayer, reading, rows_of
from fedveil.errors import ConfigurationError, TrainingError
from fedveil.modes import evaluation_mode

__all__ = ["GramHooks"]

_How = Literal["outside", "together", "alone", "looking", "done"]
"""Where a layer is called: outside of the model's own call; with a batch whose examples lie along
each layer's first axis; with one example; to see whether they do; with a batch that was counted."""

# A few rows at a time would take most of the time to add up: so many wait for each other.
_TOGETHER = 512

# What rounding of a float32 sum may add stays below the bound.
_MARGIN = 1.0 - 1e-5


class GramHooks:
    """Accumulates the Grams of some layers while a model runs on batches.

    An example's part is the mean over its positions (tokens, pixels), padding left out, so that no
    example counts for more than another. Layers that are handed the same tensor (query, key and
    value) share one Gram.

    A batch is taken as it is where no example has padding and every layer's input begins with the
    examples. Anywhere else, and always under a ``clip``, the model runs on each example alone,
    without its padding, before it runs on the batch: what a layer sees then is of that example,
    wherever the layer has it. A layer that is called several times counts the mean of its calls.

    Args:
        model: The model that will run.
        layers: The layers to watch, by weight name.
        form: See :class:`~fedveil.aggregation.gram.Moments`.
        size: See there.
        clip: Bound on the mean square of what one example gives a layer; an example beyond it is
            scaled down to it. None for no bound.

    Attributes:
        moments: Sums by the weight name of the first layer that saw the input.
        examples: How many examples are in each of them.
        same_input: Weight name of each layer that fired -> a name in ``moments``.

    Does NOT protect: ``clip`` bounds what replacing one example changes, for models that tell
    examples of a batch apart by what they are called with and keep nothing of one for the next.
    Others are refused as far as it shows: in tensors that their modules hold.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LinearLayer],
        form: Form,
        size: int,
        clip: float | None = None,
    ) -> None:
        modules = dict(model.named_modules())
        self._model = model
        self._watched = {name: modules[layer.module] for name, layer in layers.items()}
        self._form, self._size, self._clip = form, size, clip
        self._now: dict[tuple[int, int, object], tuple[weakref.ref[Tensor], str]] = {}
        self._known, self._depth = Known(), 0
        self._how: _How = "outside"
        self._axes_differ, self._batch_size, self._empty = False, 0, False
        self._pending: dict[str, list[Tensor]] = defaultdict(list)
        self._waiting: dict[str, list[Tensor]] = defaultdict(list)
        self._differing: set[str] = set()
        self._reached: set[str] | None = None
        self._held: list[tuple[Tensor, int]] | None = None
        self.moments: dict[str, Moments] = {}
        self.examples: dict[str, int] = defaultdict(int)
        self.same_input: dict[str, str] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are in place inside, where nothing runs compiled or fused, which has no layers.

        Raises:
            ConfigurationError: From the model's call inside: how its examples lie cannot be told,
                or a bound cannot be kept.
        """
        handles = [
            module.register_forward_hook(self._hook(name)) for name, module in self._watched.items()
        ]
        handles += [
            self._model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._model.register_forward_hook(self._finish),
            self._model.register_forward_hook(self._leave, always_call=True),
        ]
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with _uncompiled():
                yield
                self._end_single()
                for name in [*self._waiting]:
                    self._add_waiting(name)
                # The Gram that they shared once is not theirs: they are averaged.
                for name in self._differing:
                    del self.same_input[name]
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for handle in handles:
                handle.remove()
            self._now.clear()
            self._pending.clear()

    def begin_batch(
        self,
        mask: Tensor | None,
        batch: Mapping[str, Tensor] | None = None,
        *,
        single: bool = False,
    ) -> None:
        """Say that another batch comes.

        Args:
            mask: [examples, tokens], 0 where there is padding; None if nothing says.
            batch: All tensors of the batch, if they are known.
            single: Whether it is of one example.
        """
        self._end_single()
        self._known = Known(mask, batch, single)
        self._check_nothing_held()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return  # one example of a batch, or a model that calls itself
        self._check_nothing_held()
        clipped = self._clip is not None
        try:
            call = Call(model, args, kwargs, self._known)
        except UnclearError:
            if clipped or self._known.padded or "attention_mask" in kwargs:
                raise
            self._how = "together"  # nothing is padding: examples count alike wherever they are
            return
        if call.size == 1 and not call.padded:
            self._how = "alone"
        elif clipped or call.padded or self._needs_taking_apart(call):
            call.check_separable(strict=clipped)
            for example in call.examples():
                self._run(example)
            self._how = "done"
        else:
            self._how = "together"

    def _finish(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self._depth == 1 and self._how == "alone":
            self._end_example()

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Also after an error, where torch hides those of hooks: nothing here raises any."""
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self._how = "outside"
            self._now.clear()

    def _run(self, example: Alone) -> None:
        self._how, self._empty = "alone", example.empty
        self._now.clear()
        run_alone(self._model, example)
        self._empty = False
        self._end_example()
        self._check_nothing_held()

    def _needs_taking_apart(self, call: Call) -> bool:
        """Whether some layer's input does not begin with the examples of a batch."""
        if not self._axes_differ:
            self._how, self._batch_size = "looking", call.size
            with torch.no_grad(), evaluation_mode(self._model):
                self._model(*call.args, **call.kwargs)
        if not self._axes_differ:
            return False
        try:
            call.check_separable(strict=False)
        except UnclearError:
            return False
        return True

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        def observe(module: nn.Module, arguments: tuple[Tensor, ...], output: object) -> None:
            # Called by keyword, it is not observed: its update is averaged.
            if arguments:
                self._observe(name, module, arguments[0])

        return observe

    def _observe(self, name: str, module: nn.Module, inputs: Tensor) -> None:
        how = self._how if self._how != "outside" else self._outside(name)
        if how == "looking":
            self._axes_differ |= inputs.dim() < 2 or len(inputs) != self._batch_size
        if how in ("looking", "done") or self._shares(name, module, inputs):
            return
        rows = rows_of(module, inputs.detach()).float()
        if name not in self.moments:
            self.moments[name] = Moments(rows.shape[-1], self._form, self._size, rows.device)
        if how == "alone":
            # A copy, as the model may go on in place.
            if rows.numel():
                rows = rows.flatten(0, 1)
                kept = torch.zeros_like(rows) if self._empty else rows.clone()
                self._pending[name].append(kept)
            return
        weights = torch.ones(rows.shape[:2], device=rows.device)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1.0)
        rows = rows * weights.sqrt()[:, :, None]
        self.moments[name].add(rows.flatten(0, 1))
        self.examples[name] += len(rows)

    def _outside(self, name: str) -> _How:
        """How a layer's input is taken where a task calls a part of the model by itself."""
        if self._known.padded or (self._clip is not None and not self._known.single):
            raise UnclearError(
                "A layer runs outside of the model's own call, so what it sees cannot be told "
                "apart into examples",
                expected="a task that calls the model itself",
                found="a call of a part of it",
                where=name,
                fix="Let the trainer's replay take batch_size=1, or exclude the layer.",
            )
        return "alone" if self._known.single else "together"

    def _shares(self, name: str, module: nn.Module, inputs: Tensor) -> bool:
        """Whether another layer was handed the same tensor before, and has its Gram."""
        # The same tensor, not changed in place in between (inference tensors do not count that).
        version = 0 if inputs.is_inference() else inputs._version
        key = id(inputs), version, reading(module)
        alive, first = self._now.get(key, (None, name))
        if alive is None or alive() is not inputs:
            first = name
            self._now[key] = (weakref.ref(inputs), name)
        known = self.same_input.setdefault(name, first)
        if known not in (name, first):
            self._differing.add(name)
        return known != name

    def _end_single(self) -> None:
        """A batch of one example ends: all that was run in it, in however many calls, is of it."""
        if self._known.single:
            self._count_example()

    def _end_example(self) -> None:
        if not self._known.single:
            self._count_example()

    def _count_example(self) -> None:
        """Add what layers have seen of one example."""
        pending, self._pending = self._pending, defaultdict(list)
        self._now.clear()
        if self._clip is not None:
            self._check_reached(pending.keys())
        for name, calls in pending.items():
            # Each call's positions together weigh as much as those of any other call.
            rows = torch.cat(
                [
                    rows * rows.new_tensor(len(rows) * len(calls)).reciprocal().sqrt()
                    for rows in calls
                ]
            )
            rows = rows if self._clip is None else _clipped(rows, self._clip, name)
            self._waiting[name].append(rows)
            self.examples[name] += 1
            if sum(map(len, self._waiting[name])) >= min(_TOGETHER, rows.shape[1]):
                self._add_waiting(name)

    def _add_waiting(self, name: str) -> None:
        self.moments[name].add(torch.cat(self._waiting.pop(name)))

    def _check_reached(self, names: Collection[str]) -> None:
        """A layer that only some examples reach tells by its Gram that one was there."""
        self._reached = set(names) if self._reached is None else self._reached
        odd = sorted(self._reached.symmetric_difference(names))
        if odd:
            raise ConfigurationError(
                "Not all examples reach a layer, so what one changes has no bound",
                expected="the same layers for all",
                found="a layer for some (an expert)",
                where=odd[0],
                fix="Leave it out with `exclude`, or take Grams without clip and noise.",
            )

    def _check_nothing_held(self) -> None:
        """Under a clip, make sure that a model keeps nothing of an example for the next one."""
        if self._clip is None:
            return
        held = list(_held_by(self._model))
        if self._held is None:
            self._held = held
        same = len(held) == len(self._held) and all(
            one is other and version == before
            for (one, version), (other, before) in zip(held, self._held, strict=True)
        )
        if not same:
            raise ConfigurationError(
                "The model keeps something of what it was given, so what one example changes has "
                "no bound",
                expected="the same buffers before and after",
                found="a tensor of a module that changed (running statistics, a state, a cache)",
                where="RegMean",
                fix="Put the model in evaluation mode, or take Grams without clip and noise.",
            )


def _uncompiled() -> AbstractContextManager[object]:
    """Whatever is compiled runs as it was written inside."""
    # The import takes seconds, and who has compiled anything has made it.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _clipped(rows: Tensor, clip: float, name: str) -> Tensor:
    """Rows whose squares are a mean over positions, so that per input they add up to the clip."""
    power = rows.double().square().sum() / rows.shape[1]
    if not bool(torch.isfinite(power)):
        raise TrainingError("What a layer is given is not finite", where=name)
    bound = (clip * _MARGIN / power.clamp_min(1e-300)).clamp_max(1.0)
    return rows * bound.sqrt().float()


def _held_by(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Every tensor that modules hold besides parameters, with how often it was written to."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name != "_parameters":
                yield from _tensors_in(value)


def _tensors_in(value: object) -> Iterator[tuple[Tensor, int]]:
    if isinstance(value, Tensor):
        yield value, 0 if value.is_inference() else value._version
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
