"""Clients train a model that is public, and what they teach it is added to the owner's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError
from fedveil.schemes.base import Metrics, Scheme, ServerSide, ServerState
from fedveil.secret import Secret
from fedveil.state import StateDict, read_state
from fedveil.units import UnitGroup
from fedveil.wire import Message

__all__ = ["Transfer", "check_public"]


class Transfer:
    """A server side whose releases are of a public model, and hold nothing of the owner's.

    The server side inside begins with the public model P, sends its proxies and takes back updates,
    as it would with any model. What clients have taught it, ``P_t - P_0``, is a task vector
    (Ilharco et al., 2212.04089), and the owner's model B stands where P stands in function space if
    it was fine-tuned from it: the global model is ``B + P_t - P_0``. No byte of a release depends
    on B.

    Does NOT protect: the public model, or what clients teach it: from a second round on, proxies
    show what earlier rounds have taught it (not to B). What the owner's model answers, if he lets
    others ask it, is not looked at here.

    Args:
        scheme: The method.
        public: The public model.
        own: The owner's model, of the same architecture, and fine-tuned from the public one.
        secret: The federation secret.

    Raises:
        ConfigurationError: The scheme cannot work with the public model.
    """

    def __init__(self, scheme: Scheme, public: nn.Module, own: nn.Module, secret: Secret) -> None:
        self._inside: ServerSide = scheme.server(public, secret)
        self._public, self._own = scheme.tensors(public), scheme.tensors(own)

    def begin_round(self, number: int) -> None:
        """See :class:`~fedveil.schemes.base.ServerSide`."""
        self._inside.begin_round(number)

    def release(self, client: str) -> Message:
        """A proxy of the public model, as clients have taught it so far."""
        return self._inside.release(client)

    def absorb(self, client: str, reply: Message, weight: float) -> None:
        """See :class:`~fedveil.schemes.base.ServerSide`."""
        self._inside.absorb(client, reply, weight)

    def end_round(self) -> Metrics:
        """See :class:`~fedveil.schemes.base.ServerSide`."""
        return self._inside.end_round()

    @torch.no_grad()
    def final(self) -> StateDict:
        """The owner's model with what was taught added, in the dtypes he brought."""
        # Not what `final` gives: of lower precision, that would have lost small steps.
        taught = self._inside.state().tensors
        return {
            name: _moved(name, own, self._public[name], taught.get(name))
            for name, own in self._own.items()
        }

    @property
    def groups(self) -> tuple[UnitGroup, ...]:
        """The unit groups that masks cut of the public model, if any."""
        return self._inside.groups

    @property
    def views(self) -> tuple[str, ...]:
        """Global model only: a server mask would withhold what everybody has."""
        return ("global",)

    def view(self, name: str) -> StateDict:
        """The owner's model, as :meth:`final` gives it."""
        return self.final()

    def state(self) -> ServerState:
        """That of the server side inside: the owner's model never changes."""
        return self._inside.state()

    def restore(self, state: ServerState) -> None:
        """See :class:`~fedveil.schemes.base.ServerSide`."""
        self._inside.restore(state)


def _moved(name: str, own: Tensor, public: Tensor, taught: Tensor | None) -> Tensor:
    """One tensor of the owner's, moved as the public one was; counters stay as they are."""
    if taught is None or not own.is_floating_point():
        return own.clone()
    begun = public.to(taught.dtype)
    if name.endswith("running_var"):  # a sum could be below zero
        return (own * (taught / begun.clamp_min(torch.finfo(begun.dtype).tiny))).to(own.dtype)
    return (own.to(taught.dtype) + (taught - begun)).to(own.dtype)


def check_public(scheme: Scheme, public: nn.Module, own: nn.Module) -> None:
    """Whether a model can be released in another's place.

    Raises:
        ConfigurationError: It is of another architecture, or differs in what clients hold though
            it is not released.
    """
    mine, theirs = own.state_dict(), public.state_dict()
    for name in sorted(mine.keys() | theirs.keys()):
        wanted, found = _kind(mine.get(name)), _kind(theirs.get(name))
        if wanted != found:
            raise ConfigurationError(
                "The public model is of another architecture",
                expected=wanted,
                found=found,
                where=name,
                fix="It is what your model was fine-tuned from, with a head of the same size.",
            )
    released = scheme.tensors(own).keys()
    for name in (name for name in read_state(own) if name not in released):
        if not torch.equal(mine[name].cpu(), theirs[name].cpu()):
            raise ConfigurationError(
                "Clients hold the backbone exactly as it is, and yours is not the public one",
                expected="the same weights in all that is not released",
                found="others",
                where=name,
                fix="Take a scheme that releases a proxy of the backbone (fedqsn), or an adapter "
                "on the public backbone.",
            )


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "no such tensor"
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
