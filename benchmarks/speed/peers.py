"""The same matrices by other libraries' 4-bit code, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fedveil.quantization import NormalFloat, kernels_in_use, quantize
from speed.children import ChildError, main, require, rows_of_child
from speed.kernels import COPY
from speed.plan import Plan, Tell
from speed.rows import FEDVEIL, Row, measured, plain, skipped
from speed.shapes import random_like
from speed.timing import alternate

__all__ = ["PEERS", "peer_rows"]

NAME: Final = "peers/layers"
PACKAGES: Final = ("bitsandbytes", "torchao")
WHAT: Final = ("quantize", "dequantize", "bytes")
BLOCK: Final = 64


@dataclass(frozen=True)
class Peer:
    """One way of making 4-bit codes of a weight.

    Attributes:
        quantize: float32 [out, in] to whatever it makes.
        dequantize: back to float32, or None if it cannot.
        nbytes: bytes of what it made.
    """

    quantize: Callable[[Tensor], Any]
    dequantize: Callable[[Any, Tensor], object] | None
    nbytes: Callable[[Any], int]


def own() -> Peer:
    """fedveil itself, on the same matrices."""
    kernels_in_use()
    return Peer(quantize, lambda packed, out: packed.dequantize(out), lambda packed: packed.nbytes)


def bitsandbytes() -> Peer:
    """NF4 with plain scales, on the CPU; it cannot decode into a given tensor."""
    from bitsandbytes import functional

    def encode(weight: Tensor) -> Any:
        return functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")

    return Peer(
        encode,
        lambda made, out: functional.dequantize_4bit(*made),
        lambda made: _nbytes(made[0], made[1].absmax),
    )


def torchao_nf4() -> Peer:
    """torchao's NF4Tensor: blocks of 64, scales quantized in blocks of 256."""
    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor
    except ImportError:  # before 0.18
        from torchao.dtypes.nf4tensor import NF4Tensor
    return Peer(
        lambda weight: NF4Tensor.from_tensor(weight, BLOCK, 256),
        lambda made, out: made.get_original_weight(),
        lambda made: _nbytes(made.quantized_data, made.quantized_scalers, made.quantization_factor),
    )


def torchao_int4() -> Peer:
    """torchao's int4 weights for the CPU: integers with a scale and a zero, never decoded."""
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    return Peer(
        lambda weight: Int4OpaqueTensor.from_hp(weight, [1, BLOCK]),
        None,
        lambda made: _nbytes(made.qdata, made.scale_and_zero),
    )


def bucketize() -> Peer:
    """What one writes oneself in PyTorch: the same levels by `torch.bucketize`, codes in pairs."""
    codebook = NormalFloat(4)
    levels, thresholds = codebook.levels, codebook.thresholds

    def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
        blocks = weight.view(-1, BLOCK)
        scales = blocks.abs().amax(1, keepdim=True)
        codes = torch.bucketize(blocks / scales, thresholds, out_int32=True).to(torch.uint8)
        codes = codes.view(-1, 2)
        return codes[:, 0] | (codes[:, 1] << 4), scales

    def decode(made: tuple[Tensor, Tensor], out: Tensor) -> None:
        codes, scales = made
        pairs = torch.stack((codes & 15, codes >> 4), dim=1).view(-1, BLOCK)
        torch.mul(levels[pairs.int()], scales, out=out.view(-1, BLOCK))

    return Peer(encode, decode, lambda made: _nbytes(*made))


PEERS: Final[dict[str, Callable[[], Peer]]] = {
    FEDVEIL: own,
    "bitsandbytes NF4": bitsandbytes,
    "torchao NF4": torchao_nf4,
    "torchao int4": torchao_int4,
    "torch.bucketize": bucketize,
}


def peer_rows(plan: Plan, tell: Tell) -> Iterator[Row]:
    """The matrices of three GPT-2 layers in float32, [out, in], quantized, decoded and weighed."""
    for who in PEERS:
        tell(f"{who} on the matrices of three GPT-2 layers")
        yield from rows_of_peer(who, plan)


def rows_of_peer(who: str, plan: Plan) -> list[Row]:
    """A peer's rows; if it is not installed or fails, rows that say so."""
    try:
        require(*(name for name in PACKAGES if who.startswith(name)))
        return rows_of_child("speed.peers", [who], plan)
    except ChildError as error:
        return [skipped(NAME, _case(what), str(error), who=who) for what in WHAT]


def measure(arguments: Sequence[str], plan: Plan) -> Iterator[Row]:
    """In the child: one peer's rows."""
    (who,) = arguments
    peer, width = PEERS[who](), 128 if plan.quick else 768
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    shapes = layer * 3  # more than caches hold
    weights = [random_like(shape, torch.float32, seed) for seed, shape in enumerate(shapes)]
    targets = [torch.zeros_like(weight) for weight in weights]
    made = [peer.quantize(weight) for weight in weights]
    repeats = plan.repeats(15 if who == FEDVEIL else 5)

    def copy() -> None:
        for weight, target in zip(weights, targets, strict=True):
            target.copy_(weight)

    def encode() -> None:
        for weight in weights:
            peer.quantize(weight)

    yield measured(NAME, _case("quantize"), alternate(encode, copy, repeats), COPY, who=who)
    if (back := peer.dequantize) is None:
        yield skipped(NAME, _case("dequantize"), "it has no way back", who=who)
    else:
        kept: list[object] = [None] * len(made)

        def decode() -> None:
            # What makes a new tensor may not write to the same one, still in the cache, each time.
            for number, (one, target) in enumerate(zip(made, targets, strict=True)):
                kept[number] = back(one, target)

        yield measured(NAME, _case("dequantize"), alternate(decode, copy, repeats), COPY, who=who)
    share = 100 * sum(map(peer.nbytes, made)) / sum(4 * weight.numel() for weight in weights)
    yield plain(NAME, _case("bytes"), share, "%", who=who, floor="the same in fp32")


def _case(what: str) -> dict[str, str | int]:
    return {"model": "three layers of GPT-2 small", "bits": 4, "what": what}


def _nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    main(measure)
