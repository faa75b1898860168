"""What a cut of a plain net takes for granted of its batches, checked while it is trained.

A net does not say what it will be given. Units lie where `fedveil.units.steps` says if the first
axis counts samples and, behind a Linear that a batch norm or a PReLU per unit follows, if a sample
is one row: with rows [batch, tokens, features], those two work on tokens. Where the sizes happen to
be equal nothing fails, and another thing than the unit would be zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError
from fedveil.units.group import UnitGroup
from fedveil.units.layers import CONVOLUTIONS

__all__ = ["rows_checked"]

Unhook = Callable[[], None]


@contextmanager
def rows_checked(model: nn.Module, groups: Iterable[UnitGroup]) -> Iterator[None]:
    """Check inside, whenever the model runs, that its batches are what its units were found for.

    Args:
        model: at its full size, or smaller by withheld units.
        groups: its unit groups.

    Raises:
        ConfigurationError: by the model's forward, inside: a convolution is given a single sample
            without a batch axis, what a layer reads of a convolution is not one row per sample, or
            a batch norm or PReLU behind a Linear works on another axis than the units'.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    with ExitStack() as stack:
        for group in groups:
            for unhook in _watch(group, modules):
                stack.callback(unhook)
        yield


def _watch(group: UnitGroup, modules: Mapping[str, nn.Module]) -> Iterator[Unhook]:
    """Look at what the layers of one group are given, from now on; how to stop."""
    names = list(dict.fromkeys(cut.tensor.rpartition(".")[0] for cut in group.slices))
    source, reader = names[0], names[-1]
    if isinstance(modules.get(source), CONVOLUTIONS):
        rows: list[int] = []
        yield modules[source].register_forward_hook(partial(_note_batch, source, rows)).remove
        if isinstance(modules.get(reader), nn.Linear):
            check = partial(_check_rows, reader, rows)
            yield modules[reader].register_forward_pre_hook(check).remove
    elif isinstance(modules.get(source), nn.Linear):
        for name in names:
            if isinstance(modules.get(name), nn.BatchNorm1d | nn.PReLU):
                yield modules[name].register_forward_pre_hook(partial(_check_axis, name)).remove


def _note_batch(
    name: str, rows: list[int], module: nn.Module, args: tuple[Tensor, ...], out: Tensor
) -> None:
    assert isinstance(module, CONVOLUTIONS)
    if out.dim() != len(module.kernel_size) + 2:
        raise _misplaced(name, "[batch, channels, ...]", out)
    rows[:] = [out.shape[0]]


def _check_rows(name: str, rows: list[int], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    # More axes are of a rule of one's own, for a net that makes tokens of positions.
    if args and rows and args[0].dim() == 2 and args[0].shape[0] != rows[0]:
        raise _misplaced(name, f"[{rows[0]}, features], one row per sample", args[0])


def _check_axis(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    assert isinstance(module, nn.BatchNorm1d | nn.PReLU)
    size = module.num_features if isinstance(module, nn.BatchNorm1d) else module.num_parameters
    shape = args[0].shape if args else torch.Size()
    # A net with a rule may turn tokens around before and after: [batch, features, tokens].
    turned = len(shape) > 2 and shape[1] == size != shape[-1]
    if len(shape) > 2 and not turned:
        raise _misplaced(name, "[batch, features]", args[0])


def _misplaced(name: str, expected: str, found: Tensor) -> ConfigurationError:
    return ConfigurationError(
        "units of this model do not lie where they were found, since its batches are of a shape "
        "that no net tells beforehand",
        expected=expected,
        found=str(list(found.shape)),
        where=name,
        fix="Write a rule for this model that leaves the layer out (fedveil.units.Rule), or let "
        "its forward give the layer one row per sample.",
    )
