"""Update inference: what a client learns of the others from two successive proxies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedveil.audit.attacks.coalition import Coalition
from fedveil.audit.attacks.registry import UPDATES, register_attack
from fedveil.audit.evidence import Evidence, Kept
from fedveil.quantization import QuantizedTensor
from fedveil.run.findings import UpdateGuess
from fedveil.run.shown import Proxy
from fedveil.wire import Dense, Message

__all__ = ["infer_updates", "update_inference"]


@register_attack(
    "update inference",
    title="the others' mean update, inferred",
    does="takes the difference of the proxies before and after a round, less the client's own "
    "part: about the mean of the others' updates",
    source="our name; successive snapshots: Melis et al. 2019, arXiv 1805.04049",
    begins=UPDATES,
    quick=True,
)
def update_inference(coalition: Coalition) -> Iterator[UpdateGuess]:
    """What each client of the coalition infers alone."""
    for client in coalition.clients:
        for guess in infer_updates(coalition.evidence, client):
            coalition.tell(f"inferring the others' updates of round {guess.round}")
            yield guess


def infer_updates(evidence: Evidence, client: str) -> Iterator[UpdateGuess]:
    """Take the difference of successive proxies, less the client's own part of it.

    What a round added to the model is the mean of its clients' updates. A client that is sent the
    model before and after sees that mean through the quantization, and knows its own part.

    Knows: its proxies, its own updates, and how many clients took part. The others' updates are
    read to measure the guess only.

    Yields:
        A guess for each round of which updates were kept, with what they are updates of, and after
        which the client was sent a proxy again.
    """
    sent = {kept.round: kept for kept in evidence.proxies([client])}
    known = {(kept.round, kept.client) for kept in evidence.proxies()}
    updates: dict[int, list[Kept]] = {}
    for kept in evidence.updates():
        updates.setdefault(kept.round, []).append(kept)
    for number in sorted(sent):
        answers = updates.get(number, [])
        others = [kept for kept in answers if kept.client != client]
        whole = all((kept.round, kept.client) in known for kept in answers)
        if number + 1 in sent and others and whole:
            before, after = evidence.open(sent[number]), evidence.open(sent[number + 1])
            own = next((kept for kept in answers if kept.client == client), None)
            mine = {} if own is None else _update(evidence, own)
            part = {name: update / len(answers) for name, update in mine.items()}
            yield _guess(evidence, (before, after), part, others)


def _guess(
    evidence: Evidence, proxies: tuple[Proxy, Proxy], mine: Mapping[str, Tensor],
    others: list[Kept],
) -> UpdateGuess:  # fmt: skip
    truth: dict[str, Tensor] = {}
    for kept in others:
        for name, update in _update(evidence, kept).items():
            truth[name] = truth.get(name, torch.zeros_like(update)) + update / len(others)
    changes, truths = [], []
    for name, wanted in truth.items():
        first, second = (proxy.whole(name) for proxy in proxies)
        both = first.isfinite() & second.isfinite()
        changes.append((second - first - mine.get(name, torch.zeros_like(wanted)))[both])
        truths.append(wanted[both])
    change, wanted = torch.cat(changes), torch.cat(truths)
    cosine = torch.nn.functional.cosine_similarity(change, wanted, dim=0)
    share = change.numel() / evidence.manifest.parameters
    return UpdateGuess(proxies[0].client, proxies[0].round, float(cosine), share)


def _update(evidence: Evidence, kept: Kept) -> dict[str, Tensor]:
    """A client's update, whole: zero where nothing was released to it."""
    sent = next(one for one in evidence.proxies([kept.client]) if one.round == kept.round)
    selection, message = evidence.open(sent).selection, kept.read()
    updates = {}
    for name, part in _tensors(message):
        if name in evidence.manifest.tensors:
            updates[name] = torch.zeros(evidence.manifest.tensors[name].shape)
            selection.scatter(name, part, updates[name])
    return updates


def _tensors(message: Message) -> Iterator[tuple[str, Tensor]]:
    for name, section in message.sections.items():
        if isinstance(section, QuantizedTensor):
            yield name, section.dequantize()
        elif isinstance(section, Dense):
            yield name, section.tensor.float()
