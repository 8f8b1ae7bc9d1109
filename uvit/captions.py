"""Captions as the numbers that a text-conditioned model reads, without downloads.

The built-in encoder is frozen and knows only spelling: byte b at position p becomes

    (E[b] + √2·sin-cos(p)) / √2,    E fixed random, both terms of unit mean square,

(sinusoidal positions: Vaswani et al., arXiv 1706.03762) and positions behind the caption are zero, so that
the empty caption, the unconditional one, is all zeros. That is enough to tell captions apart by their
spelling; a text model that knows meanings is plugged in by name, `encoder = "module:function"`.

Shapes: B batch, L tokens, D width.
"""

import importlib
import logging
import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BYTES = "bytes"
_EMBEDDING_SEED = 20170612


class TextEncoder(Protocol):
    """What `encoder = "module:function"` names: captions -> (B, L, D) floating-point tensor."""

    def __call__(self, captions: list[str]) -> Tensor: ...


def byte_context(captions: Sequence[str], tokens: int, dim: int) -> Tensor:
    """Encode captions byte by byte (UTF-8): (B, tokens, dim) fp32, unit mean square, zeros behind the end.

    A caption of more than `tokens` bytes is cut there, and the log says so.
    """
    table, positions = _tables(tokens, dim)
    context = torch.zeros(len(captions), tokens, dim)
    for row, caption in zip(context, captions, strict=True):
        data = caption.encode("utf-8", errors="replace")
        if len(data) > tokens:
            _say_cut(tokens)
        ids = torch.tensor(list(data[:tokens]), dtype=torch.int64)
        row[: len(ids)] = (table[ids] + positions[: len(ids)]) / math.sqrt(2)
    return context


def text_encoder(name: str, tokens: int, dim: int) -> TextEncoder:
    """Find an encoder by name and guard what it returns.

    Args:
        name: "bytes", or "module:function" for a function of a list of captions.
        tokens, dim: the model's text length and width, which the encoder has to match.

    Raises ValueError if the name cannot be resolved; the encoder does if its tensor has another shape.
    """
    encode = partial(byte_context, tokens=tokens, dim=dim) if name == BYTES else _load(name)

    def checked(captions: list[str]) -> Tensor:
        context = encode(captions)
        got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        if got != (len(captions), tokens, dim):
            raise ValueError(
                f"encoder = {name!r}: gave {got} where the model reads {(len(captions), tokens, dim)}; "
                "change the encoder, or the model's text_tokens and text_dim"
            )
        return context

    return checked


def _load(name: str) -> TextEncoder:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f'encoder = {name!r}: neither "{BYTES}" nor "module:function"')
    try:
        encode = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"encoder = {name!r}: {error}; is it importable from here?") from error
    if not callable(encode):
        raise ValueError(f"encoder = {name!r}: not a function of a list of captions")
    return encode  # type: ignore[no-any-return]


@lru_cache(maxsize=4)
def _tables(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    table = torch.randn(256, dim, generator=torch.Generator().manual_seed(_EMBEDDING_SEED))
    frequency = torch.exp(-math.log(10000) * torch.arange(0, dim, 2) / dim)
    angle = torch.arange(tokens)[:, None] * frequency  # (L, D/2)
    positions = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim]
    return table, math.sqrt(2) * positions


@lru_cache(maxsize=1)  # once a process
def _say_cut(tokens: int) -> None:
    logger.warning("captions of more than %d bytes are cut there (text_tokens of the model)", tokens)
