"""One example at a time: what a model was called with, cut down to each example without padding.

Inside a model an example's place cannot be told for certain: layers see time first, tokens of all
examples in one axis, some tokens of some, or another sequence than the batch's mask is of. What the
model is called with can be cut, and what layers see of one example is that example's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError
from fedveil.modes import evaluation_mode

__all__ = ["Alone", "Call", "Known", "UnclearError", "run_alone"]

_IGNORED = -100
# The second sequence of a model with two, in transformers' words and in those of torch.
_DECODER = ("decoder_", "tgt", "target", "trg", "output", "answer", "completion", "summar")
# One number per layer and head, of no example.
_OF_NO_EXAMPLE = ("head_mask", "decoder_head_mask", "cross_attn_head_mask")
_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device)


class UnclearError(ConfigurationError):
    """Which positions are of which example, or padding, cannot be told for certain."""


@dataclass(frozen=True)
class Known:
    """What is known of a batch besides what the model is called with.

    Attributes:
        mask: [examples, positions], 0 where there is padding; None if nothing says.
        batch: All tensors of the batch, if they are known; each begins with the examples.
        single: Whether the batch is of one example, whatever its tensors' axes are.
    """

    mask: Tensor | None = None
    batch: Mapping[str, Tensor] | None = None
    single: bool = False

    @property
    def padded(self) -> bool:
        """Whether the mask leaves anything out."""
        return self.mask is not None and not bool((self.mask != 0).all())

    def size(self) -> int | None:
        """How many examples there are, if anything says so.

        Raises:
            UnclearError: The batch's tensors contradict each other.
        """
        if self.single:
            return 1
        tensors = {
            name: tensor
            for name, tensor in (self.batch or {}).items()
            if isinstance(tensor, Tensor) and tensor.dim()
        }
        found = {len(tensor) for tensor in tensors.values()}
        if len(found) > 1:
            sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            raise _unclear("The tensors of a batch do not all begin with its examples", sizes)
        if found:
            return found.pop()
        return None if self.mask is None else len(self.mask)


class Alone(NamedTuple):
    """What a model is called with for one example.

    Attributes:
        args: Positional arguments.
        kwargs: Arguments by name.
        empty: Whether all of it is padding, which is left in then.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    empty: bool


class Call:
    """One call of a model, which can be taken apart into its examples.

    Padding is what the attention mask leaves out at the ends of a sequence. In the second sequence
    of an encoder-decoder model it is what comes after the last position that predicts a label; what
    comes before feeds those that do. Without labels it is what is left out by the decoder's own
    mask, or else the padding tokens at the end, and the end token before them, which predicts
    nothing.

    Args:
        model: What is called.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        known: What else is known of the batch.

    Raises:
        UnclearError: A mask cannot be understood, or the examples of the batch not be counted.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], known: Known
    ) -> None:
        self.args, self.kwargs = args, dict(kwargs)
        self._model, self._known = model, known
        self._names = _positional_names(model)
        self._tensors = dict(self._named_tensors())
        self.size = self._count()
        self._spans = self._own_spans()

    @property
    def padded(self) -> bool:
        """Whether any example has padding."""
        whole = {stream: (0, length) for stream, (length, _) in self._spans.items()}
        return any(
            span != whole[stream] for stream, (_, spans) in self._spans.items() for span in spans
        )

    def check_separable(self, strict: bool) -> None:
        """Make sure that the call can be taken apart.

        Args:
            strict: Whether nothing may be shared by the examples, as it could be made of them.

        Raises:
            UnclearError: Naming what stands in the way.
        """
        known = self._known
        for name, value in self._leaves():
            if isinstance(value, Tensor):
                if value.dim() == 0 or name in _OF_NO_EXAMPLE or known.single:
                    continue
                if value.layout != torch.strided or value.is_nested:
                    raise _unclear("An input is no plain tensor", f"{name}, {value.layout}")
                if len(value) != self.size:
                    raise _unclear(
                        "An input of the model does not begin with the examples of the batch",
                        f"{name} {list(value.shape)} in a batch of {self.size}",
                    )
                if strict and known.batch is not None and not self._is_given(value):
                    raise _unclear(
                        "An input of the model is not in the batch, so its axes are not known", name
                    )
            elif not isinstance(value, _PLAIN) and not known.single:
                raise _unclear("An input is no tensor", f"{name}, {type(value).__name__}")
        if self.padded:
            self._check_trimmable()

    def examples(self) -> Iterator[Alone]:
        """What the model is called with for each example, without its padding."""
        for number in range(self.size):
            spans = {s: (length, spans[number]) for s, (length, spans) in self._spans.items()}
            empty = any(start == stop for _, (start, stop) in spans.values())
            args = tuple(
                self._cut(self._name(place), value, number, {} if empty else spans)
                for place, value in enumerate(self.args)
            )
            kwargs = {
                name: self._cut(name, value, number, {} if empty else spans)
                for name, value in self.kwargs.items()
            }
            yield Alone(args, kwargs, empty)

    def _name(self, place: int) -> str:
        return self._names[place] if place < len(self._names) else f"argument {place + 1}"

    def _leaves(self) -> Iterator[tuple[str, Any]]:
        for place, value in enumerate(self.args):
            yield from _leaves_of(self._name(place), value)
        for name, value in self.kwargs.items():
            yield from _leaves_of(name, value)

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self._leaves() if isinstance(value, Tensor))

    def _count(self) -> int:
        size = self._known.size()
        if size is not None:
            return size
        if "attention_mask" in self._tensors:
            return len(self._tensors["attention_mask"])
        sizes = {len(t) for n, t in self._tensors.items() if t.dim() and n not in _OF_NO_EXAMPLE}
        if len(sizes) != 1:
            found = ", ".join(f"{name} {list(t.shape)}" for name, t in self._tensors.items())
            raise _unclear("How many examples a batch has cannot be told", found or "no tensors")
        return sizes.pop()

    def _is_given(self, value: Tensor) -> bool:
        given = (self._known.batch or {}).values()
        return any(
            value is own or (value.shape == own.shape and torch.equal(value, own.to(value)))
            for own in given
        )

    def _own_spans(self) -> dict[str, tuple[int, list[tuple[int, int]]]]:
        """By sequence its length, and where each example's part of it begins and ends."""
        spans = {}
        mask = self._mask("attention_mask", "src_key_padding_mask", "key_padding_mask")
        if mask is None or (mask.dim() != 2 and self._known.mask is not None):
            mask = self._known.mask
        if mask is not None:
            _check_mask(mask, self.size)
            spans["encoder"] = (mask.shape[1], _spans_of(mask))
        decoder = [
            t.shape[1] for n, t in self._tensors.items() if self._stream(n) == "decoder"
            and t.dim() >= 2 and n not in _OF_NO_EXAMPLE and len(t) == self.size
        ]  # fmt: skip
        if decoder:
            spans["decoder"] = (decoder[0], self._decoder_spans(decoder[0]))
        return spans

    def _mask(self, own: str, *turned: str) -> Tensor | None:
        """A mask that the model is given, 0 where there is padding; torch's are the other way."""
        if own in self._tensors:
            mask = self._tensors[own]
            # One row per example, for all heads and positions that look at it.
            alike = mask.dim() > 2 and mask.numel() == len(mask) * mask.shape[-1]
            return mask.flatten(1) if alike and mask.dtype == torch.bool else mask
        for name in turned:
            if name in self._tensors and self._tensors[name].dtype == torch.bool:
                return ~self._tensors[name]
        return None

    def _decoder_spans(self, length: int) -> list[tuple[int, int]]:
        shape = (self.size, length)
        spans = [(0, length)] * self.size
        told = False
        mask = self._mask("decoder_attention_mask", "tgt_key_padding_mask")
        if mask is not None and mask.dim() == 2:
            _check_mask(mask, self.size)
            spans, told = _spans_of(mask), True
        labels = self._tensors.get("labels", (self._known.batch or {}).get("labels"))
        if labels is not None and labels.shape == shape and not labels.is_floating_point():
            ends = _ends(labels != _IGNORED)
            return [(min(a, e), min(b, e)) for (a, b), e in zip(spans, ends, strict=True)]
        ids = next(
            (t for n, t in self._tensors.items() if n in ("decoder_input_ids", "tgt", "trg")), None
        )
        if told or ids is None or ids.shape != shape or ids.is_floating_point():
            return spans
        return [(0, end) for end in _ends_by_tokens(ids, getattr(self._model, "config", None))]

    def _stream(self, name: str) -> str:
        second = name.startswith(_DECODER) or (name == "labels" and self._has_decoder())
        return "decoder" if second else "encoder"

    def _has_decoder(self) -> bool:
        config = getattr(self._model, "config", None)
        return "decoder_input_ids" in self._names or bool(
            getattr(config, "is_encoder_decoder", False)
        )

    def _check_trimmable(self) -> None:
        """Padding is taken off only where it is known to be."""
        length, spans = self._spans.get("encoder", (0, []))
        padded = any(span != (0, length) for span in spans)
        others = {
            n: t for n, t in self._tensors.items()
            if self._stream(n) == "encoder" and t.dim() >= 2 and n not in _OF_NO_EXAMPLE
            and n != "labels" and not n.endswith("mask")
        }  # fmt: skip
        fitting = [n for n, t in others.items() if t.shape[1] == length]
        if padded and not fitting:
            raise _unclear(
                "No input of the model has the positions that its mask is of",
                f"a mask of {length}, and {_shapes(others)}",
                "Leave the mask out if the model reads its padding (as Whisper does).",
            )
        for name, tensor in others.items():
            tokens = tensor.dim() == 2 and not tensor.is_floating_point() and tensor.shape[1] > 1
            if tokens and name not in fitting:
                raise _unclear(
                    "Which positions of an input are padding cannot be told",
                    f"{name} {list(tensor.shape)}, and no mask of its own",
                    "Name the second sequence as transformers does, decoder_input_ids.",
                )

    def _cut(
        self,
        name: str,
        value: Any,
        number: int,
        spans: Mapping[str, tuple[int, tuple[int, int]]],
    ) -> Any:
        if isinstance(value, Mapping):
            return {k: self._cut(str(k), v, number, spans) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self._cut(name, item, number, spans) for item in value])
        if not isinstance(value, Tensor) or value.dim() == 0 or name in _OF_NO_EXAMPLE:
            return value
        one = value if self._known.single else value[number : number + 1]
        length, (start, stop) = spans.get(self._stream(name), (0, (0, 0)))
        # A mask of pairs of positions has them twice.
        axes = range(1, one.dim()) if name.endswith("mask") else range(1, min(one.dim(), 2))
        for axis in axes:
            if length and one.shape[axis] == length:
                one = one.narrow(axis, start, stop - start)
        return one


def run_alone(model: nn.Module, example: Alone) -> None:
    """Call a model with one example, without gradients and in evaluation mode.

    In training mode batch norm mixes examples, and dropout leaves out what layers see.

    Raises:
        UnclearError: It does not run on one example.
    """
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(*example.args, **example.kwargs)
    except ConfigurationError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise _unclear(
            "The model does not run on one example without padding, and what an example gives can "
            "only be told by running it alone",
            f"{type(error).__name__}: {str(error).strip()[:200]}",
        ) from error


def _positional_names(model: nn.Module) -> list[str]:
    """Names of the arguments of a model's forward method, in order."""
    inner = getattr(model, "_orig_mod", model)
    try:
        parameters = inspect.signature(inner.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in named]


def _leaves_of(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves_of(str(key), item)
    elif type(value) in (list, tuple):
        for item in value:
            yield from _leaves_of(name, item)
    else:
        yield name, value


def _check_mask(mask: Tensor, size: int) -> None:
    if mask.dim() != 2 or len(mask) != size:
        raise _unclear(
            "A mask of padding is not understood",
            f"{list(mask.shape)} for {size} examples",
            "Give [examples, positions], 0 where there is padding.",
        )


def _spans_of(mask: Tensor) -> list[tuple[int, int]]:
    """From where to where each row of a mask is not 0; (0, 0) for a row of padding alone.

    Raises:
        UnclearError: Something in the middle is left out.
    """
    kept = mask.detach().cpu() != 0
    stops = _ends(kept)
    starts = [mask.shape[1] - end for end in _ends(kept.flip(1))]
    spans = [(a, b) if b else (0, 0) for a, b in zip(starts, stops, strict=True)]
    if any(int(row.sum()) != stop - start for row, (start, stop) in zip(kept, spans, strict=True)):
        raise _unclear(
            "A mask leaves out positions in the middle of an example",
            "0 between two that are not",
            "Mask padding only, on the left or on the right.",
        )
    return spans


def _ends(kept: Tensor) -> list[int]:
    """One more than the last True of each row, 0 if there is none."""
    places = torch.arange(1, kept.shape[1] + 1, device=kept.device)
    ends: list[int] = (kept * places).amax(dim=1).tolist() if kept.shape[1] else [0] * len(kept)
    return ends


def _ends_by_tokens(ids: Tensor, config: Any) -> list[int]:
    """Where each row of a decoder's tokens ends, without what only fills it up.

    The last token that is not filled in predicts nothing where something comes after it, and
    neither does an end token.
    """
    start, pad = (getattr(config, f"{k}_token_id", None) for k in ("decoder_start", "pad"))
    fill = start if pad is None else pad
    end = getattr(config, "eos_token_id", None)
    if end is None:
        end = getattr(getattr(config, "decoder", None), "eos_token_id", None)
    ending = set(end) if isinstance(end, list | tuple) else {end}
    if fill is None:
        raise _unclear(
            "Which of the decoder's tokens are padding cannot be told",
            "no labels, no mask of the decoder, and no padding token in the model's config",
            "Give the model decoder_attention_mask.",
        )
    found = []
    for row in ids.detach().cpu().tolist():
        length = len(row)
        while length > 1 and row[length - 1] == fill:
            length -= 1
        filled = length < len(row) and fill not in ending
        if length > 1 and (filled or row[length - 1] in ending):
            length -= 1
        found.append(length)
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items()) or "no inputs"


def _unclear(problem: str, found: str, fix: str = "") -> UnclearError:
    return UnclearError(
        problem,
        expected="inputs that begin with the examples of a batch",
        found=found,
        where="RegMean",
        fix=fix
        or "Leave such layers out with `exclude`, let the trainer's replay take batch_size=1, or "
        "aggregate by the mean.",
    )
