"""FedQSN (Xu et al., 2508.18911): clients train a masked and quantized proxy of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fedveil.aggregation import (
    AVERAGES,
    WHOLE,
    Aggregation,
    Average,
    Influence,
    Scales,
    aggregation_of,
)
from fedveil.errors import ConfigurationError
from fedveil.masking import Draw, Masking, Masks, Policy, Release
from fedveil.quantization import QuantizedTensor, quantize
from fedveil.removal import try_removal
from fedveil.schemes.adapters import (
    A_MATRICES,
    check_train_only,
    frozen_names,
    is_adapter,
    long_rows,
)
from fedveil.schemes.base import Metrics, Scheme, ServerState
from fedveil.schemes.client import UNIT_PREFIX, ProxyClient
from fedveil.schemes.facts import Facts, bits_of
from fedveil.schemes.global_model import GlobalModel, sent
from fedveil.schemes.ledger import RoundLedger
from fedveil.schemes.registry import register_scheme
from fedveil.secret import Secret
from fedveil.selection import Selection
from fedveil.state import StateDict
from fedveil.units import UnitGroup, find_units, tried_units, units_if_known, validate
from fedveil.units.trial import Run
from fedveil.updates import SMALL, UpdateCodec, Updates, check_bits, check_error_feedback
from fedveil.wire import Dense, Gathered, Message, Section, Sections, UnitIndex

__all__ = ["FedQSN"]

Merge = Literal["original", "server"]
MERGES = get_args(Merge)


@register_scheme
@dataclass(frozen=True)
class FedQSN(Scheme):
    """Release only a proxy: some units withheld by a server and a client mask, the rest quantized.

    Per round the server quantizes the global model once and gathers each client's proxy from it;
    clients train their proxies; updates are added to the full-precision weights, each element over
    the clients that held it.

    Attributes:
        server_mask: Server mask rate p1: the share of units that no client ever gets.
        client_mask: Client mask rate p2: the share of the rest withheld from one client.
        bits: Bits per parameter of a proxy (2, 3, 4 or 8); None sends released units exactly.
        units: ``"neurons"`` (MLP hidden neurons and attention heads), ``"mlp"`` (the former only)
            or ``"columns"`` (the paper: output columns of embedding, attention and MLP output).
        policy: When client masks are drawn; see :class:`~fedveil.masking.Masking`.
        groups: Number of mask groups under ``policy="grouped"``.
        draw: ``"exact"`` counts or ``"bernoulli"`` draws.
        unbiased: Scale released units by 1/(1 - p), as the paper does.
        average: Mean of updates over ``"holders"`` of a unit, or over all ``"participants"``.
        aggregation: How updates become one: "mean", "regmean", or a
            :class:`~fedveil.aggregation.RegMean` with its settings.
        merge: The final model: ``"original"`` keeps the owner's values of never-released units (the
            paper), ``"server"`` leaves them out, as in the model that was trained around them.
        update_bits: Quantize updates on the way up; None sends float32.
        error_feedback: Clients keep what that loses and add it to their next update.
        block: Values per quantization block. Next to 64, 192 saves 2 % of the bytes for a relative
            error of 9.8 instead of 9.2 % at 4 bits.
        backbone: "always" sends it in every round; "once" sends parameters that are frozen (do not
            require gradients: the backbone of an adapter) to each client only once, who keeps them.
        adapter_bits: Bits per parameter of a released PEFT adapter (2, 3, 4 or 8); None sends it
            exactly. ``bits`` is for the rest.
        train_only: "B" has clients leave the A matrices of a LoRA adapter as they are (FFA-LoRA,
            "Improving LoRA in Privacy-preserving Federated Learning", 2403.12313): the mean of
            updates of B is then the mean of what adapters do. None trains both.
        shrink: Clients train a network that is physically without withheld neurons, heads and
            channels, where one can be made, rather than with zeros in their place: the same update
            in less time and memory, but for dropout among them, which draws other numbers.

    Does NOT protect: released units. A client holds them at ``bits`` precision, one round behind
    the global model, and what it trains is its own. Masks hide a unit from one client, not from
    all: see :class:`~fedveil.masking.Masking` for what coalitions and repeated rounds give away.
    """

    name: ClassVar[str] = "fedqsn"
    client_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "units",
            "aggregation",
            "update_bits",
            "error_feedback",
            "block",
            "shrink",
            "backbone",
            "train_only",
        }
    )

    server_mask: float = 0.1
    client_mask: float = 0.3
    bits: int | None = 4
    units: str = "mlp"
    policy: Policy = "grouped"
    groups: int = 2
    draw: Draw = "exact"
    unbiased: bool = False
    average: Average = "holders"
    aggregation: Aggregation | str = "mean"
    merge: Merge = "original"
    update_bits: int | None = None
    error_feedback: bool = False
    block: int = 192
    shrink: bool = True
    backbone: Literal["always", "once"] = "always"
    adapter_bits: int | None = None
    train_only: Literal["B"] | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits, "bits")
        _check_word("average", self.average, AVERAGES)
        _check_word("merge", self.merge, MERGES)
        check_error_feedback(self.error_feedback, self.update_bits)
        check_bits(self.adapter_bits, "adapter_bits")
        _check_word("backbone", self.backbone, ("always", "once"))
        _check_word("train_only", self.train_only, ("B", None))
        if self.backbone == "once" and self.policy == "fresh":
            raise ConfigurationError(
                "Fresh masks show another part of the backbone in every round",
                expected='policy="sticky" or "grouped" with backbone="once"',
                found='policy="fresh"',
            )
        _ = self.masking, self.codec  # check the rest
        object.__setattr__(self, "aggregation", aggregation_of(self.aggregation))

    @classmethod
    def paper(cls, **changes: Any) -> FedQSN:
        """The recipe of the paper: columns, fresh Bernoulli masks, unbiased scaling, plain mean.

        Rates and bits are not given in what was published; (0.1, 0.3, 4) are ours. Two things
        follow the text where the released code differs: updates are added to full-precision
        weights, and a code of b bits has 2^b levels. Embeddings are quantized as well.
        """
        paper = cls(
            units="columns",
            policy="fresh",
            draw="bernoulli",
            unbiased=True,
            average="participants",
            merge="original",
            block=64,
        )
        return replace(paper, **changes)

    @classmethod
    def once(cls, **changes: Any) -> FedQSN:
        """For a single round, in which all clients do all their work: nothing of the gain is shown.

        No client mask, as clients who train different parts merge less well; updates are merged by
        least squares (RegMean).
        """
        return replace(cls(client_mask=0.0, aggregation="regmean"), **changes)

    @classmethod
    def default(cls, *, of_public: bool) -> FedQSN:
        """What a federation does that is told no scheme; without masks where these hide nothing."""
        return cls.once(server_mask=0.0) if of_public else cls.once()

    @property
    def masking(self) -> Masking:
        """The mask configuration."""
        return Masking(
            server=self.server_mask,
            client=self.client_mask,
            policy=self.policy,
            groups=self.groups,
            draw=self.draw,
            unbiased=self.unbiased,
        )

    @property
    def codec(self) -> UpdateCodec:
        """How updates travel."""
        return UpdateCodec(self.update_bits, self.block)

    def facts(self) -> Facts:
        """See :meth:`Scheme.facts`."""
        return Facts(
            server_mask=self.server_mask,
            client_mask=self.client_mask,
            draw=self.draw,
            policy=self.policy,
            bits=bits_of(self.bits),
            adapter_bits=bits_of(self.adapter_bits),
            exact_below=SMALL,
        )

    def check(self, model: nn.Module, run: Run | None = None) -> None:
        """See :meth:`Scheme.check`: whether its units are known, and are units."""
        self.groups_of(model, run)

    def groups_of(self, model: nn.Module, run: Run | None = None) -> tuple[UnitGroup, ...]:
        """The unit groups that masks cut, tried on the model itself.

        Where both rates are 0 nothing is withheld, so that a model need not have any.
        """
        if self.server_mask or self.client_mask:
            groups = tried_units(model, self.units, run)
            if self.shrink:
                try_removal(model, groups, run)
            return groups
        return units_if_known(model, self.units)

    def server(self, model: nn.Module, secret: Secret) -> FedQSNServer:
        """See :meth:`Scheme.server`."""
        return FedQSNServer(self, model, secret)

    def client(self) -> ProxyClient:
        """See :meth:`Scheme.client`."""
        find_groups = partial(find_units, choice=self.units)
        aggregation = aggregation_of(self.aggregation)
        return ProxyClient(
            self.name,
            find_groups,
            self.codec,
            aggregation,
            self.shrink,
            self.error_feedback,
            still=A_MATRICES if self.train_only == "B" else None,
            keeps_backbone=self.backbone == "once",
        )


class FedQSNServer:
    """The server side; see :class:`~fedveil.schemes.base.ServerSide`."""

    def __init__(self, scheme: FedQSN, model: nn.Module, secret: Secret) -> None:
        self._scheme, self._global = scheme, GlobalModel(scheme.tensors(model), frozen_names(model))
        check_train_only(scheme.train_only, self._global.tensors)
        self._groups = scheme.groups_of(model)
        validate(self._groups, model.state_dict())
        self._masks = Masks(self._groups, scheme.masking, secret)
        self._ledger = RoundLedger[_Proxy](scheme.name)
        self._sources: dict[str, QuantizedTensor | Dense] = {}
        self._proxies: dict[tuple[tuple[str | int, ...], bool], _Proxy] = {}
        self._backbone = frozen_names(model) if scheme.backbone == "once" else frozenset()
        if scheme.backbone == "once" and not self._backbone:
            raise ConfigurationError(
                "The model has no backbone that could be sent once",
                expected="parameters that are frozen, as beside an adapter",
                found="none",
                fix="peft.get_peft_model(model, peft.LoraConfig(...)) adds an adapter.",
            )
        # Who has what is sent once: now, and when the round began.
        self._holders: set[str] = set()
        self._held_before: frozenset[str] = frozenset()
        shapes = {name: tensor.shape for name, tensor in self._global.floating()}
        self._new_sums = aggregation_of(scheme.aggregation).sums(
            model, shapes, scheme.average, shared_masks=scheme.masking.is_shared
        )
        self._sums = self._new_sums()

    def begin_round(self, number: int) -> None:
        """Quantize the global model once for all clients of the round."""
        self._ledger.begin(number)
        self._proxies = {}
        self._sums = self._new_sums()
        self._held_before = frozenset(self._holders)
        # What is sent once does not change either.
        kept = {name: self._sources[name] for name in self._backbone & self._sources.keys()}
        self._sources = {
            name: kept[name] if name in kept else self._source(name, tensor)
            for name, tensor in self._global.tensors.items()
        }

    def release(self, client: str) -> Message:
        """This client's proxy, to be gathered from what is packed when the message is written."""
        key = self._masks.mask_of(client, self._ledger.round), client in self._held_before
        if key not in self._proxies:
            self._proxies[key] = self._proxy(client)
        proxy = self._proxies[key]
        self._ledger.record(client, proxy)
        # Who does not answer may have lost what it held: it is sent all of it again.
        self._holders.discard(client)
        scheme, number = self._scheme.name, self._ledger.round
        return Message("proxy", scheme, number, client, proxy.sections, {})

    def inspect(self, client: str, reply: Message) -> Influence:
        """Check one reply, and say how much it would change."""
        selection = self._ledger.expect(client, reply).selection
        updates, statistics = self._read(reply, selection)
        return Influence(updates.norm(), self._sums.sizes(statistics))

    def absorb(self, client: str, reply: Message, weight: float, scales: Scales = WHOLE) -> None:
        """Add one update to the sums, on the units that this client held."""
        selection = self._ledger.expect(client, reply, weight).selection
        updates, statistics = self._read(reply, selection)
        self._ledger.accept(client)
        if self._backbone:
            self._holders.add(client)
        self._sums.add(updates, selection, weight, statistics, scales)

    def _read(self, reply: Message, selection: Selection) -> tuple[Updates, Any]:
        shapes = {name: tensor.shape for name, tensor in self._global.floating()}
        parts, statistics = self._sums.read(reply, selection)
        updates = self._scheme.codec.read(parts, shapes, selection)
        self._global.check_statistics(updates, selection)
        return updates, statistics

    def end_round(self) -> Metrics:
        """Add the mean update to the full-precision weights."""
        self._ledger.end()
        norm = self._global.apply(self._sums.mean) if self._sums.clients else 0.0
        self._sources = {n: source for n, source in self._sources.items() if n in self._backbone}
        self._proxies = {}
        return {"clients": self._sums.clients, "update_norm": norm}

    def final(self) -> StateDict:
        """The merged model.

        Never-released units were never changed: the global model holds their original values.
        """
        return self.view("server_model" if self._scheme.merge == "server" else "global")

    @property
    def groups(self) -> tuple[UnitGroup, ...]:
        """See :class:`~fedveil.schemes.base.ServerSide`."""
        return tuple(self._groups)

    @property
    def views(self) -> tuple[str, ...]:
        """Global model, and server model (the global model under the server mask)."""
        return ("global", "server_model")

    def view(self, name: str) -> StateDict:
        """See :class:`~fedveil.schemes.base.ServerSide`."""
        if name == "global":
            return self._global.export()
        kept = {name: Release(units, 1.0) for name, units in self._masks.server().items()}
        selection = Selection(self._groups, kept, self._global.shapes)
        server = {name: torch.zeros_like(t) for name, t in self._global.tensors.items()}
        for name, tensor in self._global.tensors.items():
            selection.scatter(name, selection.gather(name, tensor), server[name])
        return self._global.export(server)

    def state(self) -> ServerState:
        """Global model, round and who belongs to which group; masks follow from the secret."""
        values = {"round": self._ledger.round, "clients": list(self._masks.clients())}
        if self._backbone:
            values["holders"] = sorted(self._holders)
        return ServerState(self._global.changing(), values)

    def restore(self, state: ServerState) -> None:
        """See :class:`~fedveil.schemes.base.ServerSide`."""
        self._global.restore(state.tensors)
        self._ledger.round = int(state.values["round"])
        self._masks.enroll(state.values["clients"])
        self._holders = set(state.values.get("holders", ()))
        self._sources = {}

    @property
    def _bits(self) -> int:
        assert self._scheme.bits is not None
        return self._scheme.bits

    def _proxy(self, client: str) -> _Proxy:
        released = self._masks.release(client, self._ledger.round)
        selection = Selection(self._groups, released, self._global.shapes)
        sections: dict[str, Section | Gathered] = {
            UNIT_PREFIX + name: UnitIndex(size, released[name].units, released[name].scale)
            for name, size in ((group.name, group.size) for group in self._groups)
        }
        left_out = self._backbone if client in self._held_before else ()
        for name, source in self._sources.items():
            if name not in left_out:
                sections[name] = self._section(name, source, selection)
        return _Proxy(selection, Sections(sections))

    def _source(self, name: str, tensor: Tensor) -> QuantizedTensor | Dense:
        """What all clients of the round get their part of: packed, or a copy.

        A message that someone keeps must not change with the model.
        """
        if is_adapter(name):
            return self._adapter_section(name, tensor.clone())
        axis = self._packed_axis(name)
        if axis is not None:
            return quantize(tensor, bits=self._bits, axis=axis, block=self._scheme.block)
        per_client = self._is_quantized(name)  # see `_section`: what is sent is made anew
        return Dense(sent(tensor.to(self._global.dtypes[name], copy=not per_client)))

    def _section(
        self, name: str, source: QuantizedTensor | Dense, selection: Selection
    ) -> Section | Gathered:
        cuts = selection.positions(name)
        if not cuts:
            return source
        if is_adapter(name):
            part = selection.gather(name, self._global.tensors[name])
            return self._adapter_section(name, part)
        if isinstance(source, QuantizedTensor):
            return Gathered(source, cuts[source.axis])
        if self._is_quantized(name):
            # Cut along two axes: blocks along a row would mix input units, so that neither codes
            # nor scales can be gathered. Such tensors (plain nets) are quantized per client.
            part = selection.gather(name, self._global.tensors[name])
            if part.numel():
                return quantize(part, bits=self._bits, axis=0, block=self._scheme.block)
        if [*cuts] == [0]:
            return Gathered(source, cuts[0])
        return Dense(selection.gather(name, source.tensor))

    def _adapter_section(self, name: str, part: Tensor) -> QuantizedTensor | Dense:
        bits = self._scheme.adapter_bits
        if bits is None or part.dim() < 2 or not part.numel() or not part.is_floating_point():
            return Dense(part.to(self._global.dtypes[name]))
        return quantize(part, bits=bits, axis=long_rows(part), block=self._scheme.block)

    def _is_quantized(self, name: str) -> bool:
        tensor = self._global.tensors[name]
        wide = tensor.dim() >= 2 and tensor.numel() >= SMALL and tensor.is_floating_point()
        return wide and self._scheme.bits is not None

    def _packed_axis(self, name: str) -> int | None:
        """The axis along which a tensor is packed once per round, or None if it cannot be."""
        axes = {part.axis for g in self._groups for part in g.slices if part.tensor == name}
        if not self._is_quantized(name) or len(axes) > 1:
            return None
        return next(iter(axes), 0)


@dataclass(frozen=True)
class _Proxy:
    """What all clients with one mask are released in the open round."""

    selection: Selection
    sections: Sections


def _check_word(setting: str, word: str | None, known: tuple[str | None, ...]) -> None:
    if word not in known:
        raise ConfigurationError(
            f"The setting {setting!r} is unknown",
            expected=" or ".join(map(str, known)),
            found=repr(word),
        )
