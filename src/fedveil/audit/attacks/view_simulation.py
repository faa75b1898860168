"""View simulation: making by oneself, of what anybody can get, the very bytes one was sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from fedveil.audit.attacks.coalition import Coalition, Simulated
from fedveil.audit.attacks.registry import PUBLIC, register_attack
from fedveil.audit.evidence import Kept
from fedveil.errors import FedveilError
from fedveil.schemes import Scheme
from fedveil.secret import Secret
from fedveil.state import load_state

__all__ = ["can_simulate", "view_simulation"]


@register_attack(
    "view simulation",
    title="proxies that the attackers made of the public model themselves",
    does="makes the proxies without the owner, of the public model and with a secret of its own, "
    "and compares byte by byte: what it can make holds nothing of the owner's, and what comes of "
    "it counts as reached without a released byte",
    source="our name; simulation: Goldwasser, Micali and Rackoff 1989, doi 10.1137/0218012",
    begins=PUBLIC,
    quick=True,
)
def view_simulation(coalition: Coalition) -> Iterator[Simulated]:
    """Whether the coalition :func:`can_simulate` all that it was sent."""
    stage = coalition.stage
    if stage.public is None or stage.scheme is None:
        return
    load_state(stage.model, stage.whole(stage.public))
    if can_simulate(stage.scheme, stage.model, coalition.sent):
        yield Simulated()


def can_simulate(scheme: Scheme, public: nn.Module, sent: Sequence[Kept]) -> bool:
    """Whether all that a coalition was sent is what the scheme makes of a public model.

    The attacker runs fedveil, with a secret of its own, and compares byte by byte. What it can make
    holds nothing of the owner's, however good it is: what comes of it is reached without the owner,
    too. From a second round on proxies show what clients have taught, and masks depend on the
    federation's secret: neither can be simulated.

    Knows: the scheme and its settings, the public model.

    Args:
        scheme: With the settings of the run.
        public: What anybody can get.
        sent: The messages.
    """
    if not sent or any(kept.round != 1 for kept in sent):
        return False
    try:
        server = scheme.server(public, Secret.generate())
        server.begin_round(1)
        return all(
            server.release(kept.client).to_bytes() == kept.path.read_bytes() for kept in sent
        )
    except (FedveilError, OSError):  # the scheme cannot work with that model: no such bytes then
        return False
