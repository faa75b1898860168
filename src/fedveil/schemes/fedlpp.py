"""FedLPP (Zhu et al., 2406.10976): clients hold the backbone and train a quantized adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from fedveil.aggregation import Aggregation, aggregation_of
from fedveil.errors import ConfigurationError
from fedveil.quantization import QuantizedTensor, quantize
from fedveil.schemes.adapters import A_MATRICES, check_train_only, long_rows
from fedveil.schemes.base import Scheme
from fedveil.schemes.client import ProxyClient, no_groups
from fedveil.schemes.facts import Facts, bits_of
from fedveil.schemes.fedavg import FedAvgServer
from fedveil.schemes.registry import register_scheme
from fedveil.secret import Secret
from fedveil.state import StateDict
from fedveil.updates import UpdateCodec, check_bits, check_error_feedback
from fedveil.wire import Dense, Sections

__all__ = ["FedLPP"]

Rule = Literal[1, 2, 3, 4]


@register_scheme
@dataclass(frozen=True)
class FedLPP(Scheme):
    """Only the adapter travels: to clients quantized, back as exact updates.

    The adapter is whatever of the model requires gradients, as after ``peft.get_peft_model(model,
    peft.LoraConfig(...))``. Clients hold the rest, the backbone, exactly as the owner does. Without
    quantization this is FedAvg on the adapter.

    With the server's adapter theta, what was released of it q, and the mean update u of the clients
    (weighted by examples; the paper's code takes the plain mean):

    - rule 1: ``theta += rate * u``, the default: what quantizing takes away is kept;
    - rule 2: ``theta = q + rate * u``;
    - rule 3: ``theta += rate * (q + u - theta)``;
    - rule 4: rule 3 with ``rate * (rounds - round) / rounds``.

    Attributes:
        bits: Bits per parameter of the released adapter (2, 3, 4 or 8); None sends it exactly.
        block: Values per quantization block.
        rule: How updates change the server's adapter; which one the paper takes is not known.
        rate: Of the server.
        rounds: In all; only for rule 4.
        train_only: "B" trains the B matrices of LoRA alone, so that the mean of adapters is the
            mean of their products (FFA-LoRA, 2403.12313). A is released all the same.
        update_bits: Quantize updates on the way up; None sends float32.
        error_feedback: Clients keep what that loses and add it to their next update.
        aggregation: How updates become one: "mean", or another that works on the adapter's layers.

    Does NOT protect: the backbone, which everybody holds; the adapter beyond its last bits. A
    client that averages what it was sent over rounds gets closer to it than by any one release.
    """

    name: ClassVar[str] = "fedlpp"
    client_fields: ClassVar[frozenset[str]] = frozenset(
        {"aggregation", "update_bits", "error_feedback", "block", "train_only"}
    )
    clients_hold_rest: ClassVar[bool] = True

    bits: int | None = 3
    block: int = 256
    rule: Rule = 1
    rate: float = 1.0
    rounds: int | None = None
    train_only: Literal["B"] | None = None
    update_bits: int | None = None
    error_feedback: bool = False
    aggregation: Aggregation | str = "mean"

    def __post_init__(self) -> None:
        check_bits(self.bits, "bits")
        _ = self.codec  # checks update_bits and block
        check_error_feedback(self.error_feedback, self.update_bits)
        object.__setattr__(self, "aggregation", aggregation_of(self.aggregation))
        for name, value, known in (
            ("rule", self.rule, get_args(Rule)),
            ("train_only", self.train_only, ("B", None)),
        ):
            if value not in known:
                raise ConfigurationError(
                    f"The setting {name!r} is unknown",
                    expected=" or ".join(map(repr, known)),
                    found=repr(value),
                )
        if not isinstance(self.rate, int | float) or not 0 < self.rate <= 10:
            raise ConfigurationError(
                "The setting 'rate' is impossible",
                expected="a number above 0 and up to 10",
                found=repr(self.rate),
            )
        if (self.rule == 4) != (self.rounds is not None):
            raise ConfigurationError(
                "Rule 4 needs to know how many rounds there will be, and no other rule does",
                expected="rounds with rule=4, and only with it",
                found=f"rule={self.rule}, rounds={self.rounds}",
            )

    @property
    def codec(self) -> UpdateCodec:
        """How updates travel."""
        return UpdateCodec(self.update_bits, self.block)

    def tensors(self, model: nn.Module) -> StateDict:
        """The adapter: what of the model requires gradients.

        Raises:
            ConfigurationError: That is nothing, or all of it.
        """
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        state = super().tensors(model)
        adapter = {name: tensor for name, tensor in state.items() if name in trained}
        if not adapter or len(adapter) == len(list(model.parameters())):
            raise ConfigurationError(
                "The model has no adapter",
                expected="an adapter to be trained on a backbone that is frozen",
                found="nothing to be trained" if not adapter else "nothing that is frozen",
                fix="peft.get_peft_model(model, peft.LoraConfig(...)) adds one.",
            )
        check_train_only(self.train_only, adapter)
        return adapter

    def facts(self) -> Facts:
        """See :meth:`Scheme.facts`: no masks; what is trained travels in few bits."""
        bits = bits_of(self.bits)
        return Facts(server_mask=0.0, client_mask=0.0, bits=bits, adapter_bits=bits)

    def server(self, model: nn.Module, secret: Secret) -> FedLPPServer:
        """See :meth:`Scheme.server`; the secret is not used."""
        return FedLPPServer(self, model)

    def client(self) -> ProxyClient:
        """See :meth:`Scheme.client`."""
        return ProxyClient(
            self.name,
            no_groups,
            self.codec,
            aggregation_of(self.aggregation),
            shrink=False,
            error_feedback=self.error_feedback,
            tensors=self.tensors,
            still=A_MATRICES if self.train_only == "B" else None,
        )


class FedLPPServer(FedAvgServer):
    """The server side; see :class:`~fedveil.schemes.base.ServerSide`."""

    _scheme: FedLPP

    def begin_round(self, number: int) -> None:
        """Quantize the adapter once for all clients."""
        super().begin_round(number)
        if self._scheme.bits is not None:
            self._sections = Sections(
                {name: self._released(tensor) for name, tensor in self._global.tensors.items()}
            )

    def step(self, name: str) -> Tensor | None:
        """What the rule adds to one tensor; None if nothing."""
        scheme, update = self._scheme, super().step(name)
        if scheme.rule == 1:
            return update if update is None or scheme.rate == 1.0 else scheme.rate * update
        theta = self._global.tensors[name]
        moved = self._sent(name).to(theta.dtype) - theta
        if scheme.rule == 2:
            return moved if update is None else moved + scheme.rate * update
        rate = scheme.rate
        if scheme.rounds is not None:  # rule 4
            rate *= max(0, scheme.rounds - self._ledger.round) / scheme.rounds
        return rate * (moved if update is None else moved + update)

    def _sent(self, name: str) -> Tensor:
        """What clients made of one tensor's release."""
        section = self._sections[name]
        assert isinstance(section, QuantizedTensor | Dense)
        return section.dequantize() if isinstance(section, QuantizedTensor) else section.tensor

    def _released(self, tensor: Tensor) -> QuantizedTensor | Dense:
        assert self._scheme.bits is not None
        if tensor.dim() < 2 or not tensor.is_floating_point():
            return Dense(tensor.clone())
        axis = long_rows(tensor)
        return quantize(tensor, bits=self._scheme.bits, axis=axis, block=self._scheme.block)
