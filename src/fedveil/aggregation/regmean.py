"""RegMean (Jin et al., 2212.09849): merge linear layers by least squares, in delta form.

Each linear layer takes the step that fits best what all clients' updates do to their own inputs,

    X = (sum_k w_k G_k)^-1 sum_k w_k G_k D_k,      G_k = X_k^T X_k / n_k,

with D_k the update [inputs, outputs], w_k the client's weight and G_k the Gram of the inputs that
the layer sees on the client's data. Everything else is averaged. Two sums per layer are kept.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedveil.aggregation.alone import UnclearError
from fedveil.aggregation.base import WHOLE, Average, Observed, Replay, Scales, one_by_one
from fedveil.aggregation.codec import GramCodec
from fedveil.aggregation.gram import FORMS, Form, Gram, block_bounds, restrict
from fedveil.aggregation.linear import LinearLayer, linear_layers
from fedveil.aggregation.mean import StreamingMean
from fedveil.aggregation.observe import GramHooks
from fedveil.errors import ConfigurationError
from fedveil.selection import Selection
from fedveil.updates import check_bits
from fedveil.wire import Message, Section

__all__ = ["RegMean", "RegMeanSums"]


@dataclass(frozen=True)
class RegMean:
    """How Grams are taken, travel and are used.

    Attributes:
        off_diagonal: Factor of a Gram's off-diagonals, 0 to 1 (the paper: 0.1 to 1, by model). At 0
            each input is weighted by its own strength only.
        ridge: Added to a client's diagonal, as a share of its mean. Directions that no client's
            data excites take the mean of the updates.
        examples: A client looks at no more of its examples than this.
        form: A Gram wider than ``size`` travels as ``"blocks"`` of at most ``size`` inputs, or
            ``"low-rank"``: of rank ``size``, with its exact diagonal.
        size: See ``form``.
        bits: Bits per correlation on the wire (2, 3, 4 or 8); None for float32.
        clip: Bound on the mean square of what one example gives a layer; an example beyond it is
            scaled down to it. None for no bound.
        exclude: Patterns (as in the shell) of weight names that are averaged instead, and of whose
            inputs nothing is measured: the first layer's Gram tells which words are in the data.
        noise: Gaussian noise on a Gram, as a multiple of how far one example can move it. Needs
            ``clip``, and a Gram in blocks.

    Does NOT protect: a Gram is a statistic of private data, and the server sees one per layer and
    round; docs/regmean.md says what it reveals. ``noise`` covers one Gram: those of all layers and
    rounds compose, and it does nothing about the update that travels beside it.
    """

    name: str = field(default="regmean", init=False)
    off_diagonal: float = 0.9
    ridge: float = 1e-3
    examples: int = 256
    form: Form = "blocks"
    size: int = 2048
    bits: int | None = 8
    clip: float | None = None
    noise: float = 0.0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_number("off_diagonal", self.off_diagonal, 0.0, 1.0)
        _check_number("ridge", self.ridge, 0.0, 1e6)  # beyond it sums could overflow float32
        _check_number("noise", self.noise, 0.0, math.inf)
        for name in ("examples", "size"):
            _check_count(name, getattr(self, name))
        check_bits(self.bits, "bits")
        if self.form not in FORMS:
            raise _impossible("form", " or ".join(map(repr, FORMS)), self.form)
        if self.clip is not None:
            _check_number("clip", self.clip, 1e-12, math.inf)
        # A lone string would be taken apart into one pattern per letter.
        if not isinstance(self.exclude, tuple):
            raise _impossible("exclude", 'a tuple such as ("*.layer.0.*",)', self.exclude)
        if self.noise and (self.clip is None or self.form == "low-rank"):
            raise _impossible("noise", "0, or a clip and form='blocks' beside it", self.noise)

    @property
    def codec(self) -> GramCodec:
        """How Grams travel."""
        return GramCodec(self.form, self.size, self.bits, noisy=self.noise > 0)

    def observe(
        self, model: nn.Module, replay: Replay, changed: Collection[str], selection: Selection
    ) -> Observed:
        """The Grams of all linear layers whose weights changed.

        Raises:
            ConfigurationError: Which positions are of which example, or padding, cannot be told,
                or with ``clip`` that one example changes no more than the bound.
        """
        layers = {n: layer for n, layer in self.layers(model).items() if n in changed}
        hooks, ran = self._measured(model, replay, layers)
        grams = {}
        for name, moments in hooks.moments.items():
            examples = hooks.examples[name]
            # Replacing one example moves the mean by at most this much (Frobenius norm): two Grams
            # of trace up to clip * width differ most when they have nothing in common. A model that
            # is called twice counts an example twice, but it is one example that is replaced.
            moved = math.sqrt(2) * (self.clip or 0.0) * moments.width / min(ran, examples)
            inputs = layers[name].inputs(selection)
            grams[name] = moments.gram(examples, inputs, self.noise * moved)
        return self.codec.encode(grams, hooks.same_input)

    def _measured(
        self, model: nn.Module, replay: Replay, layers: Mapping[str, LinearLayer]
    ) -> tuple[GramHooks, int]:
        """Hooks that have seen the examples, and how many there were.

        Where a batch may not be enough to tell examples apart, there is a batch for each.
        """
        single = one_by_one(replay)
        if self.clip is None or single is None:
            try:
                return self._watch(model, replay, layers, single=False)
            except UnclearError:
                if single is None:
                    raise
        return self._watch(model, single, layers, single=True)

    def _watch(
        self, model: nn.Module, replay: Replay, layers: Mapping[str, LinearLayer], *, single: bool
    ) -> tuple[GramHooks, int]:
        hooks = GramHooks(model, layers, self.form, self.size, self.clip)
        ran = 0
        with hooks.watching():
            for batch in replay(model, self.examples):
                ran += 1 if single else len(next(iter(batch.values())))
                hooks.begin_batch(batch.get("attention_mask"), batch, single=single)
        return hooks, ran

    def sums(
        self,
        model: nn.Module,
        shapes: Mapping[str, torch.Size],
        average: Average,
        shared_masks: bool,
    ) -> Callable[[], RegMeanSums]:
        """See :class:`~fedveil.aggregation.base.Aggregation`."""
        return partial(RegMeanSums, shapes, self.layers(model), self, average, shared_masks)

    def beside(self, model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, int]:
        """The Gram of each layer: layers that share their input send one."""
        numbers: dict[str, int] = {}
        for name, layer in self.layers(model).items():
            if name in shapes:
                numbers |= self.codec.beside(name, layer.matrix_shape(shapes[name])[1])
        return numbers

    def layers(self, model: nn.Module) -> dict[str, LinearLayer]:
        """The linear layers of a model that are solved for, by weight name.

        Raises:
            ConfigurationError: If a pattern in ``exclude`` matches none.
        """
        layers = linear_layers(model)
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise _impossible("exclude", "patterns that match linear weights", pattern)
        return {
            name: layer
            for name, layer in layers.items()
            if not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        }


class RegMeanSums:
    """A round's updates and Grams as running sums; steps by least squares.

    Args:
        shapes: Shapes of all tensors that are trained.
        layers: Linear layers; those among ``shapes`` are solved for.
        settings: Off-diagonal factor, ridge, form.
        average: How everything else is averaged; see
            :class:`~fedveil.aggregation.mean.StreamingMean`.
        shared_masks: Whether few distinct masks are in use. Then there is a system of equations for
            each, and each output is solved over exactly the clients that held it. Otherwise all
            clients share one system, whose right-hand sides are scaled up by the share of weight
            that held an element, among those who held its input: exact where Grams are alike and
            inputs uncut, and where Grams are diagonal. An element that nobody held stays at zero.

    Sums are float32, systems are solved in float64. The order of :meth:`add` changes last bits.

    Does NOT protect: where a single client of a round has some mask, that sum is its own.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        layers: Mapping[str, LinearLayer],
        settings: RegMean,
        average: Average = "holders",
        shared_masks: bool = True,
    ) -> None:
        self._layers = {name: layer for name, layer in layers.items() if name in shapes}
        self._shapes, self._settings, self._shared = dict(shapes), settings, shared_masks
        others = {name: shape for name, shape in shapes.items() if name not in self._layers}
        self._others = StreamingMean(others, average)
        self._systems: dict[str, dict[bytes, _System]] = {name: {} for name in self._layers}

    @property
    def clients(self) -> int:
        """How many clients' updates are in the sums."""
        return self._others.clients

    def read(
        self, reply: Message, selection: Selection
    ) -> tuple[dict[str, Section], dict[str, Gram]]:
        """See :class:`~fedveil.aggregation.base.Sums`."""
        return self._settings.codec.decode(reply, self._layers, self._shapes, selection)

    def sizes(self, statistics: Mapping[str, Gram]) -> dict[str, float]:
        """The trace of each layer's Gram: how strongly the client's data excite it."""
        return {name: float(gram.diagonal.sum()) for name, gram in statistics.items()}

    def add(
        self,
        updates: Mapping[str, Tensor],
        selection: Selection,
        weight: float,
        statistics: Mapping[str, Gram],
        scales: Scales = WHOLE,
    ) -> None:
        """Add one client's updates, on released elements, and its Grams by weight name.

        A layer without a Gram never fired on the client's data: it counts for next to nothing.
        """
        self._others.add(updates, selection, weight, scales=scales)
        last, blocks = None, []
        for name in (name for name in self._layers if name in updates):
            system = self._system_of(name, selection)
            gram = statistics.get(name) or Gram.nothing(system.bounds_of(selection))
            if gram is not last:  # query, key and value come one after the other
                blocks = gram.dense(self._settings.off_diagonal, self._settings.ridge)
            last = gram
            gram_scale = scales.statistics.get(name, 1.0)
            system.add(updates[name], selection, weight, blocks, scales.update, gram_scale)

    def mean(self, name: str) -> Tensor | None:
        """The step of one tensor at its full shape, or None if no client changed it."""
        if name not in self._layers:
            return self._others.mean(name)
        systems = list(self._systems[name].values())
        if not systems:
            return None
        layer, shape = self._layers[name], self._shapes[name]
        matrix = torch.zeros(layer.matrix_shape(shape))
        for outputs, members in _holders(systems):
            matrix[outputs] = _solve(members, outputs)
        return layer.weight(matrix, shape)

    def _system_of(self, name: str, selection: Selection) -> _System:
        """The system of all clients with the same outputs; a common one if each has its own."""
        layer = self._layers[name]
        outputs = layer.outputs(selection)
        key = outputs.numpy().tobytes() if self._shared and outputs is not None else b""
        systems = self._systems[name]
        if key not in systems:
            systems[key] = _System(layer, layer.matrix_shape(self._shapes[name]), self._settings)
        return systems[key]


# The largest weights, squares and updates that are taken would add up beyond float32. A power of
# two changes no digit of the step.
_SCALE = 2.0**-33


class _System:
    """Sums over clients for one layer: Grams, and Grams times updates, block by block."""

    def __init__(self, layer: LinearLayer, shape: tuple[int, int], settings: RegMean) -> None:
        outputs, inputs = shape
        self._layer = layer
        self.bounds = block_bounds(inputs, settings.form, settings.size)
        sizes = [stop - start for start, stop in pairwise(self.bounds)]
        self.grams = [torch.zeros(size, size) for size in sizes]
        self.products = [torch.zeros(outputs, size) for size in sizes]
        # Weight that held each output and each input; and each element, where both axes are cut.
        self.held, self.held_inputs = torch.zeros(outputs), torch.zeros(inputs)
        self.held_elements: Tensor | None = None
        self.weight = 0.0

    def bounds_of(self, selection: Selection) -> tuple[int, ...]:
        """Where blocks begin and end among the inputs that a client holds."""
        return restrict(self.bounds, self._layer.inputs(selection))

    def add(
        self,
        update: Tensor,
        selection: Selection,
        weight: float,
        blocks: Sequence[Tensor],
        update_scale: float,
        gram_scale: float,
    ) -> None:
        """Add one client's update of the weight and its Gram's blocks, on released elements."""
        matrix = self._layer.matrix(update).float()
        outputs = _all_unless(self._layer.outputs(selection), len(self.held))
        released = _all_unless(self._layer.inputs(selection), self.bounds[-1])
        weight *= _SCALE
        excited = weight * gram_scale
        bounds = pairwise(self.bounds_of(selection))
        for number, ((start, stop), block) in enumerate(zip(bounds, blocks, strict=True)):
            inside = released[start:stop] - self.bounds[number]
            gram, product, part = self.grams[number], self.products[number], matrix[:, start:stop]
            if block.shape == gram.shape:
                gram.add_(block, alpha=excited)
            else:
                gram[inside[:, None], inside] += excited * block
            if part.shape == product.shape:
                product.addmm_(part, block, alpha=excited * update_scale)
            else:
                product[outputs[:, None], inside] += excited * update_scale * (part @ block)
        self.held[outputs] += weight
        self.held_inputs[released] += weight
        self.weight += weight
        if len(selection.positions(self._layer.name)) == 2:
            if self.held_elements is None:
                self.held_elements = torch.zeros(len(self.held), len(self.held_inputs))
            self.held_elements[outputs[:, None], released] += weight


def _holders(systems: Sequence[_System]) -> Iterator[tuple[Tensor, list[_System]]]:
    """Outputs (int64) with the systems of those that held them; outputs of nobody are left out."""
    held = torch.stack([system.held > 0 for system in systems], dim=1).tolist()
    outputs: dict[tuple[bool, ...], list[int]] = defaultdict(list)
    for output, pattern in enumerate(held):
        outputs[tuple(pattern)].append(output)
    for pattern, those in outputs.items():
        members = [system for system, holds in zip(systems, pattern, strict=True) if holds]
        if members:
            yield torch.tensor(those), members


def _solve(members: Sequence[_System], outputs: Tensor) -> Tensor:
    """The steps of these outputs, float32 [outputs, inputs]."""
    # Clients of one system may have held different elements, which then use the Gram of all of
    # them, reduced to the share of weight that held the element.
    share = _share(members, outputs)
    parts = []
    for number, (start, stop) in enumerate(pairwise(members[0].bounds)):
        gram = _sum(m.grams[number] for m in members)
        product = _sum(m.products[number][outputs] for m in members)
        part = share[:, start:stop] if share.shape[1] > 1 else share
        nobodys = part == 0
        solution = _solve_positive(gram, product.div_(part.masked_fill(nobodys, 1.0)).t()).t()
        parts.append(solution.masked_fill_(nobodys, 0.0).float())
    return torch.cat(parts, dim=1)


def _share(members: Sequence[_System], outputs: Tensor) -> Tensor:
    """Of the weight that held an input, the share that held the element.

    [outputs, inputs], or [outputs, 1] if it is one number for all inputs.
    """
    if members[0].held_elements is None:
        return (_sum(m.held[outputs] for m in members) / sum(m.weight for m in members))[:, None]
    elements = _sum(m.held_elements[outputs] for m in members if m.held_elements is not None)
    inputs = _sum(m.held_inputs for m in members)
    return elements.div_(inputs.masked_fill(inputs == 0, 1.0))


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """The sum in float64, in memory of its own."""
    first, *others = parts
    total = first.to(torch.float64, copy=True)
    for part in others:
        total += part
    return total


def _solve_positive(gram: Tensor, right: Tensor) -> Tensor:
    """Solve ``gram @ x = right``; inputs that nobody was sent stay at exactly zero."""
    seen = torch.nonzero(gram.diagonal() > 0).flatten()
    if len(seen) == len(gram):
        return torch.cholesky_solve(right, _cholesky(gram))
    solution = torch.zeros_like(right)
    if len(seen):
        solution[seen] = torch.cholesky_solve(right[seen], _cholesky(gram[seen][:, seen]))
    return solution


def _cholesky(gram: Tensor) -> Tensor:
    """A lower triangular factor; what rounding or noise made negative is lifted first."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    lift = 1e-6 * gram.diagonal().mean()
    while failed:
        lifted = gram + lift * torch.eye(len(gram), dtype=gram.dtype)
        factor, failed = torch.linalg.cholesky_ex(lifted)
        lift *= 10
    lower: Tensor = factor
    return lower


def _all_unless(positions: Tensor | None, count: int) -> Tensor:
    return torch.arange(count) if positions is None else positions


def _check_number(name: str, value: float, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or value == math.inf:
        top = f" to {high:g}" if high < math.inf else ""
        raise _impossible(name, f"a number from {low:g}{top}", value)


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise _impossible(name, "a whole number of at least 1", value)


def _impossible(name: str, expected: str, found: object) -> ConfigurationError:
    return ConfigurationError(
        f"The setting {name!r} is impossible", expected=expected, found=repr(found), where="RegMean"
    )
