"""From a configuration to a federation that is ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from fedveil.config.code import Approved
from fedveil.config.file import Config
from fedveil.config.rules import register_named_rule
from fedveil.config.sources import load_rows, load_test
from fedveil.config.tokenizers import agree, public_brings_tokenizer, tokenizer_name
from fedveil.drawing import KeyedDraws
from fedveil.engine import Observer
from fedveil.engine.in_process import Workplace, bare_architecture
from fedveil.errors import ConfigurationError
from fedveil.federation import Federation, Remote, Tuning
from fedveil.hub.adapters import check_start
from fedveil.hub.models import load_model, load_pair
from fedveil.hub.names import find_function
from fedveil.hub.tokenizers import load_tokenizer
from fedveil.run.client_files import ClientFiles
from fedveil.secret import Secret
from fedveil.tasks import CausalLM, ImageClassification, Seq2Seq, Task, TextClassification
from fedveil.training import Answers, Trainer, answer
from fedveil.training.modes import on_device
from fedveil.wire import Limits

__all__ = [
    "answer_test",
    "build",
    "build_workplace",
    "open_secret",
    "public_brings_tokenizer",
    "tokenizer_name",
]


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
    federation = (_Rehearsed if config.is_rehearsal else Federation)(
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


class _Rehearsed(Federation):
    """In a dry run one tiny model stands in for both, the owner's and the public one."""

    def _read_likeness(self) -> None:
        """Nothing is released that anybody would miss."""


def _models(
    config: Config, names: Sequence[str], secret: Secret
) -> tuple[nn.Module, nn.Module | None, tuple[str, ...]]:
    """The owner's model, what is released in its place, if anything, and what is new in that."""
    table, seed = config.model, config.federation.seed
    _check_adapter(config)
    # What begins at random must follow from no number that a client could guess.
    keyed = KeyedDraws(secret, "initial weights", seed)
    hidden = int(secret.words(1, "initial weights", seed)[0] >> 1)
    task, folder = config.data.task, config.path.parent
    if table.public is not None:
        return load_pair(table, task, names, folder, seed=seed, hidden=hidden, keyed=keyed)
    with keyed:
        return load_model(table, task, names, folder, seed=hidden), None, ()


def _check_adapter(config: Config) -> None:
    """Refuse an adapter that changes a backbone which clients hold, whichever they make of it."""
    start = (config.model.lora or {}).get("init_lora_weights", True)
    if config.model.adapter is None:
        check_start(start, "[model.lora] init_lora_weights", held=config.scheme.clients_hold_rest)


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
    agree(tokenizer, model, config)
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
