"""Block quantization along units: NormalFloat levels, bit packing, per-unit scales.

    packed = quantize(weight, bits=4, axis=0, block=64)   # nothing of one unit touches another
    proxy = packed.select(units)                          # a gather, the same bits as quantizing
    proxy.dequantize()                                    # float32, logical shape

Levels follow QLoRA (arXiv 2305.14314) and FedLPP (arXiv 2406.10976); quantizing what is released is
half of FedQSN (arXiv 2508.18911). Quantization alone hides little: every released unit is known to
about 9 % at 4 bits. See `docs/quantization.md`.
"""

from fedveil.quantization.blockwise import add_part, kernels_in_use
from fedveil.quantization.codebook import BITS, NormalFloat
from fedveil.quantization.layout import MAX_BLOCK, part_layout
from fedveil.quantization.packing import spare_bits
from fedveil.quantization.tensor import QuantizedTensor, quantize

__all__ = [
    "BITS",
    "MAX_BLOCK",
    "NormalFloat",
    "QuantizedTensor",
    "add_part",
    "kernels_in_use",
    "part_layout",
    "quantize",
    "spare_bits",
]
