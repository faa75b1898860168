"""Forging: making by oneself, of what anybody can get, the very bytes that one was sent."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedveil.audit.evidence import Kept
from fedveil.errors import FedveilError
from fedveil.schemes import Scheme
from fedveil.secret import Secret

__all__ = ["can_forge"]


def can_forge(scheme: Scheme, public: nn.Module, sent: Sequence[Kept]) -> bool:
    """Whether all that a coalition was sent is what the scheme makes of a public model.

    The attacker runs fedveil himself, with a secret of his own, and compares byte by byte. What he
    can make holds nothing of the owner's, however good it is: what comes of it he reaches without
    the owner, too. From a second round on proxies show what clients have taught, and masks depend
    on the federation's secret: neither can be forged.

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
