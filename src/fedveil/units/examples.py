"""Something for a model to read, so that it can be run without anybody's data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedveil.units.layers import CONVOLUTIONS

__all__ = ["Run", "floating", "runs_of"]

Run = Callable[[nn.Module], object]
"""Runs a model on one example, always the same; what it returns matters if the model is not called
as a whole."""

_TOKENS = 16
_USUAL_SIDES = (32, 28, 4, 8, 16, 64, 224, 48, 96, 128)
_SIDES = (*_USUAL_SIDES, *(side for side in range(1, 65) if side not in _USUAL_SIDES))
"""Of images that plain nets read, where nobody says how large theirs are."""

# Caches and weights of attention: what they tell of a withheld head is not what comes of it.
_ASIDE = ("past_key_values", "attentions", "cache_params", "mems", "hidden_states")


def floating(answer: object) -> list[Tensor]:
    """The numbers that a model's answer is made of: of several, the first, or those with names."""
    if isinstance(answer, Tensor):
        return [answer] if answer.is_floating_point() else []
    if isinstance(answer, Mapping):
        wanted = [value for key, value in answer.items() if not str(key).endswith(_ASIDE)]
        return [tensor for value in wanted for tensor in floating(value)]
    if is_dataclass(answer) and not isinstance(answer, type):
        return floating({one.name: getattr(answer, one.name) for one in fields(answer)})
    if isinstance(answer, (tuple, list)):
        return next((found for value in answer if (found := floating(value))), [])
    return []


def runs_of(model: nn.Module, run: Run | None) -> Iterator[tuple[str, Run]]:
    """Ways to run a model, best first, each with a name.

    What the model has as `example_inputs` (or `dummy_inputs`, where that is its own); what its
    configuration says of it, if it is one of transformers'; rows of data; and for nets that begin
    with a layer of a known kind, something of the size that it reads.
    """
    given = _given(model)
    if given is not None:
        yield "the model's example_inputs", partial(_call, given)
        return
    made = _made(model)
    if made:
        yield "inputs made of its configuration", partial(_call, made)
    if run is not None:
        yield "rows of the data", run
    if not made:
        for shape in _shapes(model):
            yield f"a tensor {list(shape)}", partial(_call_with, shape)


def _made(model: nn.Module) -> dict[str, Tensor]:
    """Arguments by the configuration of a model; none if it has none, or one of another kind."""
    config = getattr(model, "config", None)
    try:
        return {} if config is None else _of_config(model, config)
    except Exception:  # a configuration of one's own may hold anything
        return {}


def _given(model: nn.Module) -> object | None:
    inner = _innermost(model)
    for one in (model, inner):
        found = getattr(one, "example_inputs", None)
        if found is None and not _is_of_transformers(type(one)):
            found = getattr(one, "dummy_inputs", None)
        if found is not None and not callable(found):
            return found  # type: ignore[no-any-return]
    return None


def _is_of_transformers(kind: type) -> bool:
    owner = next((base for base in kind.__mro__ if "dummy_inputs" in vars(base)), object)
    return owner.__module__.startswith("transformers.")


def _innermost(model: nn.Module) -> nn.Module:
    """The model that PEFT has wrapped, or the model."""
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) else model


def _call(given: object, model: nn.Module) -> object:
    given = _moved(given, next((p.device for p in model.parameters()), torch.device("cpu")))
    if isinstance(given, Mapping):
        return model(**given)
    return model(*given) if isinstance(given, (tuple, list)) else model(given)


def _call_with(shape: tuple[int, ...], model: nn.Module) -> object:
    """Call a net of which nobody knows what it reads; its answer must be one for each example."""
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    answer = _call(example, model)
    numbers = floating(answer)
    if not numbers or len(numbers[0]) != len(example):
        raise ValueError("an answer for each example is missing")
    return answer


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(one, device) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_moved(one, device) for one in value]
    return value


# Plain nets -------------------------------------------------------------------------------------


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of four examples that the first layer would read."""
    for module in model.modules():
        if isinstance(module, CONVOLUTIONS):
            axes = len(module.kernel_size)
            yield from ((4, module.in_channels, *(side,) * axes) for side in _SIDES)
            return
        if isinstance(module, nn.Linear):
            yield 4, module.in_features
            yield 4, 7, module.in_features
            return
        if isinstance(module, (nn.Embedding, nn.RNNBase)):
            return  # tokens, or sequences: whoever made the net knows


# Transformers -----------------------------------------------------------------------------------


def _of_config(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Arguments for one of transformers' models, by the names that its forward takes."""
    takes = set(inspect.signature(_innermost(model).forward).parameters)
    main = getattr(_innermost(model), "main_input_name", "input_ids")
    draw = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    if "input_ids" in takes:
        made["input_ids"] = _tokens(config, draw)
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = _tokens(config, draw)
    if "global_attention_mask" in takes and "input_ids" in made:
        made["global_attention_mask"] = torch.zeros_like(made["input_ids"])
        made["global_attention_mask"][:, 0] = 1
    if "bbox" in takes and "input_ids" in made:
        corners = torch.randint(0, 500, (1, _length(made), 2), generator=draw)
        made["bbox"] = torch.cat([corners, corners + 100], dim=-1)
    if "pixel_values" in takes and (main == "pixel_values" or _setting(config, "image_size")):
        made["pixel_values"] = _image(config, draw)
    if "input_values" in takes and main == "input_values":
        made["input_values"] = _sound(config, draw)
    if "input_features" in takes and main == "input_features":
        frames = 2 * (_setting(config, "max_source_positions") or 100)
        bins = _setting(config, "num_mel_bins") or 80
        made["input_features"] = torch.randn(1, bins, frames, generator=draw)
    return made


def _length(made: Mapping[str, Tensor]) -> int:
    return made["input_ids"].shape[1]


def _tokens(config: Any, draw: torch.Generator) -> Tensor:
    """A text of tokens that ends as texts do, and holds no padding."""
    vocabulary = int(_setting(config, "vocab_size") or 2)
    longest = _setting(config, "max_position_embeddings") or _setting(config, "n_positions")
    # RoBERTa counts positions from its padding token on.
    length = max(2, min(_TOKENS, int(longest or _TOKENS) - 3))
    special = {_setting(config, name) for name in ("pad_token_id", "bos_token_id")}
    last = _setting(config, "eos_token_id")
    usual = [t for t in range(vocabulary) if t not in special and t != last] or [0]
    places = torch.randint(0, len(usual), (length,), generator=draw)
    tokens = torch.tensor(usual)[places]
    if isinstance(last, int) and 0 <= last < vocabulary:
        tokens[-1] = last
    return tokens[None]


def _image(config: Any, draw: torch.Generator) -> Tensor:
    size = _setting(config, "image_size") or 64
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    channels = _setting(config, "num_channels") or 3
    return torch.randn(1, channels, height, width, generator=draw)


def _sound(config: Any, draw: torch.Generator) -> Tensor:
    bins = _setting(config, "num_mel_bins")
    if bins and _setting(config, "max_length"):  # a spectrogram
        return torch.randn(1, _setting(config, "max_length"), bins, generator=draw)
    return torch.randn(1, 4000, generator=draw)


def _setting(config: Any, name: str) -> Any:
    """A setting of a configuration, or of one that it holds (of texts, of images)."""
    for one in (config, *(getattr(config, n, None) for n in _PARTS)):
        value = getattr(one, name, None)
        if value is not None and not isinstance(value, nn.Module):
            return value
    return None


_PARTS = ("text_config", "vision_config", "audio_config", "encoder")
