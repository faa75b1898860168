"""Clients train a model that is public, and the owner's model learns of it what they teach it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fedveil.aggregation import WHOLE, Influence, Scales
from fedveil.errors import ConfigurationError, TrainingError
from fedveil.schemes.base import Metrics, Scheme, ServerSide, ServerState
from fedveil.schemes.health import loss_problem
from fedveil.secret import Secret
from fedveil.state import StateDict, read_state
from fedveil.units import UnitGroup
from fedveil.wire import Message

__all__ = ["Transfer", "check_public", "on_the_way"]


Judge = Callable[[StateDict], float]
"""The loss of a model on the owner's data, in nats: less is better."""

Tune = Callable[[StateDict], StateDict]
"""Trains a model as the owner's was, on the same data. What it is given stays as it is."""

COEFFICIENTS = (
    (1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (0.75, 1.0), (0.5, 1.0), (0.25, 1.0), (0.0, 1.0),
    (0.75, 0.75), (0.5, 0.5), (0.3, 0.7),
)  # fmt: skip
"""How much of the owner's task vector, and of the clients', is tried. The first is the base."""

STRETCHES = (0.25, 0.5, 0.75, 1.0)
"""How far of the way that tuning takes what was taught is tried (WiSE-FT; 2109.01903)."""

_TUNED = ".tuned."
"""Before names in a checkpoint. No module's name is empty, so that no tensor's begins like this."""


class Transfer:
    """A server side whose releases are of a public model, and hold nothing of the owner's.

    The server side inside begins with the public model P, sends its proxies and takes back updates,
    as it would with any model. What clients have taught it, ``P_t - P``, is a task vector (Ilharco
    et al., 2212.04089), as ``B - P`` is one, with B the owner's model, if that was fine-tuned from
    P. The global model is ``P + a (B - P) + b (P_t - P)``, a and b of `COEFFICIENTS`, whichever
    pair has the least loss on the owner's data: where clients have taught what B knows already, the
    sum of both would go too far, and where they have taught nothing, B stays as it is. No byte of a
    release depends on B.

    An owner that can repeat what made B may do so on what was taught: P_t becomes T by the same
    training on the same data, and the models on the way, ``P_t + c (T - P_t)`` with c of
    `STRETCHES`, are judged beside the sums. P need not have anything to do with B then: if nothing
    like B is public, a random initialization will do.

    A head that B did not begin with (a new one, drawn at random) is no part of what both models
    have in common: it is fresh, and taken whole, ``a B + b P_t``, so that both heads answer.

    Does NOT protect: the public model, or what clients teach it: from a second round on, proxies
    show what earlier rounds have taught it (not to B). What the owner's model answers, if
    others may ask it, is not looked at here.

    Args:
        scheme: The method.
        public: The public model.
        own: The owner's model, of the same architecture, and fine-tuned from the public one.
        secret: The federation secret.
        judge: What chooses between pairs. Data that the owner's model was tuned on favour it too
            much.
        fresh: Patterns (as in the shell) of tensors that the owner's model did not begin with as
            they are in the public one, such as "classifier.*".
        tune: What repeats the owner's training, at the end of each round; None if that cannot be.

    Raises:
        ConfigurationError: The scheme cannot work with the public model, or a pattern matches none
            of what it releases.
    """

    def __init__(
        self,
        scheme: Scheme,
        public: nn.Module,
        own: nn.Module,
        secret: Secret,
        judge: Judge,
        fresh: Sequence[str] = (),
        tune: Tune | None = None,
    ) -> None:
        self._inside: ServerSide = scheme.server(public, secret)
        self._public, self._own = scheme.tensors(public), scheme.tensors(own)
        self._judge, self._fresh = judge, _matching(fresh, self._public)
        self._tune = tune
        # Of what was taught so far; None before the first round.
        self._loss: float | None = None
        self._chosen: tuple[float, float] = COEFFICIENTS[0]
        # What is tuned of P_t where that is best; else nothing, and the pair says what is.
        self._tuned: StateDict = {}

    def begin_round(self, number: int) -> None:
        """See :class:`~fedveil.schemes.base.ServerSide`."""
        self._inside.begin_round(number)

    def release(self, client: str) -> Message:
        """A proxy of the public model, as clients have taught it so far."""
        return self._inside.release(client)

    def inspect(self, client: str, reply: Message) -> Influence:
        """See :class:`~fedveil.schemes.base.ServerSide`."""
        return self._inside.inspect(client, reply)

    def absorb(self, client: str, reply: Message, weight: float, scales: Scales = WHOLE) -> None:
        """See :class:`~fedveil.schemes.base.ServerSide`."""
        self._inside.absorb(client, reply, weight, scales)

    def end_round(self) -> Metrics:
        """Choose what the owner's model is made of: ``own``, ``taught`` and perhaps ``tuned``.

        Raises:
            TrainingError: What clients taught is no model: its loss is not finite, or has exploded.
        """
        metrics = self._inside.end_round()
        losses = {pair: self._judge(self._at(*pair)) for pair in COEFFICIENTS}
        self._check_taught(losses[0.0, 1.0])
        self._chosen, self._tuned = min(COEFFICIENTS, key=losses.__getitem__), {}
        tuned: Metrics = {}
        if self._tune is not None:
            tuned = {"tuned": self._choose_tuned(self._tune, losses[self._chosen])}
        own, taught = self._chosen
        return {**metrics, "own": own, "taught": taught, **tuned}

    def _check_taught(self, loss: float) -> None:
        """Refuse what was taught if it is no model: later rounds would start from it.

        Raises:
            TrainingError: It is none.
        """
        if loss_problem(loss, 0.0) is not None:
            before = (
                self._judge({**self._own, **self._public}) if self._loss is None else self._loss
            )
            problem = loss_problem(loss, before)
            if problem is not None:
                raise TrainingError(
                    "What clients taught makes no model of the public one",
                    found=problem,
                    where="the public model on the owner's rows",
                    fix="Look at the clients' data; tighter bounds leave less room.",
                )
        self._loss = loss

    def _choose_tuned(self, tune: Tune, least: float) -> float:
        """How far to go towards what tuning makes of what was taught; 0 if a sum has less loss."""
        begun, chosen = self._at(0.0, 1.0), 0.0
        try:
            end = tune(begun)
        except TrainingError as error:  # what clients did in this round must not be lost with it
            warnings.warn(f"The owner's tuning failed, and is left out: {error}", stacklevel=2)
            return 0.0
        # What is frozen is the owner's own, and in no checkpoint.
        trained = self._inside.state().tensors.keys()
        for stretch in STRETCHES:
            state = on_the_way(begun, end, stretch)
            loss = self._judge(state)
            if loss < least:
                least, chosen, self._chosen = loss, stretch, (0.0, 1.0)
                self._tuned = {name: state[name] for name in trained}
        return chosen

    def final(self) -> StateDict:
        """The owner's model with what was taught, in the dtypes that it was brought in."""
        tuned = {name: tensor.clone() for name, tensor in self._tuned.items()}
        return {**self._at(*self._chosen), **tuned}

    @torch.no_grad()
    def _at(self, own: float, taught: float) -> StateDict:
        # Not what `final` gives: of lower precision, that would have lost small steps.
        now = self._inside.state().tensors
        return {
            name: _between(name, tensor, self._begun(name), now[name], own, taught)
            if taught and name in now and tensor.is_floating_point()
            else tensor.clone()
            for name, tensor in self._own.items()
        }

    def _begun(self, name: str) -> Tensor:
        """What both models had in common of a tensor."""
        tensor = self._public[name]
        return torch.zeros_like(tensor) if name in self._fresh else tensor

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
        """That of the server side inside, and what was chosen: a pair, or a tuned model."""
        state = self._inside.state()
        tuned = {_TUNED + name: tensor for name, tensor in self._tuned.items()}
        values = {**state.values, "coefficients": [*self._chosen], "loss": self._loss}
        return ServerState({**state.tensors, **tuned}, values)

    def restore(self, state: ServerState) -> None:
        """See :class:`~fedveil.schemes.base.ServerSide`."""
        own, taught = state.values["coefficients"]
        tuned = {name for name in state.tensors if name.startswith(_TUNED)}
        inside = {name: state.tensors[name] for name in state.tensors if name not in tuned}
        self._inside.restore(ServerState(inside, state.values))
        self._chosen = (float(own), float(taught))
        self._loss = state.values.get("loss")
        self._tuned = {name.removeprefix(_TUNED): state.tensors[name].clone() for name in tuned}


@torch.no_grad()
def on_the_way(begun: StateDict, end: StateDict, stretch: float) -> StateDict:
    """A model between two, of their weights; counters are the latter's."""
    return {
        name: torch.lerp(begun[name], tensor, stretch)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in end.items()
    }


def _between(
    name: str, own: Tensor, begun: Tensor, now: Tensor, by_own: float, by_now: float
) -> Tensor:
    begun, wide = begun.to(now.dtype), own.to(now.dtype)
    moved = begun + by_own * (wide - begun) + by_now * (now - begun)
    if name.endswith("running_var"):  # no sum of variances may be below zero
        moved = torch.maximum(moved, torch.minimum(wide, now))
    return moved.to(own.dtype)


def _matching(patterns: Sequence[str], names: Collection[str]) -> frozenset[str]:
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise ConfigurationError(
                "A pattern of fresh tensors matches none that is released",
                expected=f"a pattern for names such as {', '.join([*names][-3:])}",
                found=repr(pattern),
            )
        found |= matching
    return frozenset(found)


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
