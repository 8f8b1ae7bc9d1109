"""Activation policies with our kernels as operators: they are kept, measured and counted like PyTorch's."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dtrain.activations.measure import measure
from dtrain.activations.policy import ActivationConfig, apply_activation_policy
from tests.dtrain.activation_models import Step, assert_bits
from uvit.layers import Block

B, N, D = 1, 40, 64
X = 4 * B * N * D
PRODUCT, ATTENTION = 2 * B * N * D * D, 4 * B * N * N * D


def block() -> nn.Module:
    torch.manual_seed(0)
    made = Block(D, 2)
    made.attn.attention_backend = "triton"
    return made


def gradients(module: nn.Module, x: Tensor) -> tuple[Step, int]:
    module.zero_grad()
    with FlopCounterMode(display=False) as counter:
        loss = module(x).square().mean()
        loss.backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return Step(loss.detach(), grads), counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "again"),
    [
        # Of twelve products the MLP's last four are not needed again.
        (ActivationConfig("full"), 8 * PRODUCT + ATTENTION),
        (ActivationConfig("selective"), 8 * PRODUCT),
        (ActivationConfig("selective", save=("attention", "linear")), 0),
        (ActivationConfig("budget", budget_gib=1.5 * X / 2**30), 8 * PRODUCT),
    ],
)
def test_what_is_computed_again(config: ActivationConfig, again: int) -> None:
    plain, x = block(), torch.randn(B, N, D, requires_grad=True)
    wanted, flops = gradients(plain, x)
    changed: Any = copy.deepcopy(plain)
    apply_activation_policy([changed], config)
    gradients(changed, x)
    found, more = gradients(changed, x)
    assert_bits(found, wanted)
    assert more - flops == again


def test_our_attention_is_measured() -> None:
    found = {
        op.call: (op.bytes, op.flops) for op in measure(block().forward, (torch.randn(B, N, D),), {}).ops
    }
    assert found["dtrain::qkv_attention_forward", 0] == (X + 4 * B * N * 2, ATTENTION)
