"""Whether unit groups are right, found out by running the model.

`fedveil.units.check` looks at shapes, which cannot tell whether tensors belong together. Here the
model runs with some units of each group withheld, that is, zero in every slice, and with

1. anything in the slices that compute them: nothing but the slices that read them may notice;
2. anything in the slices that read them: there must be nothing to read, or always the same;
3. derivatives: a tensor that does nothing for exactly the withheld units belongs to them, and would
   be sent although they are not.

Numbers are compared bit for bit, as all that is added is zero times something.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError
from fedveil.units.adapters import is_idle
from fedveil.units.examples import Run, runs_of
from fedveil.units.group import Slice, UnitGroup
from fedveil.units.layers import CONVOLUTIONS, input_axis
from fedveil.units.probe import Probe, Watch

__all__ = ["NO_RULE_NEEDED", "Run", "UntriedError", "try_units", "withheld"]

NO_RULE_NEEDED = (
    "Where nothing is withheld (public=... with rates of 0, as by default, or FedAvg) no rule is "
    "needed."
)
"""For errors about rules: what does without any."""

Fill = Literal["zeros", "computing", "reading"]
"""What withheld units hold: zeros, or any numbers at the side that computes, or reads, them."""

_TRIED: WeakKeyDictionary[nn.Module, tuple[object, ...]]
_TRIED = WeakKeyDictionary()
"""What was tried of a model: it does not depend on values."""


def try_units(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    run: Run | None = None,
    *,
    shared: Iterable[str] = (),
) -> None:
    """Refuse groups that do not hold everything about their units, or hold something else.

    Of kinds "neurons", "heads" and "channels" nothing of a withheld unit may reach the output, nor
    may anything of it be left in what is not cut. Of "columns" a withheld one is a zero in its
    layer's output, and what reads that is released.

    It takes some forward passes and two backward passes in float32, and for that time the memory of
    two more copies. The model comes out as it was. What was tried of a model is not tried again.

    What it does NOT find: whole numbers in buffers that belong to units, what reads one only while
    the model trains, and what the inputs do not reach. Of blocks that are built alike one must be
    reached, of experts for instance; if none is, that is an error.

    Args:
        model: on any device, in training or not. Its values are of no account: while it is tried it
            has others.
        groups: its groups, as `fedveil.units.find_units` gives them.
        run: runs a model on an example where the model itself does not say what it reads.
        shared: parts of the names of tensors that hold something of units, and are released all
            the same, as several groups share them: see :class:`fedveil.units.Rule`.

    Raises:
        ConfigurationError: a group is wrong, and which layer tells so.
        UntriedError: there is no input to try it with.
    """
    groups = tuple(groups)
    shapes = [(name, tensor.shape) for name, tensor in model.state_dict().items()]
    looks = groups, shapes, tuple(shared)
    if not groups or _TRIED.get(model) == looks:
        return
    problem = "no input, and no way to make one"
    for name, attempt in runs_of(model, run):
        # Of values that a model came with nothing may show; of others, in a deep net.
        for drawn in (True, False):
            try:
                with Probe(model, drawn=drawn) as probe:
                    _Trial(model, groups, attempt, tuple(shared), probe).judge()
            except _WrongError as error:
                raise error.told from None
            except Exception as error:  # the model's own forward: it may raise anything
                problem = f"with {name}: {str(error)[:200] or type(error).__name__}"
                continue
            _TRIED[model] = looks
            return
    raise UntriedError(
        "Units that may be withheld are tried before anything is released, and nothing that this "
        "model was run with tells of all of them",
        expected="an input that makes use of every kind of unit",
        found=problem,
        where=type(model).__name__,
        fix="Give the model an example whose numbers are not all alike: model.example_inputs = a "
        f"dictionary of what it is called with, or a tensor. {NO_RULE_NEEDED}",
    )


class UntriedError(ConfigurationError):
    """Units were found, and there is no input with which to see whether they are units."""


class _WrongError(Exception):
    """A group is wrong, whatever else one would try."""

    def __init__(self, told: ConfigurationError) -> None:
        super().__init__(str(told))
        self.told = told


class _Trial:
    """One input, and groups to be tried with it."""

    def __init__(
        self,
        model: nn.Module,
        groups: tuple[UnitGroup, ...],
        run: Run,
        shared: tuple[str, ...],
        probe: Probe,
    ) -> None:
        self._model, self._groups, self._shared = model, groups, shared
        self._run, self._probe = run, probe
        self._used: dict[str, dict[int, Tensor]] = {}

    def judge(self) -> None:
        """Raise for the first group that is wrong.

        Raises:
            _WrongError: a group is.
            ValueError: this input does not tell.
        """
        self._used = self._probe.used(self._run)
        self._check_reached()
        self._withhold("zeros")
        with Watch(self._model, self._last_layers()) as written, self._watch_readers() as read:
            still = self._answer()
        self._check_columns(written)
        self._check_fill("computing", still)
        steady = self._steady_readers(read)
        if any(cut.tensor not in steady for _, cut in self._readers()):
            self._check_fill("reading", still, steady)
        suspects = self._suspects()
        # A position may also be idle by accident: of other units it then is not.
        again = self._suspects(others=True) if suspects else {}
        both = next((place for place in suspects if place in again), None)
        if both is not None:
            raise _WrongError(_left_out(both[0], suspects[both]))
        self._check_without_derivative()

    def _check_reached(self) -> None:
        """Whether the input tells of every group, or of one that is built alike."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        reached: dict[object, bool] = defaultdict(bool)
        for group in self._groups:
            cuts = [
                cut
                for cut in group.slices
                if cut.tensor in self._used and not is_idle(cut.tensor, modules)
            ]
            reached[_build(group)] |= all(self._used[c.tensor][c.axis].any() for c in cuts)
        for group in self._groups:
            if not reached[_build(group)]:
                raise ValueError(f"nothing reaches {group.name!r}")

    def _check_fill(
        self, fill: Fill, still: list[Tensor], steady: Collection[str] = frozenset()
    ) -> None:
        """Whether the answer is the same with something else in the place of withheld units."""
        self._withhold(fill, steady=steady)
        if _same(self._answer(), still):
            return
        if not _same(self._answer(), self._answer()):
            raise ValueError("the model answers the same input differently each time")
        raise _WrongError(self._differing(fill, steady))

    def _readers(self) -> Iterator[tuple[UnitGroup, Slice]]:
        for group in self._groups:
            if group.kind != "columns":
                yield from ((group, cut) for cut in group.slices if cut.scaled)

    def _watch_readers(self) -> Watch:
        modules = dict(self._model.named_modules(remove_duplicate=False))
        layers = {
            _layer(cut)
            for _, cut in self._readers()
            if cut.tensor.endswith(".weight") and input_axis(modules[_layer(cut)]) == cut.axis
        }
        return Watch(self._model, layers, inputs=True)

    def _steady_readers(self, watch: Watch) -> set[str]:
        """Weights that read the same, whatever the input is, where units are withheld.

        That need not be zero: behind a sigmoid it is not. It says nothing, as long as what computes
        it is withheld.
        """
        cuts = {_layer(cut): (cut, withheld(group)) for group, cut in self._readers()}
        steady: dict[str, bool] = {}
        for layer, value in watch.calls:
            cut, gone = cuts[layer]
            axis = 1 if isinstance(watch.modules[layer], CONVOLUTIONS) else value.dim() - 1
            read = value.movedim(axis, 0)[cut.indices(gone).to(value.device)].flatten(1)
            steady[cut.tensor] = steady.get(cut.tensor, True) and bool((read == read[:, :1]).all())
        return {tensor for tensor, is_steady in steady.items() if is_steady}

    def _answer(self) -> list[Tensor]:
        answer = self._probe.outputs(self._run)
        if not any(bool(one.isfinite().all()) for one in answer if one.numel()):
            raise ValueError("the model's answer is not finite")
        return answer

    def _withhold(
        self, fill: Fill, *, others: bool = False, steady: Collection[str] = frozenset()
    ) -> None:
        self._probe.reset()
        for group in self._groups:
            gone = withheld(group, others=others)
            for cut in group.slices:
                mine = fill == ("reading" if cut.scaled else "computing")
                mine = mine and group.kind != "columns" and cut.tensor not in steady
                self._probe.fill(cut, gone, random=mine)

    def _last_layers(self) -> dict[str, UnitGroup]:
        return {_last_layer(group): group for group in self._groups if group.kind == "columns"}

    def _check_columns(self, watch: Watch) -> None:
        """Whether what a layer puts out for a withheld column is zero."""
        last = self._last_layers()
        for layer, output in watch.calls:
            group, module = last[layer], watch.modules[layer]
            channels = isinstance(module, (*CONVOLUTIONS, nn.modules.batchnorm._BatchNorm))
            axis = 1 if channels else output.dim() - 1
            gone = withheld(group).to(output.device)
            if output.shape[axis] == group.size and output.index_select(axis, gone).any():
                raise _WrongError(_not_zero(layer, group))

    def _differing(self, fill: Fill, steady: Collection[str]) -> ConfigurationError:
        """The error for the first layer, in the order of computation, that should not differ."""
        layers = [
            name
            for name, module in self._model.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        ]
        calls = []
        fills: tuple[Fill, ...] = ("zeros", fill)
        for each in fills:
            self._withhold(each, steady=steady)
            with Watch(self._model, layers) as watch:
                self._answer()
            calls.append(watch.calls)
        # What computes a withheld unit may differ; its readers, and everything else, may not.
        cuts = [cut for group in self._groups for cut in group.slices if group.kind != "columns"]
        free = {_layer(cut) for cut in cuts if not cut.scaled and fill == "computing"}
        differ = (
            name
            for (name, one), (_, other) in zip(*calls, strict=False)
            if name not in free and not _same([one], [other])
        )
        return _wrong(next(differ, "the model's output"), fill)

    def _suspects(self, *, others: bool = False) -> dict[tuple[str, int, int, int], UnitGroup]:
        """Where something is not cut, and does nothing for just the units that are withheld.

        The key is a tensor, an axis, in how many parts the units lie on it, and which it is.
        """
        self._withhold("zeros", others=others)
        cut = {(c.tensor, c.axis) for group in self._groups for c in group.slices}
        # What reads a column is idle where it is withheld, too, and is released: it tells nothing.
        groups = [group for group in self._groups if group.kind != "columns" and group.size > 1]
        found: dict[tuple[str, int, int, int], UnitGroup] = {}
        for name, axes in self._probe.used(self._run).items():
            for axis, used in axes.items():
                before = self._used[name][axis]
                idle = bool((before & ~used).any())
                if (name, axis) in cut or not idle or any(s in name for s in self._shared):
                    continue
                for group in groups:
                    gone = withheld(group, others=others)
                    for place, was, now in _readings(before, used, group.size):
                        if _are_just(gone, was, now):
                            found.setdefault((name, axis, *place), group)
        return found

    def _check_without_derivative(self) -> None:
        """Whether a buffer, or what a detached or a hard gate reads, belongs to units.

        Derivatives say nothing of these. What belongs to units does nothing where they are
        withheld, whatever it holds there, and something where they are not.
        """
        sent = self._model.state_dict()
        cut = {(c.tensor, c.axis) for group in self._groups for c in group.slices}
        places = (
            (name, axis, length)
            for name, tensor in self._probe.without_derivatives(self._used)
            if name in sent and not any(part in name for part in self._shared)
            for axis, length in enumerate(tensor.shape)
            if (name, axis) not in cut
        )
        groups = [group for group in self._groups if group.kind != "columns" and group.size > 1]
        for name, axis, length in places:
            for group in groups:
                for place in _layouts(name, axis, length, group.size):
                    if all(self._is_just_of(group, place, others=o) for o in (False, True)):
                        raise _WrongError(_left_out(name, group))

    def _is_just_of(self, group: UnitGroup, place: Slice, *, others: bool) -> bool:
        """Whether a tensor has a say where units are, and none where they are withheld."""
        gone, rest = withheld(group, others=others), withheld(group, others=not others)
        self._withhold("zeros", others=others)
        still = self._answer()
        self._probe.fill(place, gone, random=True)
        if not _same(self._answer(), still):
            return False
        self._withhold("zeros", others=others)
        self._probe.fill(place, rest, random=True)
        return not _same(self._answer(), still)


_PARTS = (1, 2, 3, 4)
"""In how many parts, one after the other, a tensor may hold something of each unit."""


def _layouts(name: str, axis: int, length: int, size: int) -> Iterator[Slice]:
    """Ways in which units may lie on an axis, one for each part of it."""
    for parts in (parts for parts in _PARTS if length % (size * parts) == 0):
        width = length // (size * parts)
        yield from (Slice(name, axis, width, part * size * width) for part in range(parts))


def _readings(
    before: Tensor, now: Tensor, size: int
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """Ways in which units may lie on an axis, and which units then had, and have, a say."""
    for parts in _PARTS:
        if len(now) % (size * parts) == 0:
            views = zip(before.view(parts, size, -1), now.view(parts, size, -1), strict=True)
            for part, (one, other) in enumerate(views):
                yield (parts, part), one.any(dim=1), other.any(dim=1)


def _are_just(gone: Tensor, before: Tensor, now: Tensor) -> bool:
    """Whether the withheld units, and few others, have no say any more, though they had one."""
    mask = torch.zeros(len(now), dtype=torch.bool)
    mask[gone] = True
    lost = before & ~now
    most = 2 * int(before[mask].sum()) >= int(mask.sum())
    return most and not bool(now[mask].any()) and 2 * int(lost[~mask].sum()) < len(now[~mask])


def withheld(group: UnitGroup, *, others: bool = False) -> Tensor:
    """Half of a group's units, drawn for each group by itself; or the other half."""
    generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
    order = torch.randperm(group.size, generator=generator)
    half = max(group.size // 2, 1)
    return (order[half:] if others and group.size > 1 else order[:half]).sort().values


def _build(group: UnitGroup) -> object:
    """What groups of blocks that are built alike have in common: all but the blocks' numbers."""

    def plain(name: str) -> str:
        return ".".join("*" if part.isdigit() else part for part in name.split("."))

    cuts = tuple((plain(c.tensor), c.axis, c.width, c.offset) for c in group.slices)
    return plain(group.name), group.kind, group.size, cuts


def _layer(cut: Slice) -> str:
    return cut.tensor.rpartition(".")[0]


def _last_layer(group: UnitGroup) -> str:
    """The last layer of a group of columns: a norm behind embeddings, if there is one."""
    layers = [_layer(cut) for cut in group.slices if cut.tensor.endswith(".weight")]
    return layers[-1] if layers else ""


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(
        one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
        for one, other in zip(some, others, strict=True)
    )


_FIX = (
    "Correct the rule: `outputs` are all layers that compute a unit (gates and norms too), "
    "`inputs` all that read it, `units` how many there are, `fused` how they lie in a layer that "
    "holds several. `fedveil units` tries a rule. " + NO_RULE_NEEDED
)

_PROBLEMS: Mapping[Fill, str] = {
    "computing": "what a withheld unit computes is still read",
    "reading": "where a withheld unit is read there is something else",
}


def _wrong(layer: str, fill: Fill) -> ConfigurationError:
    return ConfigurationError(
        f"A rule for units is wrong: {_PROBLEMS[fill]}",
        expected="the same output, whatever is in the place of withheld units",
        found="another output",
        where=layer,
        fix=_FIX,
    )


def _not_zero(layer: str, group: UnitGroup) -> ConfigurationError:
    return ConfigurationError(
        "A rule for units is wrong: a withheld column is not zero in what its layer puts out",
        where=layer,
        found=f"unit group {group.name!r}",
        fix=_FIX,
    )


def _left_out(tensor: str, group: UnitGroup) -> ConfigurationError:
    return ConfigurationError(
        "A rule for units is wrong: it leaves out something that belongs to them, and that would "
        "be sent although they are withheld",
        expected=f"it among the layers of unit group {group.name!r}",
        found="a tensor that does nothing where they are withheld",
        where=tensor,
        fix=_FIX,
    )
