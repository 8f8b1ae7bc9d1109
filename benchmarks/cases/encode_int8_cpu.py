"""Quantising 16.8 million fp32 numbers, about a block of a large U-ViT, to an int8 payload on one core.

The baseline is the same arithmetic as one writes it, whole tensor by whole tensor. Ours is eager PyTorch too,
but in pieces that stay in the caches, and writes to a payload that is there already, as collectives have it.
What any implementation must move is n numbers of 4 bytes and the payload.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.baselines import plain_quantize
from benchmarks.case import Case, Cost, Counted, Gate, Setup, Timed
from benchmarks.memory import peak_bytes
from dtrain.kernels.quantize import Format, encode, encode_bytes, payload_bytes

INT8 = Format("int8")
ELEMENTS = 2**24


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class OneThread:
    """A function without arguments; calling this runs it on one thread and keeps what it gave."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function = function

    def __call__(self) -> Tensor:
        with one_thread():
            return self.function()


def differing(work: OneThread, reference: OneThread) -> float:
    """Elements of which the bits differ; infinite if shapes or dtypes do."""
    found, wanted = work(), reference()
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    return float((found.view(torch.uint8) != wanted.view(torch.uint8)).sum())


def tensor_gb_s(n: int) -> Timed:
    """The bytes of n fp32 numbers, not those that are moved, by the second."""
    return Timed("fp32_tensor", "GB/s", "higher", lambda seconds: 4 * n / seconds / 1e9)


def draw(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def encode_case(n: int) -> Case:
    def plain() -> OneThread:
        x = draw(n)
        return OneThread(lambda: plain_quantize.encode(x, INT8))

    def ours() -> OneThread:
        x, out = draw(n), torch.empty(payload_bytes(n, INT8), dtype=torch.uint8)
        return OneThread(lambda: encode(x, INT8, out=out))

    contestants: dict[str, Setup] = {"plain PyTorch": plain, "dtrain": ours}
    return Case(
        name="encode_int8_cpu",
        title=f"{n / 1e6:.1f}M fp32 numbers to int8 in blocks of 128, one CPU thread",
        baseline="plain PyTorch",
        contestants=contestants,
        gates=(Gate("bytes of the payload that differ", 0, differing),),
        metrics=(Timed("encode_ms"), tensor_gb_s(n), Counted("peak_bytes", "bytes", peak_bytes)),
        cost=Cost(
            flops=4 * n, bytes=encode_bytes(n, INT8), reason="abs, max, times 1/scale, round; each byte once"
        ),
    )


CASE = encode_case(ELEMENTS)
