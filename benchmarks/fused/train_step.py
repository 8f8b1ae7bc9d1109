"""A whole training step of U-ViT on latents of images: forward, loss, backward, AdamW, averages.

Ours against the same model written plainly, with PyTorch's fused AdamW and averages in a pass of their own.
Arithmetic is in bf16 on fp32 parameters, as FSDP2's mixed precision has it, or by autocast as in the official
recipe. All share one set of parameters, moments and averages: five would not fit beside the activations.

    FLOPs = 3 · forward     bytes = those of AdamW with averages     MFU = FLOPs / time / 989 TFLOP/s
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.attention.contestants import SDPA, fastest_sdpa, sdpa
from benchmarks.attention.problem import Attend, Shape
from benchmarks.baselines import plain_uvit
from benchmarks.baselines.plain_uvit import PlainUViT
from benchmarks.case import Case, Cost, Setup, Timed
from benchmarks.fused.kernels import on_kernels
from benchmarks.fused.settings import Settings
from benchmarks.sweep.compiled import compiled_module
from benchmarks.sweep.contest import EAGER, contest
from benchmarks.sweep.draw import draws
from benchmarks.sweep.errors import worst_error
from benchmarks.sweep.plan import COMPILE, NOT_REHEARSED, OURS, LeftOut, Plan
from dtrain.kernels.adamw import update_bytes
from dtrain.optim import AdamW, Average
from uvit import UViT, forward_flops, token_count
from uvit.layers import Block

__all__ = ["TrainStep", "Training", "train_step_plans"]

_HOW: dict[str, Any] = {"lr": 2e-4, "betas": (0.99, 0.99), "weight_decay": 0.03}
_EMA_WEIGHT = 1e-4
_H100_FLOPS_PER_S = 989e12  # dense bf16, by its data sheet

Kind = Callable[[], nn.Module]


class Training:
    """What all contestants train: one set of parameters and state, and a batch."""

    def __init__(self, settings: Settings, attend: Attend) -> None:
        self.settings, self.attend = settings, attend
        self.config = settings.model
        self.parameters = _initialised(settings)
        self.moments = {
            name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()
        }
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        draw = draws(settings, seed=1)
        _, height, width = self.config.input_size
        self.noisy, self.noise = (
            draw(settings.batch, self.config.in_channels, height, width).float() for _ in range(2)
        )
        steps = torch.arange(settings.batch, device=settings.device)
        self.timesteps = steps * 1000 / settings.batch
        self.labels = steps % self.config.num_classes

    def plain(self) -> nn.Module:
        c = self.config
        return PlainUViT(
            c.input_size[-1],
            c.patch_size[-1],
            c.in_channels,
            c.width,
            c.depth,
            c.heads,
            c.num_classes,
            c.final_conv,
        )

    def ours(self) -> nn.Module:
        return UViT(self.config)

    def model(self, kind: Kind, dtype: torch.dtype) -> nn.Module:
        """On the parameters themselves if `dtype` is theirs, else on copies."""
        with torch.device("meta"):
            model = kind()
        weights = {
            name: p if p.dtype == dtype else p.detach().to(dtype) for name, p in self.parameters.items()
        }
        model.load_state_dict(weights, assign=True)
        return on_kernels(model, self.settings.device)

    def loss(self, model: nn.Module, dtype: torch.dtype, count: int) -> Tensor:
        """Of the first `count` samples."""
        noisy = self.noisy[:count].to(dtype)
        predicted = model(noisy, self.timesteps[:count], self.labels[:count])
        return F.mse_loss(predicted.float(), self.noise[:count])

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """Gradients in fp32, next to which those of bf16 are coarse."""
        model = self.model(self.plain, torch.float32)
        self.loss(model, torch.float32, self.settings.gate_batch).backward()
        return self.take_gradients()

    def forget(self) -> None:
        """The truth, which an update changes."""
        self.__dict__.pop("exact", None)

    def take_gradients(self) -> dict[str, Tensor]:
        taken = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        for p in self.parameters.values():
            p.grad = None
        return taken

    def fused_adamw(self) -> Callable[[], None]:
        """PyTorch's, then the averages."""
        optimizer = torch.optim.AdamW(self.parameters.values(), **_HOW, fused=True)
        self._hand_over(optimizer, self.settings.device)
        averages = list(self.averages.values())
        parameters: list[Tensor] = list(self.parameters.values())

        @torch.no_grad()
        def step() -> None:
            optimizer.step()
            torch._foreach_lerp_(averages, parameters, _EMA_WEIGHT)

        return step

    def our_adamw(self) -> Callable[[], None]:
        """With the averages in its pass."""
        optimizer = AdamW(self.parameters.values(), **_HOW)
        self._hand_over(optimizer, "cpu")
        shards = {p: self.averages[name] for name, p in self.parameters.items()}
        return partial(optimizer.step, ema=Average(shards, _EMA_WEIGHT))

    def _hand_over(self, optimizer: torch.optim.Optimizer, count_on: str) -> None:
        """The moments that all share."""
        for name, p in self.parameters.items():
            first, second = self.moments[name]
            step = torch.zeros((), device=count_on)
            optimizer.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}


def _initialised(settings: Settings) -> dict[str, nn.Parameter]:
    """Matrices at random, norms that change nothing, no biases; in fp32."""
    with torch.device("meta"):
        model = UViT(settings.model)
    draw = draws(replace(settings, dtype=torch.float32))
    parameters = {}
    for name, p in model.named_parameters():
        value = 0.02 * draw(*p.shape)
        if p.dim() == 1:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        parameters[name] = nn.Parameter(value)
    return parameters


class TrainStep:
    """One step of one contestant.

    Args:
        kind: of `training`: its plain model or ours.
        autocast: compute by autocast on the parameters; else on copies in the settings' dtype.
    """

    def __init__(
        self, training: Training, kind: Kind, update: Callable[[], object], autocast: bool = False
    ) -> None:
        self.training, self.update, self.autocast = training, update, autocast
        self.dtype = torch.float32 if autocast else training.settings.dtype
        self.model = training.model(kind, self.dtype)
        for block in _blocks(self.model):
            block.attn.attend = training.attend

    def __call__(self) -> None:
        self._backward(self.training.settings.batch)
        self.update()
        self.training.take_gradients()
        self.training.forget()

    def error(self) -> float:
        """Of the worst parameter's gradient on a few samples; NaN where one of them is."""
        exact = self.training.exact
        self._backward(self.training.settings.gate_batch)
        got = self.training.take_gradients()
        return worst_error((got[name], exact[name]) for name in exact)

    def _backward(self, count: int) -> None:
        """Fill in the gradients of the parameters."""
        settings, named = self.training.settings, dict(self.model.named_parameters())
        masters = list(self.training.parameters.values())
        copies = [named[name] for name in self.training.parameters]
        copied = self.dtype != torch.float32
        if copied:
            torch._foreach_copy_([p.detach() for p in copies], [p.detach() for p in masters])
        with torch.autocast(settings.device, settings.dtype) if self.autocast else nullcontext():
            loss = self.training.loss(self.model, self.dtype, count)
        loss.backward()
        if copied:
            for master, copy in zip(masters, copies, strict=True):
                assert copy.grad is not None
                master.grad, copy.grad = copy.grad.float(), None


def train_step_plans(settings: Settings) -> Iterator[Plan]:
    name = f"train_step_b{settings.batch}"
    cost = _cost(settings)
    yield Plan(name, cost.flops, partial(_make, name, settings, cost))


def _make(name: str, settings: Settings, cost: Cost) -> tuple[Case, list[LeftOut]]:
    c = settings.model
    tokens = token_count(c, *c.input_size)
    best, reasons = fastest_sdpa(settings, Shape(settings.batch, c.heads, tokens, c.width // c.heads))
    training = Training(settings, sdpa(SDPA[best]))
    t = training
    works: dict[str, Setup] = {
        EAGER: lambda: TrainStep(t, t.plain, t.fused_adamw()),
        f"{EAGER}, autocast": lambda: TrainStep(t, t.plain, t.fused_adamw(), autocast=True),
        OURS: lambda: TrainStep(t, t.ours, t.our_adamw()),
    }
    if settings.kind == "cuda":
        works[COMPILE] = lambda: _compiled(TrainStep(t, t.plain, t.fused_adamw()))
        works[f"{OURS}, {COMPILE}"] = lambda: _compiled(TrainStep(t, t.ours, t.our_adamw()))
    else:
        reasons = {**reasons, COMPILE: NOT_REHEARSED}
    title = f"Training step of U-ViT, {c.width} wide and {c.depth + 1} deep, batch {settings.batch}, {best}"
    rates = (
        Timed("throughput_steps", "steps/s", "higher", lambda seconds: 1 / seconds),
        Timed("mfu", "of 989 TFLOP/s", "higher", lambda seconds: cost.flops / seconds / _H100_FLOPS_PER_S),
    )
    return contest(name, title, settings, works, reasons, cost, metrics=rates, cold=False)


def _blocks(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, Block | plain_uvit.Block))


def _compiled(step: TrainStep) -> TrainStep:
    """Block by block, as `dtrain.parallelize` does it."""
    for block in _blocks(step.model):
        compiled_module(block)
    return step


def _cost(settings: Settings) -> Cost:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UViT(settings.model).parameters())
    flops = 3 * forward_flops(settings.model, settings.batch, *settings.model.input_size)
    moved = update_bytes(1, parameters, ema=torch.float32)
    return Cost(flops, moved, "3 forwards; gradients, parameters, moments and averages of AdamW")
