"""From a configuration to a federation that is ready to run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fedveil.config.code import Approved
from fedveil.config.file import Config
from fedveil.config.models import find_function, load_model, load_pair, load_tokenizer
from fedveil.config.rules import register_named_rule
from fedveil.config.sources import load_rows, load_test
from fedveil.config.tables import RANDOM, is_function
from fedveil.drawing import KeyedDraws
from fedveil.engine import Observer
from fedveil.engine.in_process import Workplace, bare_architecture
from fedveil.engine.memory import ClientFiles
from fedveil.errors import ConfigurationError
from fedveil.federation import Federation, Remote, Tuning
from fedveil.secret import Secret
from fedveil.training import (
    Answers,
    CausalLM,
    ImageClassification,
    Seq2Seq,
    Task,
    TextClassification,
    Trainer,
    answer,
)
from fedveil.training.modes import on_device
from fedveil.training.tasks import longest_input
from fedveil.wire import Limits

__all__ = [
    "answer_test",
    "build",
    "build_workplace",
    "open_secret",
    "public_brings_tokenizer",
    "tokenizer_name",
]

_TOKENIZER_FILE = re.compile(r"token|vocab|merges|spiece|sentencepiece|bpe|\.model$")


def build(config: Config, *, observer: Observer | None = None) -> Federation:
    """Load data, model and secret, and put them together.

    The same file and the same data give the same federation, so that a run can be resumed. The
    secret is read from its file, which is made if it is missing.

    Args:
        config: What to build.
        observer: Hears of every event of the run.

    Raises:
        FedveilError: Data or model cannot be found or do not fit together.
    """
    if config.partner is not None:
        raise ConfigurationError(
            "This is a client's file",
            expected="an owner's, without [partner]",
            where=str(config.path),
            fix="A client's SuperNode reads it.",
        )
    register_named_rule(config)
    rows = load_rows(config)
    seed, secret = config.federation.seed, open_secret(config)
    model, public, fresh = _models(config, rows.names, secret)
    task = _task(config, model, len(rows.names))
    if config.generation is not None:
        assert isinstance(task, CausalLM | Seq2Seq)
        assert rows.test is not None
        config.generation.check(model, task, rows.test)
    tuning = None
    if rows.tuned is not None and config.tuning is not None:  # the file has both or neither
        tuning = Tuning(rows.tuned, config.tuning)
    federation = Federation(
        model,
        rows.clients if config.partners is None else Remote(tuple(config.partners.names)),
        task=task,
        scheme=config.scheme,
        public=public,
        owner=rows.owner,
        tuning=tuning,
        fresh=fresh,
        training=config.training,
        test=rows.test,
        evaluation=config.evaluation,
        clients_per_round=config.federation.clients_per_round,
        releases=config.federation.releases,
        exposure_limit=config.federation.exposure_limit,
        bounds=config.bounds,
        secret=secret,
        seed=seed,
        workers=config.federation.workers,
        out=config.out,
        keep_messages=config.federation.keep_messages,
        checkpoints=config.federation.checkpoints,
        limits=_limits(config.federation.max_reply_mb),
        observer=observer,
    )
    federation.config_file = config.path.absolute()
    return federation


def _models(
    config: Config, names: Sequence[str], secret: Secret
) -> tuple[nn.Module, nn.Module | None, tuple[str, ...]]:
    """The owner's model, what is released in its place, if anything, and what is new in that."""
    table, seed = config.model, config.federation.seed
    # What begins at random must follow from no number that a client could guess.
    keyed = KeyedDraws(secret, "initial weights", seed)
    hidden = int(secret.words(1, "initial weights", seed)[0] >> 1)
    task, folder = config.data.task, config.path.parent
    if table.public is not None:
        return load_pair(table, task, names, folder, seed=seed, hidden=hidden, keyed=keyed)
    with keyed:
        return load_model(table, task, names, folder, seed=hidden), None, ()


def _limits(max_reply_mb: int | None) -> Limits | None:
    """How much a reply may be, if the file says."""
    return None if max_reply_mb is None else Limits(max_bytes=max_reply_mb * 10**6)


def build_workplace(config: Config) -> Workplace:
    """What a client has, of its own file: no weights, whatever lies beside the architecture.

    Whoever wrote the file decides nothing here that the client did not approve: code that it names
    runs only if its bytes are approved (:mod:`fedveil.config.code`), code that comes with a model
    never does, and nothing is unpickled.

    Raises:
        ConfigurationError: It is an owner's file, or something would run that is not approved.
        FedveilError: Data or architecture cannot be found or do not fit together.
    """
    partner, approved = config.whose(), Approved(config)
    register_named_rule(config, approved)
    rows, folder = load_rows(config), config.path.parent
    # Weights are read only where clients hold them, too.
    hold = config.scheme.clients_hold_rest
    model = load_model(
        config.model, config.data.task, rows.names, folder, seed=0, weights=hold, approved=approved
    )
    task, name = _task(config, model, len(rows.names), approved), partner.name
    side = config.scheme.client()
    memories = ClientFiles(config.resolve(partner.memory)) if side.remembers else None
    trainer = Trainer(task, task.prepare(rows.clients[name]), config.training)
    bare = bare_architecture(config.scheme, model)
    return Workplace(bare, side, task, {name: trainer}, None, memories)


def answer_test(config: Config, model: nn.Module) -> Answers:
    """Let a model answer the test set as [generation] says.

    Raises:
        FedveilError: There is no test set, or it cannot be used so.
    """
    test = load_test(config)
    if config.generation is None or test is None:
        raise ConfigurationError(
            "There is nothing to answer",
            expected="a table [generation], and a test set in [data]",
            where=str(config.path),
        )
    task = _task(config, model, 0)
    assert isinstance(task, CausalLM | Seq2Seq)
    with on_device(model, config.training.device):
        return answer(model, task, test, config.generation)


def open_secret(config: Config) -> Secret:
    """The federation secret; drawn and written to its file, for its owner's eyes only, if new."""
    return Secret.from_file(config.secret_path, create=True)


def tokenizer_name(config: Config) -> str:
    """Where the tokenizer is that owner and clients use.

    With what clients are sent a proxy of, unless the file says otherwise: the public model, if one
    is released and brings a tokenizer, since its tokens are what it was trained on and what anybody
    may have. Else with the owner's model.

    Raises:
        ConfigurationError: The model is made by a function, so nothing is with it.
    """
    name = config.model.tokenizer or (
        config.model.public if public_brings_tokenizer(config) else config.model.name
    )
    assert name is not None
    if is_function(name):
        raise ConfigurationError(
            "A model that a function makes brings no tokenizer",
            where=f"{config.path.name}: [model]",
            fix='Add tokenizer = "a folder or hub name".',
        )
    return name


def public_brings_tokenizer(config: Config) -> bool:
    """Whether there is a public model with a tokenizer of its own.

    Of a folder its files tell: transformers makes a tokenizer without any vocabulary where there
    are none.
    """
    public = config.model.public
    if public is None or public == RANDOM:
        return False
    place = config.path.parent / Path(public).expanduser()
    if is_function(public) or not place.is_dir():
        return True  # a name on the hub, or one of which the error tells
    return any(_TOKENIZER_FILE.search(path.name) for path in place.iterdir())


def _task(config: Config, model: nn.Module, classes: int, approved: Approved | None = None) -> Task:
    data, folder = config.data, config.path.parent
    classes = config.model.num_labels or classes
    if data.task == "image-classification":
        found = approved.function if approved else partial(find_function, folder=folder)
        transform = found(data.transform) if data.transform else None
        return ImageClassification(
            image=data.image, label=data.label, num_labels=classes, transform=transform
        )
    tokenizer = load_tokenizer(tokenizer_name(config), folder, guarded=approved is not None)
    _agree(tokenizer, model, config)
    if not data.has_classes:
        kind = CausalLM if data.task == "causal-lm" else Seq2Seq
        return kind(
            tokenizer,
            max_length=data.max_length,
            label_smoothing=data.label_smoothing,
            prompt=data.prompt,
            completion=data.completion,
            messages=data.messages,
            text=data.text,
            references=data.references,
        )
    return TextClassification(
        tokenizer,
        num_labels=classes,
        text=data.text,
        text_pair=data.text_pair,
        label=data.label,
        max_length=data.max_length,
    )


def _agree(tokenizer: Any, model: nn.Module, config: Config) -> None:
    """Padding, vocabulary and length as the model needs them."""
    own: Any = getattr(model, "config", None)
    if own is None:
        return
    _check_vocabulary(tokenizer, model, config)
    if getattr(own, "pad_token_id", None) is None:
        own.pad_token_id = tokenizer.pad_token_id
    longest = longest_input(model)
    if longest is not None and config.data.max_length > longest:
        raise ConfigurationError(
            "Texts are longer than the model can read",
            expected=f"at most {longest}",
            found=str(config.data.max_length),
            where=f"{config.path.name}: [data] max_length",
        )


def _check_vocabulary(tokenizer: Any, model: nn.Module, config: Config) -> None:
    """Refuse a tokenizer with tokens of which the model knows nothing."""
    rows = _embedded(model)
    last = max(tokenizer.get_vocab().values(), default=0)
    if rows is not None and last >= rows:
        raise ConfigurationError(
            "The tokenizer is of another model: it has tokens that the model has no embedding of",
            expected=f"at most {rows} tokens",
            found=str(last + 1),
            where=f"{config.path.name}: {tokenizer_name(config)}",
            fix="Take the tokenizer that the model was made with (tokenizer in [model]).",
        )


def _embedded(model: nn.Module) -> int | None:
    """Of how many tokens a model has embeddings; None if it does not say."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
