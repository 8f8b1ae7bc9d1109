"""Conditions: dropping them in training, amplifying them in sampling (classifier-free guidance).

Training replaces a sample's condition by a null one (class models: the extra label `num_classes - 1`; text
models: the encoding of "") with probability p, so that one network learns the conditional prediction c and
the unconditional prediction u. Sampling then extrapolates

    out = c + s (c - u)

In this convention, that of U-ViT, s = 0 is no guidance; the other common one writes w = 1 + s.
Source: https://arxiv.org/abs/2207.12598

Shapes: B batch; a condition is (B, ...), its null is (...) or anything that broadcasts to it.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from dtrain.rng import SampleRNG


class Predict(Protocol):
    """The network: noisy input (B, C, [T,] H, W), timesteps (B,) fp32 and conditions -> the input's shape."""

    def __call__(self, x: Tensor, timesteps: Tensor, /, **cond: Tensor) -> Tensor: ...


def drop_mask(rng: SampleRNG, probability: float) -> Tensor:
    """Which samples lose their condition, (B,) bool; draws "drop"."""
    return rng.uniform("drop") < probability


def drop_condition(cond: Tensor, null: Tensor, mask: Tensor) -> Tensor:
    """Replace the conditions that `mask` (B,) selects by the null one.

    Args:
        cond: labels (B,), contexts (B, L, D) or the like.
        null: the null condition, without the batch dimension.
    """
    mask = mask.view(-1, *[1] * (cond.ndim - 1))
    return torch.where(mask, null.to(cond), cond)


def guided(predict: Predict, scale: float, null: Mapping[str, Tensor]) -> Predict:
    """Wrap a network so that it predicts c + scale (c - u), in one call on a batch of 2B.

    Args:
        predict: called with the conditions of both halves, the null ones second.
        scale: s; at 0 `predict` itself is returned and nothing is computed twice.
        null: by name, what stands in for a condition in the second half; conditions that are not named here
            are the same in both.

    Raises:
        ValueError: a scale > 0 without any null condition, or a null for a condition that the call lacks.
    """
    if scale == 0:
        return predict
    if not null:
        raise ValueError(
            f"guidance = {scale}: the model has no null condition to be guided away from; "
            "set guidance = 0 or train with condition dropout"
        )

    def both(x: Tensor, timesteps: Tensor, /, **cond: Tensor) -> Tensor:
        if missing := null.keys() - cond.keys():
            raise ValueError(f"guidance = {scale}: the condition {sorted(missing)} has a null but no value")
        pairs = {name: _with_null(value, null.get(name)) for name, value in cond.items()}
        out = predict(torch.cat([x, x]), torch.cat([timesteps, timesteps]), **pairs)
        c, u = out.chunk(2)
        return c + scale * (c - u)

    return both


def _with_null(cond: Tensor, null: Tensor | None) -> Tensor:
    other = cond if null is None else null.to(cond).expand_as(cond)
    return torch.cat([cond, other])
