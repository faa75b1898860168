"""How far a model that is called public is from the owner's: it may be a copy of it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError, FedveilWarning
from fedveil.schemes.adapters import is_adapter
from fedveil.state import StateDict, read_state

__all__ = ["Likeness", "check_likeness", "likeness_of"]

_NEAR = 0.02
"""Relative distance, after scaling. Rounding to bfloat16 moves weights by 0.2 % at most, noise of
0.0001 those of most models by 0.5 %, and light fine-tuning by as much: what a model answers tells
the two apart."""

_MOST = 0.5
"""Of the numbers in question: a model of which more are the owner's is the owner's model."""

_WORTH_A_WORD = 0.1

_SAME_LOSS = (0.005, 0.005)
"""In nats, and as a share: a model whose loss is no further from another's answers as that does."""

_BEGIN_AT_ZERO = (".lora_B.", ".lora_embedding_A.")


@dataclass(frozen=True)
class Likeness:
    """How far a public model is from the owner's.

    Attributes:
        distance: ``|own - public| / |own|`` over all tensors that are compared.
        compared: How many numbers each of them has, by name: parameters that the owner trained, as
            far as anybody can tell, but for those that are one number throughout.
        equal: Names of those that are the owner's to the last bit, perhaps under another name.
        near: Names of those that are the owner's but for rounding, a little noise, or a factor; and
            that factor.
        embeddings: Names of those that are tables of embeddings, which are often left as they were.
    """

    distance: float
    compared: Mapping[str, int]
    equal: tuple[str, ...]
    near: Mapping[str, float]
    embeddings: frozenset[str]

    @property
    def words(self) -> str:
        """In a line, for the owner."""
        text = f"the public model is {100 * self.distance:.2g} % of its weights away from yours; "
        return text + f"{len(self.equal)} of {len(self.compared)} tensors are the same"

    def share(self, names: tuple[str, ...]) -> float:
        """Of the numbers that are compared, embeddings left out unless there is nothing else."""
        asked = {n: c for n, c in self.compared.items() if n not in self.embeddings}
        asked = asked or dict(self.compared)
        return sum(asked.get(name, 0) for name in names) / max(1, sum(asked.values()))


@torch.no_grad()
def likeness_of(
    public: nn.Module, own: nn.Module, released: Collection[str], left: Sequence[str] = ()
) -> Likeness:
    """Compare two models of one architecture.

    Tensors are compared that the owner trained: not what is frozen, no buffers, and no adapter that
    was not trained yet. Under such a one all parameters are: it was only just put on them.

    Args:
        public: What would be released.
        own: The owner's.
        released: Names of the tensors that would be; others clients have, or never get.
        left: Patterns (as in the shell) of what the owner says was left as it was.
    """
    mine, theirs = read_state(own), public.state_dict()
    names = [
        name
        for name in _trained(own, mine)
        if name in released
        and not any(fnmatchcase(name, pattern) for pattern in left)
        and (_varies(mine[name]) or _varies(theirs[name]))
    ]
    known = {_digest(mine[name]) for name in names if mine[name].dim() > 1}
    equal, near, apart, size = list[str](), dict[str, float](), 0.0, 0.0
    for name in names:
        one, other = mine[name].detach().cpu().float(), theirs[name].detach().cpu().float()
        apart += float((one - other).square().sum())
        size += float(one.square().sum())
        if torch.equal(one, other) or (other.dim() > 1 and _digest(other) in known):
            equal.append(name)
        elif one.dim() > 1 and (factor := _factor(one, other)) is not None:
            near[name] = factor
    tables = {n for n, m in own.named_modules() if isinstance(m, nn.Embedding)}
    return Likeness(
        (apart / size) ** 0.5 if size else 0.0,
        {name: mine[name].numel() for name in names},
        tuple(equal),
        near,
        frozenset(name for name in names if name.rpartition(".")[0] in tables),
    )


def check_likeness(
    likeness: Likeness,
    public: nn.Module,
    own: StateDict,
    judge: Callable[[StateDict], float],
) -> None:
    """Refuse a public model that is the owner's own, or was made of it.

    What of it is the owner's to the last bit may be so because it was left as it was; but if that
    is more than half of what is not known to have been frozen, it is refused, as a copy with
    another head would look alike. What is nearly the owner's is put into the owner's model: if that
    answers the owner's rows as before, it is a copy.

    Args:
        likeness: Of both.
        public: What would be released.
        own: The owner's model, as far as it would be released.
        judge: The loss of a model on the owner's rows, in nats.

    Raises:
        ConfigurationError: It is.

    Does NOT find: a copy whose units are in another order, one that was trained on for a while, or
    one of another model of the owner's. That a model is public only its owner can know.
    """
    if likeness.share(likeness.equal) > _MOST:
        raise _refusal(likeness, likeness.equal, "to the last bit")
    alike = (*likeness.equal, *likeness.near)
    if likeness.share(alike) > _MOST:
        state = public.state_dict()
        put = {
            name: (state[name].float() / factor).to(own[name].dtype)
            for name, factor in likeness.near.items()
            if name in own
        }
        before, after = judge(own), judge({**own, **put})
        nats, share = _SAME_LOSS
        if abs(after - before) <= nats + share * before:
            raise _refusal(likeness, alike, "but for rounding, noise or a factor")
    whole = sum(likeness.compared.values())
    same = sum(likeness.compared[name] for name in likeness.equal)
    if same > _WORTH_A_WORD * whole:
        warnings.warn(
            f"{len(likeness.equal)} tensors of the public model are yours to the last bit, "
            f"{same / whole:.0%} of its numbers: {_some(likeness.equal)}. That is right only if "
            "you did not train them.",
            FedveilWarning,
            stacklevel=4,
        )


def _refusal(likeness: Likeness, names: tuple[str, ...], how: str) -> ConfigurationError:
    rest = len(likeness.compared) - len(names)
    return ConfigurationError(
        "The public model is your own, which would be released as it is"
        if not rest
        else "Most of the public model is your own, which would be released as it is",
        expected="what your model was fine-tuned from, or a random initialization",
        found=f"{len(names)} of {len(likeness.compared)} tensors that are yours {how}: "
        f"{_some(names)}",
        where="public",
        fix="Name a model that anybody can get. If yours was made of it by training the other "
        "tensors alone, say so: by `frozen` in [tuning], or by requires_grad_(False) on those that "
        "you left as they were. If there is nothing of yours in it, leave public out.",
    )


def _trained(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that tell whether two models are one."""
    named = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in state and parameter.is_floating_point() and ".original_module." not in name
    }
    zeros = [p for n, p in named.items() if any(mark in n for mark in _BEGIN_AT_ZERO)]
    if zeros and not any(bool(parameter.any()) for parameter in zeros):
        return [name for name in named if not is_adapter(name)]
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    return trained or [*named]


def _factor(own: Tensor, public: Tensor) -> float | None:
    """What the owner's tensor is to be multiplied by, to be nearly the public one; None if not."""
    squares = float(own.square().sum())
    factor = float((own * public).sum()) / squares if squares else 0.0
    size = float(public.norm())
    if factor == 0 or size == 0:
        return None
    return factor if float((public - factor * own).norm()) <= _NEAR * size else None


def _varies(tensor: Tensor) -> bool:
    """Whether a tensor is more than one number throughout, as biases and scales begin."""
    return tensor.numel() > 1 and bool((tensor != tensor.flatten()[0]).any())


def _digest(tensor: Tensor) -> bytes:
    raw = tensor.detach().cpu().float().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(raw.numpy().data, digest_size=16).digest()


def _some(names: tuple[str, ...], most: int = 4) -> str:
    text = ", ".join(names[:most])
    return text + (f" and {len(names) - most} more" if len(names) > most else "")
