"""How many bytes a message takes: counted, not timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from torch import nn

from fedveil.quantization import QuantizedTensor, part_layout
from fedveil.schemes import FedQSN
from fedveil.state import read_state
from fedveil.wire import Dense, Message
from speed import budgets
from speed.kernels import GPT2, LLAMA
from speed.plan import Plan, Tell
from speed.rows import Row, plain
from speed.server import SECRET
from speed.shapes import COLUMNS, ROWS, Matrices, gpt2, llama, matrices

__all__ = ["packed_bytes", "size_rows"]

FP32 = "the same model in fp32"


def size_rows(plan: Plan, tell: Tell) -> Iterator[Row]:
    """Messages of a whole model, unmasked and masked; bits per parameter of its matrices."""
    tell("GPT-2 small")
    model = gpt2(plan)
    full = 4 * sum(tensor.numel() for tensor in read_state(model).values())
    for bits in (2, 3, 4, 8):
        tell(f"GPT-2 small unmasked, {bits} bits")
        message = _message(model, FedQSN(server_mask=0.0, client_mask=0.0, bits=bits))
        limit = budgets.BYTES if bits == 4 else None
        case: dict[str, str | int] = {"model": GPT2, "bits": bits}
        yield plain("bytes/unmasked", case, 100 * message.nbytes / full, "%", budget=limit,
                    floor=FP32)  # fmt: skip
    for title, scheme in (("FedQSN()", FedQSN()), ("FedQSN.paper()", FedQSN.paper(draw="exact"))):
        tell(f"GPT-2 small masked, {title}")
        message = _message(model, scheme)
        share = 4 * _released(message) / full
        yield plain(
            "bytes/masked", {"model": GPT2, "bits": 4, "scheme": title},
            100 * message.nbytes / full, "%", budget=share * budgets.BYTES, floor=FP32,
            reason=f"{100 * share:.1f} % of the parameters are released",
        )  # fmt: skip
    for title, shape in ((GPT2, model), (LLAMA, llama(plan))):
        for storage in (ROWS, COLUMNS):
            for bits in (2, 3, 4, 8):
                groups = matrices(shape, storage)
                values = sum(group.values for group in groups)
                case = {"model": title, "storage": storage, "bits": bits}
                each = 8 * packed_bytes(groups, bits) / values
                yield plain("bytes/per_parameter", case, each, "bits")


def packed_bytes(groups: Sequence[Matrices], bits: int) -> int:
    """Bytes of all these matrices' codes and scales."""
    total = 0
    for group in groups:
        layout = part_layout(group.shape, bits=bits, axis=group.axis, block=64, double=True)
        sizes = [prod(extents) * dtype.itemsize for dtype, extents in layout.values()]
        total += group.count * sum(sizes)
    return total


def _message(model: nn.Module, scheme: FedQSN) -> Message:
    server = scheme.server(model, SECRET)
    server.begin_round(1)
    return Message.from_bytes(server.release("client").to_bytes())


def _released(message: Message) -> int:
    """Parameters in a proxy."""
    count = 0
    for section in message.sections.values():
        if isinstance(section, QuantizedTensor):
            count += section.units * section.fan_in
        elif isinstance(section, Dense):
            count += section.tensor.numel()
    return count
