"""A training step of U-ViT-S/2 on images of CIFAR-10's size: ours against the same model written plainly.

A step is forward, noise-prediction mean squared error, backward, AdamW and zero_grad; both sides have the
same weights and inputs.

What it must cost, for B images, N patches, L = N + 1 tokens, width D, depth d (d + 1 blocks, d / 2 of them
with a skip), patch vectors of p numbers, and P parameters of 4 bytes:

    forward FLOPs = B · [(d + 1)(24 D² L + 4 D L²) + (d / 2) 4 D² L + 4 D p N + head convolution]
    step FLOPs    = 3 · forward, less the gradient of the pixels, which nobody needs
    step bytes    = 4 P · 7: weights read forward and backward, weights and both moments written, moments read
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import uvit
from benchmarks.baselines.plain_uvit import PlainUViT
from benchmarks.case import Case, Cost, Counted, Gate, Setup, Timed
from benchmarks.memory import peak_bytes, persistent_bytes

SIDE, PATCH, CHANNELS = 32, 2, 3


@dataclass(frozen=True)
class Size:
    """What is trained; the default is CIFAR10 S/2."""

    batch: int = 8
    width: int = 512
    depth: int = 12
    heads: int = 8


class TrainStep:
    """A model with its optimizer and one fixed batch; calling it trains one step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: int) -> None:
        self.model, self.optimizer = model, optimizer
        generator = torch.Generator().manual_seed(1)
        clean, self.noise = torch.randn(2, batch, CHANNELS, SIDE, SIDE, generator=generator)
        self.timesteps = torch.rand(batch, generator=generator) * 1000
        signal = torch.cos(self.timesteps / 1000 * torch.pi / 2)[:, None, None, None]
        self.noisy = signal * clean + (1 - signal**2).sqrt() * self.noise

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.noisy, self.timesteps), self.noise)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(self.loss(), parameters), strict=True))


def _ours(size: Size) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = uvit.build("cifar10_s2", width=size.width, depth=size.depth, heads=size.heads)
    return model


def ours(size: Size) -> TrainStep:
    model = _ours(size)
    return TrainStep(model, torch.optim.AdamW(model.parameters(), fused=True), size.batch)


def plain(size: Size) -> TrainStep:
    model = PlainUViT(SIDE, PATCH, CHANNELS, size.width, size.depth, size.heads)
    model.load_state_dict(_ours(size).state_dict())
    return TrainStep(model, torch.optim.AdamW(model.parameters()), size.batch)


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖"""
    return float((got - want).norm() / want.norm())


def loss_error(step: TrainStep, reference: TrainStep) -> float:
    return relative_error(step.loss().detach(), reference.loss().detach())


def gradient_error(step: TrainStep, reference: TrainStep) -> float:
    """The worst parameter's relative error; infinite if the two have different parameters."""
    got, want = step.gradients(), reference.gradients()
    if got.keys() != want.keys():
        return float("inf")
    # not max(): it would pass a NaN over
    return float(torch.tensor([relative_error(got[name], want[name]) for name in want]).max())


def cost(size: Size) -> Cost:
    width, tokens = size.width, (SIDE // PATCH) ** 2 + 1
    blocks = (size.depth + 1) * (24 * width**2 * tokens + 4 * width * tokens**2)
    skips = size.depth // 2 * 4 * width**2 * tokens
    patch = 2 * width * PATCH**2 * CHANNELS * (tokens - 1)
    convolution = 2 * 9 * CHANNELS**2 * SIDE**2
    flops = size.batch * (3 * (blocks + skips + 2 * patch + convolution) - patch)
    weights = _parameters(size.width, size.depth, tokens)
    return Cost(
        flops, 7 * 4 * weights, "3 × forward FLOPs; weights and both AdamW moments read, used, written once"
    )


def _parameters(width: int, depth: int, tokens: int) -> int:
    with torch.device("meta"):
        return _numel(PlainUViT(SIDE, PATCH, CHANNELS, width, depth, 1).parameters())


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def peak_above_state(step: TrainStep) -> float:
    return peak_bytes(step)


def peak_in_all(step: TrainStep) -> float:
    return persistent_bytes(step.model, step.optimizer) + peak_bytes(step)


def train_step_case(size: Size) -> Case:
    contestants: dict[str, Setup] = {"plain PyTorch": lambda: plain(size), "dtrain": lambda: ours(size)}
    return Case(
        name="train_step_uvit_s2_cpu",
        title=f"U-ViT-S/2 training step, batch {size.batch}, {SIDE}×{SIDE}×{CHANNELS}, fp32, CPU",
        baseline="plain PyTorch",
        contestants=contestants,
        gates=(Gate("loss", 1e-5, loss_error), Gate("all gradients", 1e-5, gradient_error)),
        metrics=(
            Timed("step_ms"),
            Counted("peak_above_state_bytes", "bytes", peak_above_state),
            Counted("peak_live_bytes", "bytes", peak_in_all),
        ),
        cost=cost(size),
    )


CASE = train_step_case(Size())
