"""A dry run: everything that a configuration says, with a tiny random model and a few rows."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedveil.config.file import Config
from fedveil.config.folders import check_folders, settings_of
from fedveil.config.sources import is_file, load_source
from fedveil.config.tables import DataTable
from fedveil.errors import ConfigurationError
from fedveil.hub.library import quiet, quiet_transformers
from fedveil.hub.models import architecture_class
from fedveil.hub.names import place_of
from fedveil.hub.settings import RANDOM, is_function
from fedveil.tasks.templates import columns_of
from fedveil.training import Training

__all__ = ["Rehearsal", "rehearse"]

_CLIENTS, _ROUNDS, _STEPS, _BATCH, _ROWS = 3, 2, 2, 4, 24
_TINY: Mapping[str, int] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# Families that other names stand for than their own.
_KNOWN_AS = {"smollm": "llama", "smollm2": "llama", "tinyllama": "llama", "minilm": "bert"}
# What families call the sizes above, where transformers knows no common name.
_OWN_WORDS: Mapping[str, Mapping[str, int]] = {
    "t5": {"num_decoder_layers": 2, "d_ff": 64, "d_kv": 8, "decoder_start_token_id": 0},
    "mt5": {"num_decoder_layers": 2, "d_ff": 64, "d_kv": 8, "decoder_start_token_id": 0},
    "distilbert": {"hidden_dim": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bart": {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_layers": 2},
}
_WORDS = ("river", "green", "walks", "seven", "under", "light", "paper", "slowly", "a", "the")
_CHAT = (
    "{% for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_START, _END, _PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run runs.

    Attributes:
        config: The same configuration with small numbers; all it names lies in one folder.
        model: What stands in for the model, for people.
        data: What stands in for the rows, for people.
    """

    config: Config
    model: str
    data: str


def rehearse(config: Config, folder: Path) -> Rehearsal:
    """Prepare a dry run: nothing is downloaded, and nothing is written but into ``folder``.

    Local files give their first rows; rows of hub data sets are made up, with the columns that the
    configuration names. The model is one of the same family, with two layers and random weights.

    Args:
        config: Of an owner.
        folder: Where tiny model, rows and run folder go.

    Raises:
        FedveilError: A local file cannot be used, or the model's family cannot be told.
    """
    if config.data.task == "image-classification" and not _all_files(config):
        raise ConfigurationError(
            "A dry run makes up texts, but no images",
            expected="local files in [data]",
            where=config.path.name,
        )
    _check_families(config)
    check_folders(config)
    small = _small_numbers(config, folder)
    with quiet():
        data = _write_rows(config, folder)
    model, words = _write_model(config, folder)
    if config.model.public is not None and "name" in words:
        words["public"] = words["name"]
    lora = config.model.lora if config.model.adapter is None else _adapter_like(config)
    return Rehearsal(
        dataclasses.replace(
            small,
            model=config.model.model_copy(update={**words, "adapter": None, "lora": lora}),
            data=config.data.model_copy(update=data.table),
            clients=data.clients,
            partners=None,
            is_rehearsal=True,
        ),
        model,
        data.words,
    )


def _small_numbers(config: Config, folder: Path) -> Config:
    """Rounds, steps and clients as few as show that they work."""
    generation, partition = config.generation, config.partition
    if generation is not None:
        settings = {**generation.settings, "max_new_tokens": 4}
        generation = dataclasses.replace(generation, rows=2, settings=settings)
    if partition is not None:
        clients = None if partition.clients is None else min(_CLIENTS, partition.clients)
        partition = partition.model_copy(update={"clients": clients, "min_size": 1})
    asked = config.federation.clients_per_round
    federation = config.federation.model_copy(
        update={
            "rounds": min(_ROUNDS, config.federation.rounds),
            "clients_per_round": None if asked is None else min(asked, _fewest(config)),
            # Shares of a tiny model are other shares.
            "exposure_limit": None,
            "workers": 1,
            "secret_file": str(folder / "federation.secret"),
            "out": str(folder / "run"),
            "track": (),
        }
    )
    return dataclasses.replace(
        config,
        training=_short(config.training),
        tuning=None if config.tuning is None else _short(config.tuning),
        evaluation=dataclasses.replace(config.evaluation, proxies=1),
        generation=generation,
        partition=partition,
        federation=federation,
    )  # fmt: skip


def _short(training: Training) -> Training:
    batch = min(_BATCH, training.batch_size)
    pieces = min(batch, training.gradient_accumulation_steps)
    return dataclasses.replace(
        training, steps=_STEPS, epochs=None, batch_size=batch, gradient_accumulation_steps=pieces,
        device=None,
    )  # fmt: skip


def _fewest(config: Config) -> int:
    """Clients of the dry run."""
    if config.partners is not None:
        return len(config.partners.names)
    if config.partition is None:
        return len(config.clients)
    return min(_CLIENTS, config.partition.clients or _CLIENTS)


@dataclass(frozen=True)
class _Rows:
    table: dict[str, Any]
    clients: dict[str, str]
    words: str


def _write_rows(config: Config, folder: Path) -> _Rows:
    """A few rows of each file, or made up ones, in files; and where they are."""
    made_up: list[str] = []

    def write(source: str | None, split: str | None, name: str) -> str:
        path = folder / f"{name}.parquet"
        if source is not None and is_file(config, source):
            rows = load_source(config, source, split)
            rows.select(range(min(_ROWS, len(rows)))).to_parquet(str(path))
        else:
            made_up.append(source or "rows of others")
            _rows_of(config).to_parquet(str(path))
        return str(path)

    data, clients = config.data, dict[str, str | None](config.clients)
    if config.partners is not None:
        clients = dict.fromkeys(config.partners.names)
    table: dict[str, Any] = dict.fromkeys(
        (
            "train_split", "test_split", "owner_split", "tuned_split", "train_limit", "test_limit",
            "owner_limit", "tuned_limit", "variant", "revision",
        )
    )  # fmt: skip
    if not clients:
        table["train"] = write(data.train, data.train_split, "train")
    files = {
        name: write(source, data.train_split, f"client-{number}")
        for number, (name, source) in enumerate(clients.items())
    }
    if data.test is not None:
        table["test"] = write(data.test, data.test_split, "test")
    if data.owner is not None:
        table["owner"] = write(data.owner, data.owner_split, "owner")
    if data.tuned is not None:
        table["tuned"] = write(data.tuned, data.tuned_split, "tuned")
    if not made_up:
        return _Rows(table, files, f"the first {_ROWS} rows of each file")
    return _Rows(table, files, f"made up rows in place of {', '.join(dict.fromkeys(made_up))}")


def _all_files(config: Config) -> bool:
    data = config.data
    named = (data.train, data.test, data.owner, data.tuned)
    sources = [*config.clients.values(), *(source for source in named if source is not None)]
    return config.partners is None and all(is_file(config, source) for source in sources)


def _rows_of(config: Config) -> Any:
    """Made up rows with all columns that a configuration names."""
    from datasets import Dataset

    data, drawn = config.data, random.Random(0)  # noqa: S311  nothing secret
    columns: dict[str, Callable[[int], Any]] = {}

    def text(_: int) -> str:
        return " ".join(drawn.choices(_WORDS, k=drawn.randint(3, 9)))

    for name in _text_columns(data):
        columns[name] = text
    if _is_conversation(data):
        columns[data.messages] = lambda row: [
            {"role": role, "content": text(row)} for role in ("user", "assistant")
        ]
    if data.has_classes:
        names: list[Any] = list(data.labels or range(config.model.num_labels or 2))
        columns[data.label] = lambda row: names[row % len(names)]
    if data.references is not None:
        columns[data.references] = lambda _: [text(_), text(_)]
    if config.partition is not None and config.partition.column is not None:
        columns.setdefault(config.partition.column, lambda row: f"part {row % _CLIENTS}")
    return Dataset.from_dict(
        {name: [make(row) for row in range(_ROWS)] for name, make in columns.items()}
    )


def _text_columns(data: DataTable) -> list[str]:
    if data.has_classes:
        return [data.text] + ([] if data.text_pair is None else [data.text_pair])
    if _is_conversation(data):
        return []
    return [*columns_of(data.prompt), *columns_of(data.completion)]


def _is_conversation(data: DataTable) -> bool:
    return not data.has_classes and "messages" in data.model_fields_set


def _write_model(config: Config, folder: Path) -> tuple[str, dict[str, Any]]:
    """A tiny random model and its tokenizer: in words, and as entries of [model]."""
    name = config.model.name
    if is_function(name):
        return f"the model that {name} makes", {}
    family, place = _family(config, name), folder / "model"
    with quiet_transformers() as transformers:
        tokenizer = _tokenizer(config, transformers)
        # Apart from the model, whose family would have it read as another kind of tokenizer.
        tokenizer.save_pretrained(folder / "tokenizer")
        sizes = {**_TINY, **_OWN_WORDS.get(family, {})}
        tiny = transformers.AutoConfig.for_model(
            family,
            vocab_size=len(tokenizer),
            max_position_embeddings=config.data.max_length + 8,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **sizes,
        )
        model = getattr(transformers, architecture_class(config.data.task)).from_config(tiny)
        model.save_pretrained(place)
    words = f"a random {family} of {model.num_parameters():,} parameters in place of {name}"
    return words, {
        "name": str(place),
        "tokenizer": str(folder / "tokenizer"),
        "new_head": True,
    }


def _check_families(config: Config) -> None:
    """Refuse a public model of another family than the owner's, if both can be told."""
    public = config.model.public
    if public in (None, RANDOM) or is_function(public) or is_function(config.model.name):
        return
    try:
        own, other = _family(config, config.model.name), _family(config, public)
    except ConfigurationError:
        return  # of the owner's it is said where it is needed
    if own != other:
        raise ConfigurationError(
            "The public model is of another family than yours",
            expected=f"a model of the family {own}, which yours was fine-tuned from",
            found=other,
            where=f"{config.path.name}: [model] public",
        )


def _family(config: Config, model: str) -> str:
    """The model type of transformers: from the model's folder, or from its name."""
    found = (settings_of(config, model) or {}).get("model_type")
    if isinstance(found, str):
        return found
    place = Path(place_of(model, config.path.parent))
    with quiet_transformers() as transformers:
        families: list[str] = list(transformers.CONFIG_MAPPING)
    known = {_bare(family): family for family in families} | _KNOWN_AS
    name = _bare(place.name)
    fitting = [part for part in known if part in name]
    if not fitting:
        raise ConfigurationError(
            "The model's family cannot be told from its name",
            expected="a name with the family in it, or a local folder with config.json",
            found=repr(model),
            where=f"{config.path.name}: [model] name",
        )
    return known[max(fitting, key=len)]


def _bare(name: str) -> str:
    return "".join(sign for sign in name.lower() if sign.isalnum())


def _tokenizer(config: Config, transformers: Any) -> Any:
    """The tokenizer, if it is in a local folder; else one that is made for the made up words."""
    for name in (config.model.tokenizer, config.model.name):
        if name is not None and (config.resolve(name) / "tokenizer_config.json").is_file():
            return transformers.AutoTokenizer.from_pretrained(str(config.resolve(name)))
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[_START, _PAD, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([f" {word}" for word in _WORDS], trainer)
    if config.data.task != "causal-lm":
        made.post_processor = processors.TemplateProcessing(
            single=f"{_START} $A {_END}",
            pair=f"{_START} $A {_END} $B {_END}",
            special_tokens=[(_START, 0), (_END, 2)],
        )
    # As those of GPT-2 and Llama, one for causal models has no padding token of its own.
    own = {} if config.data.task == "causal-lm" else {"pad_token": _PAD}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=_START, eos_token=_END, chat_template=_CHAT, **own
    )


def _adapter_like(config: Config) -> dict[str, Any]:
    """Settings of an adapter as small as the model, for the layers of the one that is named."""
    assert config.model.adapter is not None
    path = config.resolve(config.model.adapter) / "adapter_config.json"
    try:
        wanted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            "There is no adapter",
            expected="a folder with adapter_config.json, as PEFT saves it",
            where=str(path.parent),
        ) from error
    return {"r": 2, "target_modules": wanted.get("target_modules")}
