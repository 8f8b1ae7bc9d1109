"""What a model's call of PyTorch's attention becomes: ours where it can serve, else the call that it was.

A mask that hides the padding at the end of a sample's keys, (B, 1, 1, N) booleans as HunyuanVideo makes them,
leaves softmax over the first keys only, so it is served by fewer keys and no mask at all. That takes the
lengths to the host: one synchronisation for each mask tensor, not for each layer.

Shapes: B batch, H heads, M queries, N keys, D width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from dtrain.kernels.attention import Backend, attention
from dtrain.swap.rebind import Attend

Note = Callable[[str], None]
_Lengths = tuple[int, ...] | None

_lengths: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def stand_in(backend: Backend, note: Note) -> Callable[[Attend, int], Attend]:
    """A maker of stand-ins, as `dtrain.swap.rebind.with_attention` takes it.

    Args:
        backend: as `kernels.attention.attention` takes it.
        note: is told why a call goes to the original, once for each call (once for each trace when compiled).
    """

    def make(original: Attend, token_dim: int) -> Attend:
        def attend(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
            **more: Any,
        ) -> Any:
            why = _unserved(query, key, value, token_dim, dropout_p, is_causal, more)
            lengths = None if why or attn_mask is None else key_lengths(attn_mask, key.shape[token_dim])
            if not why and attn_mask is not None and lengths is None:
                why = "a mask that is no key padding, or that cannot be read while compiling"
            if why:
                note(why)
                more.update(scale=scale, enable_gqa=enable_gqa)
                return original(query, key, value, attn_mask, dropout_p, is_causal, **more)
            q, k, v = (x if token_dim == 2 else x.transpose(1, 2) for x in (query, key, value))
            out = _padded(q, k, v, lengths, scale, backend)
            return out if token_dim == 2 else out.transpose(1, 2)

        return attend

    return make


def _unserved(
    q: Tensor, k: Tensor, v: Tensor, token_dim: int, dropout_p: float, is_causal: bool, more: dict[str, Any]
) -> str:
    """Why our attention cannot serve the call, whatever its mask; empty when it can."""
    if dropout_p > 0:
        return "dropout of attention weights"
    if is_causal:
        return "causal attention"
    set_by_hand = [name for name, value in more.items() if value]
    if set_by_hand:
        return f"{', '.join(set_by_hand)}, set on the model"
    if not q.dim() == k.dim() == v.dim() == 4:
        return "tensors that are not 4-dimensional"
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return "keys and values of different sizes"
    if q.shape[3 - token_dim] != k.shape[3 - token_dim]:
        return "queries that share heads of keys"
    cast = torch.is_autocast_enabled(q.device.type)  # then all get one dtype
    return "" if cast or q.dtype == k.dtype == v.dtype else "tensors of several dtypes"


def _padded(
    q: Tensor, k: Tensor, v: Tensor, lengths: _Lengths, scale: float | None, backend: Backend
) -> Tensor:
    """Attention of each sample to the first of its keys, as many as `lengths` says; to all when None."""
    if lengths is None:
        return attention(q, k, v, scale=scale, backend=backend)
    if len(set(lengths)) == 1:
        return attention(q, k[:, :, : lengths[0]], v[:, :, : lengths[0]], scale=scale, backend=backend)
    rows = (
        attention(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n], scale=scale, backend=backend)
        for i, n in enumerate(lengths)
    )
    return torch.cat([row.transpose(1, 2) for row in rows]).transpose(1, 2)  # a token's heads stay together


def key_lengths(mask: Tensor, keys: int) -> _Lengths:
    """How many keys each sample sees when the mask only hides the end of them; None for any other mask.

    Args:
        mask: as PyTorch's attention takes it, True where a key is seen.
        keys: N.

    None too where values cannot be read: while torch.compile traces, and on fake or meta tensors.
    """
    if torch.compiler.is_compiling() or isinstance(mask, FakeTensor) or mask.is_meta:
        return None
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, 1, keys):
        return None
    known: tuple[int, _Lengths] | None = _lengths.get(mask)
    if known is None or known[0] != mask._version:
        known = _lengths[mask] = (mask._version, _read_lengths(mask))
    return known[1]


def _read_lengths(mask: Tensor) -> _Lengths:
    seen = mask[:, 0, 0]  # (B, N)
    counts = seen.sum(1)
    ends = (seen == (torch.arange(seen.shape[1], device=seen.device) < counts[:, None])).all(1)
    lengths = tuple(torch.where(ends, counts, 0).tolist())
    return lengths if all(lengths) else None
