"""Tables about things that lie around: the units of a model, the content of a message."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fedveil.quantization import QuantizedTensor
from fedveil.report.words import human_bytes, human_percent
from fedveil.units import UnitGroup
from fedveil.wire import Message, UnitIndex
from fedveil.wire.sections import Section

__all__ = ["message_table", "unit_table"]


def unit_table(state: Mapping[str, Tensor], groups: Sequence[UnitGroup]) -> Table:
    """One row per unit group, and how much of the model all of them are.

    Args:
        state: The model's tensors by name.
        groups: Its unit groups.
    """
    rows = [
        (
            group.name,
            group.kind,
            f"{group.size:,}",
            f"{_numbers_per_unit(group, state):,}",
            "\n".join(f"{_short(part.tensor, group.name)}[{part.axis}]" for part in group.slices),
        )
        for group in groups
    ]
    whole = sum(tensor.numel() for tensor in state.values())
    cut = _cut_numbers(groups, state)
    caption = (
        f"{cut:,} of {whole:,} numbers ({100 * cut / max(whole, 1):.1f} %) belong to units and can "
        "be withheld; all others are sent to every client.\n"
        f"{_sent_whole(groups, state)}A unit is withheld whole: its slice "
        "of each tensor listed, along the axis in brackets (… stands for what the group's name "
        "begins with)."
    )
    numeric = ("Units", "Numbers\nper unit")
    return _table(("Group", "Kind", *numeric, "Tensors"), rows, numeric, caption)


def _sent_whole(groups: Sequence[UnitGroup], state: Mapping[str, Tensor]) -> str:
    """A line on the weights that no group cuts, layers of one kind together."""
    cut = {part.tensor for group in groups for part in group.slices}
    names = (name for name, tensor in state.items() if name not in cut and tensor.dim() > 1)
    kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return f"Weights that no unit has a part of: {', '.join(kinds)}.\n" if kinds else ""


def message_table(message: Message, size: int) -> Table:
    """What a message says, and one row per section.

    Args:
        message: The message.
        size: Its bytes on the wire.
    """
    rows = [(name, *_describe(section)) for name, section in message.sections.items()]
    title = (
        f"{message.kind} of scheme {message.scheme}, round {message.round}, "
        f"client {message.client}: {len(rows)} sections, {human_bytes(size)} ({size:,} bytes)"
    )
    # A text as Python writes it: what a stranger sent must not steer the terminal.
    scalars = "\n".join(f"{name} = {value!r}" for name, value in message.scalars.items())
    table = _table(("Section", "Content", "Shape", "Bytes"), rows, ("Bytes",), scalars)
    table.title, table.title_justify, table.title_style = Text(title), "left", "bold"
    return table


def _table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[str], caption: str
) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        caption=Text("\n" + caption) if caption else None,
        caption_justify="left",
        caption_style="",
    )
    for header in headers:
        # Names are folded rather than cut: they are there to be copied.
        table.add_column(header, justify="right" if header in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _short(tensor: str, group: str) -> str:
    """A tensor's name without the dotted parts that it shares with its group's."""
    mine, theirs = tensor.split("."), group.split(".")
    same = 0
    while same < min(len(mine) - 1, len(theirs)) and mine[same] == theirs[same]:
        same += 1
    return ".".join(["…", *mine[same:]]) if same else tensor


def _describe(section: Section) -> tuple[str, str, str]:
    if isinstance(section, UnitIndex):
        released, size = section.released.numel(), section.size
        share = human_percent(100 * released / max(size, 1), sign=True)
        scaled = f", scale {section.scale:g}" if section.scale != 1 else ""
        return (
            f"index: {released} of {size} units released ({share}){scaled}",
            "",
            _bytes(math.ceil(size / 8)),
        )
    if isinstance(section, QuantizedTensor):
        content = f"{section.bits} bits, blocks of {section.block} along axis {section.axis}"
        return content, _shape(section.shape), _bytes(section.nbytes)
    kind = type(section).__name__.lower()
    tensor = section.tensor
    content = f"{kind} {str(tensor.dtype).removeprefix('torch.')}"
    return content, _shape(tensor.shape), _bytes(tensor.numel() * tensor.element_size())


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _bytes(count: int) -> str:
    return f"{count:,}"


def _numbers_per_unit(group: UnitGroup, state: Mapping[str, Tensor]) -> int:
    seen = {part for part in group.slices if part.tensor in state}
    return sum(
        part.width * state[part.tensor].numel() // state[part.tensor].shape[part.axis]
        for part in seen
    )


def _cut_numbers(groups: Sequence[UnitGroup], state: Mapping[str, Tensor]) -> int:
    """Numbers that belong to a unit; where a tensor is cut along two axes, they count once."""
    positions: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for group in groups:
        for part in group.slices:
            if part.tensor in state:
                positions[part.tensor][part.axis] += part.width * group.size
    total = 0
    for name, axes in positions.items():
        shape = state[name].shape
        rest = math.prod(size - axes.get(axis, 0) for axis, size in enumerate(shape))
        total += state[name].numel() - rest
    return total
