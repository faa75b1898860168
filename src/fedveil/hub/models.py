"""Models as a configuration names them. Whatever goes wrong, the answer is a FedveilError."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fedveil.errors import ConfigurationError
from fedveil.hub.adapters import add_adapter, load_adapter
from fedveil.hub.classes import check_public_order, stated_in
from fedveil.hub.foreign import refuse_code, refuse_imports, refuse_pickles
from fedveil.hub.library import quiet_transformers
from fedveil.hub.names import Functions, explained, find_function, made_by, place_of
from fedveil.hub.settings import RANDOM, ModelTable, is_function
from fedveil.hub.tokenizers import load_tokenizer
from fedveil.tasks.classes import check_classes, contradiction, first_swapped, same_classes

__all__ = [
    "Pair",
    "add_adapter",
    "architecture_class",
    "find_function",
    "load_model",
    "load_pair",
    "load_tokenizer",
    "load_untouched",
    "place_of",
    "quiet_transformers",
    "refuse_code",
]

_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def load_model(
    table: ModelTable,
    task: str,
    names: Sequence[str],
    folder: Path,
    *,
    seed: int,
    weights: bool = True,
    approved: Functions | None = None,
) -> nn.Module:
    """The owner's model, with a head for the classes.

    Args:
        table: Its description.
        task: What it is trained for.
        names: The classes in order: that of the model, if its configuration names them.
        folder: What paths are relative to; modules are looked for there as well.
        seed: Decides the weights that start at random: the same seed, the same model.
        weights: Whether to load weights; without them a folder needs only its config.json.
        approved: At a client's, the code that may run there: no other does, no code that comes with
            a model, and nothing is unpickled. None at the owner's.

    Raises:
        FedveilError: It cannot be found or loaded, or has a head for other classes or for the same
            in another order; at a client's also if it wants code of its own to be run, or has its
            weights in a pickle.
    """
    # Clients hold what the owner releases, whose head is new only if the file says so.
    holds = approved is not None and weights and not is_function(table.name)
    lent = holds and not table.new_head
    with _drawing(seed):
        model, new = _load(table, task, names, folder, weights, approved, lent)
        return _adapted(model, table, task, folder, new, approved)


class Pair(NamedTuple):
    """The owner's model, what is released in its place, and patterns of what is new in the latter.

    New is a head that the public model's folder has none of, or one of another size, unless the
    owner's model has a new one in its place, too.
    """

    own: nn.Module
    public: nn.Module
    fresh: tuple[str, ...]


def load_pair(
    table: ModelTable,
    task: str,
    names: Sequence[str],
    folder: Path,
    *,
    seed: int,
    hidden: int,
    keyed: AbstractContextManager[object],
) -> Pair:
    """The owner's model and the public one, which begin alike in what begins at random in both.

    That is a head that is new in both, and an adapter: what clients teach the public model's is
    then added to the owner's from where both began. Clients are sent it, so that it is no secret of
    the owner's. What begins at random in the owner's model alone is drawn under the secret. Of two
    models that functions make nobody knows what was drawn: they are made with the same seed.

    Args:
        table: Their description, with a public model and without an adapter of the owner's.
        task: As for :func:`load_model`.
        names: As for :func:`load_model`.
        folder: As for :func:`load_model`.
        seed: Decides what begins at random in the public model.
        hidden: Decides what begins at random in the owner's alone, where ``keyed`` does not.
        keyed: Inside, what is drawn at random follows from the federation secret.

    Raises:
        FedveilError: As :func:`load_model`.
        ConfigurationError: Of a model that a function makes, which may read weights, there is no
            random initialization.
    """
    released, drawn = _released(table)
    if is_function(table.name) and is_function(released.name):
        hidden, keyed = seed, nullcontext()
    with _drawing(hidden), keyed:
        own, mine = _load(table, task, names, folder)
    with _drawing(seed):
        public, new = _load(released, task, names, folder, weights=not drawn, lent=True)
    check_public_order(table, names, folder, own, public)
    alike = mine & (public.state_dict().keys() if drawn else new)
    _copy(alike, public, own)
    # Both are of one architecture: what begins at random in one is trained whole in both.
    whole = mine | new
    with _drawing(seed):
        own = _adapted(own, table, task, folder, whole)
    with _drawing(seed):
        public = _adapted(public, released, task, folder, whole)
    # An adapter puts more before the names, and after the modules.
    fresh = {f"*{name.rpartition('.')[0]}.*" for name in new - alike}
    return Pair(own, public, tuple(sorted(fresh)))


def _released(table: ModelTable) -> tuple[ModelTable, bool]:
    """The public model's description, and whether it is drawn at random."""
    assert table.public is not None
    drawn = table.public == RANDOM
    if drawn and is_function(table.name):
        raise ConfigurationError(
            "Nobody here knows whether that function reads the owner's weights",
            expected='a function that draws them at random, as public = "module:function"',
            found=f'public = "{RANDOM}" with name = "{table.name}"',
            where="[model] public",
        )
    name = table.name if drawn else table.public
    return table.model_copy(update={"name": name}), drawn


@torch.no_grad()
def _copy(names: AbstractSet[str], source: nn.Module, target: nn.Module) -> None:
    """Copy tensors that both models have alike; what is of another shape is refused later."""
    given, taken = source.state_dict(), target.state_dict()
    for name in names & given.keys() & taken.keys():
        if given[name].shape == taken[name].shape:
            taken[name].copy_(given[name])


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Inside, PyTorch draws what it draws with this seed; outside, as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _load(
    table: ModelTable,
    task: str,
    names: Sequence[str],
    folder: Path,
    weights: bool = True,
    approved: Functions | None = None,
    lent: bool = False,
) -> tuple[nn.Module, set[str]]:
    """The model without its adapter, and what in it its folder has no values of, if one has any.

    One that is lent is released in the owner's place: a head of its own may have been for others,
    and is replaced where it is of another size alone.
    """
    classes = table.num_labels or len(names)
    if classes < len(names):
        raise ConfigurationError(
            "The model has fewer classes than the data",
            expected=f"num_labels of at least {len(names)}",
            found=str(classes),
            where="[model] num_labels",
        )
    if not is_function(table.name):
        place = place_of(table.name, folder)
        return _Pretrained(table, task, names, classes, place, approved is not None, lent).load(
            weights
        )
    found = approved.function if approved else partial(find_function, folder=folder)
    model = made_by(found(table.name), table.name, classes or None)
    if names and not lent:
        check_classes(model, names, "[data] labels")
    return model.to(getattr(torch, table.dtype)), set()


def _adapted(
    model: nn.Module,
    table: ModelTable,
    task: str,
    folder: Path,
    new: Collection[str],
    approved: Functions | None = None,
) -> nn.Module:
    """The model with its adapter, if it is to have one."""
    if approved is not None:
        refuse_imports(table, folder)
    if table.adapter is not None:
        return load_adapter(model, folder / Path(table.adapter).expanduser(), new)
    return model if table.lora is None else add_adapter(model, task, table.lora, new)


def architecture_class(task: str) -> str:
    """The class of transformers that makes models for a task."""
    return _CLASSES[task]


def load_untouched(name: str, folder: Path) -> nn.Module:
    """A model as it lies in its folder or on the hub, in the class that it was saved from."""
    if is_function(name):
        return made_by(find_function(name, folder), name, None)
    place = place_of(name, folder)
    with quiet_transformers() as transformers, explained("model", place):
        architectures = transformers.AutoConfig.from_pretrained(place).architectures or [""]
        kind = getattr(transformers, architectures[0], transformers.AutoModel)
        model: nn.Module = kind.from_pretrained(place, dtype=torch.float32)
        return model


class _Pretrained(NamedTuple):
    """A model of transformers, as a table names it; see :func:`_load`."""

    table: ModelTable
    task: str
    names: Sequence[str]
    classes: int
    place: str
    guarded: bool
    lent: bool

    def load(self, weights: bool) -> tuple[nn.Module, set[str]]:
        """The model, and names of what its folder has no values of; none, if none were asked for.

        Raises:
            FedveilError: See :func:`load_model`.
        """
        # Of a lent model that is drawn nothing but its architecture is taken.
        stated = self._stated() if weights or not self.lent else None
        with quiet_transformers() as transformers, explained("model", self.place):
            kind = getattr(transformers, _CLASSES[self.task])
            if self.guarded:
                refuse_code(
                    transformers.PretrainedConfig.get_config_dict(self.place)[0], self.place
                )
            words = self._words(stated)
            if not weights:
                config = transformers.AutoConfig.from_pretrained(self.place, **words)
                trust = {"trust_remote_code": False} if self.guarded else {}
                bare: nn.Module = kind.from_config(config, dtype=self._dtype, **trust)
                return bare, set()
            if self.guarded:
                refuse_pickles(Path(self.place), "*.safetensors")
                words["use_safetensors"] = True
            model, info = kind.from_pretrained(
                self.place,
                dtype=self._dtype,
                ignore_mismatched_sizes=self.table.new_head or self.lent,
                output_loading_info=True,
                **words,
            )
        mismatched = {name for name, *_ in info["mismatched_keys"]}
        new = {*info["missing_keys"], *mismatched}
        _check_loaded(model, mismatched, new, self.place)
        if self.table.new_head and self.classes and not self.lent:
            new |= _begin_anew(model, new)
        return model, new

    @property
    def _dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.table.dtype)
        return found

    def _stated(self) -> list[str] | None:
        """The classes that the model names itself, if they do not contradict those asked for."""
        stated = stated_in(self.place) if self.classes and self.names else None
        if stated is None or same_classes(stated, self.names):
            return stated
        # Of a lent one the owner has compared the order with that of the model that it stands for.
        swapped = self.guarded and first_swapped(stated, self.names) is not None
        if not self.table.new_head and (swapped or not self.lent):
            raise contradiction(stated, self.names, self.place)
        return stated

    def _words(self, stated: list[str] | None) -> dict[str, Any]:
        """What is loaded otherwise than the folder says."""
        words: dict[str, Any] = {"num_labels": self.classes} if self.classes else {}
        if self.guarded:
            words["trust_remote_code"] = False
        names = self.names
        stays = self.lent or not self.table.new_head
        if (
            stays
            and stated is not None
            and len(stated) == self.classes
            and same_classes(stated, names)
        ):
            names = stated  # as the model calls them, whatever the data do
        if self.classes and self.classes == len(names):
            words["id2label"] = dict(enumerate(names))
            words["label2id"] = {name: number for number, name in enumerate(names)}
        return words


def _check_loaded(
    model: nn.Module, mismatched: AbstractSet[str], new: AbstractSet[str], place: str
) -> None:
    """Refuse a folder whose weights are not those of its config.json: most would be random.

    Raises:
        ConfigurationError: Something but the head is of another size, or most weights are missing.
    """
    if strangers := sorted(mismatched - (_of_classes(model) if mismatched else set())):
        raise ConfigurationError(
            "The weights in the folder are not of the sizes that its config.json says",
            expected="other sizes of the classification head at most",
            found=", ".join(strangers[:3]),
            where=place,
            fix="Save the model with save_pretrained, which writes both.",
        )
    state = model.state_dict()
    lacking = sum(state[name].numel() for name in new if name in state)
    whole = sum(tensor.numel() for tensor in state.values())
    if 2 * lacking > whole:
        raise ConfigurationError(
            "The folder has no weights for most of the model, which would begin at random",
            expected="the weights of the model that its config.json describes",
            found=f"none for {lacking:,} of {whole:,} numbers, such as {min(new)}",
            where=place,
            fix="Save the model with save_pretrained, which writes both.",
        )


def _of_classes(model: nn.Module) -> set[str]:
    """Names of the tensors whose size is that of the number of classes: the last of the head."""
    settings: Any = model.config
    shapes = []
    for more in (0, 1):
        other = copy.deepcopy(settings)
        other.num_labels = settings.num_labels + more
        with torch.device("meta"):
            twin: nn.Module = type(model)(other)
        shapes.append({name: tensor.shape for name, tensor in twin.state_dict().items()})
    return {name for name, shape in shapes[0].items() if shapes[1][name] != shape}


@torch.no_grad()
def _begin_anew(model: nn.Module, new: AbstractSet[str]) -> set[str]:
    """Draw the last layer of the head, unless it is new; the names of its tensors.

    Whether it was for other classes does not matter: of numbers nobody could tell.
    """
    names = _of_classes(model)
    if names <= new:
        return names
    for module in {name.rpartition(".")[0] for name in names}:
        layer = model.get_submodule(module)
        reset = getattr(layer, "reset_parameters", None)
        if not callable(reset):
            raise ConfigurationError(
                "Nobody here knows how the model's head begins anew",
                found=type(layer).__name__,
                where=module,
                fix="Save the model without its head, or with one for your classes.",
            )
        reset()
    return names
