"""Small models whose blocks' inputs are large enough to be put away, and what a test counts of them."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtrain.activations.policy import ActivationConfig, apply_activation_policy
from dtrain.blocks import find_blocks
from tests.dtrain.tiny_dit import TinyDiT
from uvit.layers import Block, run_u

Made = tuple[nn.Module, dict[str, Tensor]]
B, N, D = 16, 128, 32  # 2^16 elements
HEADS = 2


class DropBlock(nn.Module):
    """Random in two places, of attention weights and behind them; takes a scale by name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.drop = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Dropout(0.2)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
        return x + self.drop(self.proj(mixed.transpose(1, 2).flatten(2))) * scale


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DropBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=x.mean(1, keepdim=True))
        return x


class Twice(nn.Module):
    """Calls each of its blocks two times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(D, HEADS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return x


class U(nn.Module):
    """The body of a U-ViT alone: 2 in blocks, a mid block, 2 out blocks."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.in_blocks = nn.ModuleList(Block(D, HEADS) for _ in range(depth // 2))
        self.mid_block = Block(D, HEADS)
        self.out_blocks = nn.ModuleList(Block(D, HEADS, skip=True) for _ in range(depth // 2))

    def forward(self, x: Tensor) -> Tensor:
        return run_u(x, self.in_blocks, self.mid_block, self.out_blocks)


def uvit() -> Made:
    import uvit

    model = uvit.build(
        "video_s2", input_size=(2, 16, 16), in_channels=3, width=D, depth=4, heads=2, condition="none"
    )
    return model, {"x": torch.randn(B, 3, 2, 16, 16), "timesteps": torch.rand(B) * 1000}


def tiny_dit() -> Made:
    model = TinyDiT(features=6, width=D, depth=3, heads=HEADS, dropout=0.1)
    return model, {"x": torch.randn(B, N, 6), "t": torch.rand(B)}


def frozen_dit() -> Made:
    model, inputs = tiny_dit()
    for part in (model.embed, model.time, model.blocks[0], model.blocks[1].mlp):
        part.requires_grad_(False)
    return model, inputs


def body(make: Callable[[], nn.Module]) -> Callable[[], Made]:
    return lambda: (make(), {"x": torch.randn(B, N, D)})


MODELS: dict[str, Callable[[], Made]] = {
    "uvit": uvit,
    "tiny_dit": tiny_dit,
    "frozen_dit": frozen_dit,
    "dropped": body(Dropped),
    "twice": body(Twice),
    "u": body(U),
}


def filled(name: str) -> Made:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model, inputs


def with_policy(model: nn.Module, config: ActivationConfig) -> nn.Module:
    model = copy.deepcopy(model)
    apply_activation_policy(find_blocks(model), config)
    return model


class Step(NamedTuple):
    loss: Tensor
    grads: dict[str, Tensor]


def step(model: nn.Module, inputs: dict[str, Tensor], micro_batches: int = 1, autocast: bool = False) -> Step:
    """Gradients of so many passes, the same random numbers in each step."""
    model.zero_grad()
    torch.manual_seed(1)
    total = torch.zeros(())
    for _ in range(micro_batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).float().square().mean()
        loss.backward()
        total += loss.detach()
    return Step(total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def assert_bits(found: Step, wanted: Step) -> None:
    assert torch.equal(found.loss, wanted.loss)
    assert found.grads.keys() == wanted.grads.keys()
    for name, grad in wanted.grads.items():
        assert torch.equal(found.grads[name], grad), name


class _Births(TorchDispatchMode):
    """Storages that operators make, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if _is(x)}
        for x in tree_leaves(out):
            if _is(x) and (ref := StorageWeakRef(x.untyped_storage())) not in old:
                self.bytes[ref] = x.untyped_storage().nbytes()
        return out


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)


def live_bytes(call: Callable[[], object]) -> int:
    """Bytes that a call has made and that are still there after it, as long as its result is."""
    with _Births() as births:
        result = call()
    kept = sum(nbytes for ref, nbytes in births.bytes.items() if not ref.expired())
    del result
    return kept
