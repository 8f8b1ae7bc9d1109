"""Summing four int8 payloads of 16.8 million numbers to fp32 on one core: the arithmetic of a reduce-scatter.

Baseline and ours differ as in `encode_int8_cpu`; both sum in the order of the ranks, to the same bits.
"""

import torch
from torch import Tensor

from benchmarks.baselines import plain_quantize
from benchmarks.case import Case, Cost, Counted, Gate, Setup, Timed
from benchmarks.cases.encode_int8_cpu import ELEMENTS, INT8, OneThread, differing, draw, tensor_gb_s
from benchmarks.memory import peak_bytes
from dtrain.kernels.quantize import decode_sum, decode_sum_bytes, encode

RANKS = 4


def decode_sum_case(n: int) -> Case:
    def payloads() -> Tensor:
        return torch.stack([encode(draw(n, seed=rank), INT8) for rank in range(RANKS)])

    def plain() -> OneThread:
        received = payloads()
        return OneThread(lambda: plain_quantize.decode_sum(received, n, INT8))

    def ours() -> OneThread:
        received, out = payloads(), torch.empty(n)
        return OneThread(lambda: decode_sum(received, n, INT8, out=out))

    contestants: dict[str, Setup] = {"plain PyTorch": plain, "dtrain": ours}
    return Case(
        name="decode_sum_int8_cpu",
        title=f"sum of {RANKS} int8 payloads of {n / 1e6:.1f}M numbers, one CPU thread",
        baseline="plain PyTorch",
        contestants=contestants,
        gates=(Gate("bytes of the sum that differ", 0, differing),),
        metrics=(Timed("decode_sum_ms"), tensor_gb_s(n), Counted("peak_bytes", "bytes", peak_bytes)),
        cost=Cost(
            flops=2 * RANKS * n,
            bytes=decode_sum_bytes(n, INT8, RANKS),
            reason="a product and a sum for each code; each byte once",
        ),
    )


CASE = decode_sum_case(ELEMENTS)
