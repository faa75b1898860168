"""What clients are given of a model before the first message: its architecture, and a tokenizer.

Both are what anybody may have. Of a configuration go the settings that transformers' own code for
that architecture knows, with values that are numbers or words of that code: no text that somebody
wrote can be among them. A vocabulary goes only where it is a public model's, or where the owner is
told that it does.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedveil.config import Config
from fedveil.config.building import public_brings_tokenizer, tokenizer_name
from fedveil.deploy.files import write_public
from fedveil.errors import ConfigurationError
from fedveil.hub.models import architecture_class, load_tokenizer, quiet_transformers
from fedveil.hub.settings import RANDOM, is_function

__all__ = [
    "bare_settings",
    "check_tokenizer",
    "given_to_clients",
    "save_architecture",
    "save_tokenizer",
]

_NEVER = frozenset(
    {
        "architectures", "auto_map", "dtype", "torch_dtype", "finetuning_task", "id2label",
        "label2id", "name_or_path", "num_labels", "output_attentions", "output_hidden_states",
        "problem_type", "quantization_config", "return_dict", "task_specific_params",
        "transformers_version",
    }
)  # fmt: skip
"""Settings of every configuration that no client needs: a client's file says type and classes."""

_OF_ANY_MODEL = ("per_layer_config", "tie_last_hidden_states", "tie_word_embeddings")
_WORD = re.compile(r"[\w./+-]{1,64}")
_TOKENIZER_SETTINGS = frozenset(
    {
        "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder",
        "additional_special_tokens", "backend", "clean_up_tokenization_spaces",
        "extra_special_tokens", "legacy", "model_input_names", "model_max_length", "padding_side",
        "split_special_tokens", "tokenizer_class", "truncation_side",
    }
)  # fmt: skip
"""Settings of any tokenizer, beside its special tokens and what its own class takes."""

_SAMPLES = (
    "A first text, with 12 numbers.",
    "ÄÖÜ éè ß 你好",
    "  two  spaces\n\tand lines ",
    "x" * 99,
)


def given_to_clients(config: Config) -> list[str]:
    """What clients are given of the owner's before the first message, in sentences for the owner.

    Args:
        config: The owner's.
    """
    lines = []
    public = config.model.public
    released = config.model.name if public is None or public == RANDOM else public
    if config.scheme.clients_hold_rest:
        lines.append(
            f"Clients hold {released} exactly as it is, but for what {config.scheme.name} sends."
        )
    elif released == config.model.name and not is_function(released):
        lines.append("Clients are given your model's architecture: its sizes, no weights.")
    if _needs_tokenizer(config) and not _is_public_tokenizer(config):
        name = config.model.tokenizer or tokenizer_name(config)
        lines.append(
            f"Clients are given the tokenizer {name}, with its whole vocabulary: they cannot read "
            "texts without it. If that tells of your data, train with a public tokenizer."
        )
    for code in dict.fromkeys((released, config.data.transform, config.model.rule)):
        if code is not None and is_function(code):
            module = f"{code.partition(':')[0]}.py"
            if (config.path.parent / module).is_file():
                lines.append(f"Clients are given {module} as it is, with all its comments.")
    return lines


def check_tokenizer(config: Config) -> None:
    """Refuse to give clients a vocabulary of the owner's where a public model is released.

    Raises:
        ConfigurationError: The tokenizer would be that of the owner's model, as what is released in
            its place brings none, or is not that of the public model.
        FedveilError: It cannot be loaded.
    """
    public, named = config.model.public, config.model.tokenizer
    if not _needs_tokenizer(config) or public is None:
        return
    if not public_brings_tokenizer(config):
        if named is not None:
            return  # it goes out, and the owner is told
        raise ConfigurationError(
            "Clients would be given your own model's tokenizer, though nothing else of it",
            expected='tokenizer = "a folder or hub name" that clients may have',
            found=f"none, and public = {public!r} brings none",
            where=f"{config.path.name}: [model]",
            fix="Name a public tokenizer that your model was made with, or your own, if clients "
            "may have its vocabulary.",
        )
    if named is None or is_function(public):
        return
    folder = config.path.parent
    theirs = load_tokenizer(public, folder)
    if not _encode_alike(load_tokenizer(named, folder), theirs):
        raise ConfigurationError(
            "The tokenizer that is named is not the public model's",
            expected=f"the tokenizer of {public}, which anybody may have",
            found=repr(named),
            where=f"{config.path.name}: [model] tokenizer",
            fix="Leave tokenizer out: the public model's is then used here and by clients. One of "
            "your own would be given to them, with its vocabulary.",
        )


def save_architecture(config: Config, model: nn.Module, folder: Path) -> None:
    """Write what a client builds the model from: no weights, and nothing that somebody wrote.

    Args:
        config: The owner's.
        model: What is released, with a configuration of transformers.
        folder: Gets config.json and, of a model that reads text, a tokenizer.

    Raises:
        ConfigurationError: The model cannot be built from that.

    Does NOT hide: what sizes, activations and vocabulary tell by themselves.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    settings = bare_settings(base.config)
    if config.data.has_classes:
        settings["num_labels"] = base.config.num_labels
    write_public(folder / "config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
    _check_shapes(config, base, folder)
    if _needs_tokenizer(config):
        save_tokenizer(config, folder)


def save_tokenizer(config: Config, folder: Path) -> None:
    """Write the tokenizer that owner and clients use: of its settings those that encode.

    Raises:
        ConfigurationError: It would encode otherwise without the others.
        FedveilError: It cannot be loaded.
    """
    tokenizer = load_tokenizer(tokenizer_name(config), config.path.parent)
    template = getattr(tokenizer, "chat_template", None)
    if config.data.has_classes:  # conversations alone need it
        tokenizer.chat_template = None
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
    tokenizer.chat_template = template
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    known = _settings_of(tokenizer)
    kept = {name: value for name, value in settings.items() if name in known}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not _encode_alike(tokenizer, load_tokenizer(str(folder.absolute()), folder)):
        raise ConfigurationError(
            "The tokenizer encodes otherwise without settings that nobody here knows",
            expected="settings that its class in transformers takes",
            found=", ".join(sorted(settings.keys() - kept.keys())),
            where=tokenizer_name(config),
            fix="Save it with save_pretrained of the installed transformers.",
        )


def bare_settings(config: Any) -> dict[str, Any]:
    """Those settings of a configuration of transformers from which the architecture follows.

    A setting is kept if the class or the code of its model knows its name; of its value numbers,
    and words that stand in that code: "gelu", "sliding_attention". Nothing else can be needed to
    build the model, and nothing that somebody wrote is among it. The same of configurations inside.

    Args:
        config: A ``transformers.PreTrainedConfig``.
    """
    kind: Callable[..., Any] = type(config)
    names, words = _known_to(kind)
    kept = {"model_type": config.model_type}
    for name, value in config.to_dict().items():
        if name not in names:
            continue
        own = getattr(config, name, None)
        if hasattr(own, "model_type"):
            kept[name] = bare_settings(own)
            continue
        known = _only_known(value, names | words)
        if known is not _UNKNOWN:
            kept[name] = known
    return kept


_UNKNOWN = object()


def _only_known(value: Any, words: frozenset[str]) -> Any:
    """A value without what no code knows; `_UNKNOWN` if nothing is left."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        parts = [value] if value in words else value.split("-")
        return value if all(part in words for part in parts) else _UNKNOWN
    if isinstance(value, Mapping):
        found = {
            key: _only_known(one, words)
            for key, one in value.items()
            if str(key) in words or str(key).isdecimal()
        }
        return {key: one for key, one in found.items() if one is not _UNKNOWN}
    if isinstance(value, list | tuple):
        known = [_only_known(one, words) for one in value]
        # A list that has lost an entry is another list.
        return _UNKNOWN if any(one is _UNKNOWN for one in known) else known
    return _UNKNOWN


@cache
def _known_to(kind: Callable[..., Any]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of settings, and words, that the code for a class of configurations knows."""
    import transformers
    from transformers import activations, configuration_utils, modeling_rope_utils

    names = {*inspect.signature(kind).parameters, *_OF_ANY_MODEL}
    words = {*activations.ACT2FN}
    for path in _sources(kind):
        found = _read_code(path)
        names |= found.settings - vars(transformers.GenerationConfig()).keys()
        names |= {name for name in found.settings if name.endswith("_token_id")}
        words |= found.words
    for module in (configuration_utils, modeling_rope_utils):
        words |= _read_code(Path(inspect.getfile(module))).words
    return frozenset(n for n in names if not n.startswith("_")) - _NEVER, frozenset(words)


def _sources(kind: Any) -> Iterator[Path]:
    """Files with the code of a class of configurations, and of the models that it is for."""
    for base in kind.__mro__:
        if base.__module__.startswith("transformers.models."):
            folder = Path(inspect.getfile(base)).parent
            yield from sorted(folder.glob("configuration_*.py"))
            yield from sorted(folder.glob("modeling_*.py"))


@dataclass(frozen=True)
class _Code:
    """What a file of Python knows of configurations.

    Attributes:
        settings: Names that are read of something that is called a configuration (``config.width``,
            ``getattr(config, "width")``, ``kwargs.pop("width")``), or set by one.
        words: Literals that are one word.
    """

    settings: frozenset[str]
    words: frozenset[str]


@cache
def _read_code(path: Path) -> _Code:
    """Read a file of transformers, without running it."""
    settings, words = set[str](), set[str]()
    configures = path.name.startswith("configuration_")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            owner = _called(node.value)
            if owner.endswith("config") or (configures and owner == "self"):
                settings.add(node.attr)
        elif isinstance(node, ast.Call) and _called(node.func) in ("getattr", "pop", "get"):
            settings |= {word for one in node.args if (word := _literal(one)) is not None}
        elif (word := _literal(node)) is not None:
            words.add(word)
    return _Code(frozenset(settings), frozenset(words))


def _called(node: ast.AST) -> str:
    """The last name of an expression such as ``self.config``."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _literal(node: ast.AST) -> str | None:
    """A literal that is one word."""
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def _check_shapes(config: Config, model: nn.Module, folder: Path) -> None:
    """Refuse an architecture from which another model would be built."""
    with quiet_transformers() as transformers:
        kind = getattr(transformers, architecture_class(config.data.task))
        with torch.device("meta"):
            built = kind.from_config(transformers.AutoConfig.from_pretrained(folder))
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    made = {name: tensor.shape for name, tensor in built.state_dict().items()}
    # What PEFT calls a layer that it adapts, and one of which it trains a copy.
    adapted = {
        name.replace(".base_layer", "").replace(".original_module", ""): shape
        for name, shape in own.items()
    }
    if any(adapted.get(name) != shape for name, shape in made.items()):
        odd = next(name for name, shape in made.items() if adapted.get(name) != shape)
        raise ConfigurationError(
            "Clients would build another model than yours",
            expected=str(list(adapted[odd])) if odd in adapted else "no such tensor",
            found=str(list(made[odd])),
            where=odd,
            fix="Its config.json has settings that the installed transformers does not know.",
        )


def _needs_tokenizer(config: Config) -> bool:
    return config.data.task != "image-classification"


def _is_public_tokenizer(config: Config) -> bool:
    """Whether the tokenizer is the public model's, so that nothing of the owner's goes out."""
    named, public = config.model.tokenizer, config.model.public
    if public is None or not public_brings_tokenizer(config):
        return False
    return named is None or not is_function(public)  # else it is the same, or was refused


def _settings_of(tokenizer: Any) -> set[str]:
    """Settings of a tokenizer that its classes take, and its special tokens."""
    names = {*_TOKENIZER_SETTINGS, *tokenizer.special_tokens_map}
    names |= {*getattr(tokenizer, "SPECIAL_TOKENS_ATTRIBUTES", ())}
    for kind in type(tokenizer).__mro__:
        if "__init__" in vars(kind):
            names |= {*inspect.signature(vars(kind)["__init__"]).parameters}
    return names - {"self", "args", "kwargs"}


def _encode_alike(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same vocabulary and special tokens, and encode the same."""
    if one.get_vocab() != other.get_vocab():
        return False
    if one.special_tokens_map != other.special_tokens_map:
        return False
    words = sorted(one.get_vocab())[:: max(1, len(one.get_vocab()) // 200)]
    texts = [*_SAMPLES, " ".join(words), "".join(words)]
    return all(_ids(one, text) == _ids(other, text) for text in texts)


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text)["input_ids"]
    return found
