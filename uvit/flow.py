"""Rectified flow: straight lines from data to noise, and a network that learns their velocity.

    x_t = (1 - t) x0 + t ε        v = dx_t/dt = ε - x0        loss = mean (predict(x_t, 1000 t) - v)^2

t is logit-normal: middle times, where the prediction is hard, come most often. It is then shifted towards
noise, t <- a t / (1 + (a - 1) t), because neighbouring tokens repeat each other: the same t destroys less of
a long sample than of a short one. Averaging N equally noisy tokens shrinks the noise by sqrt(N), hence

    a = sqrt(N / base_tokens)

Source: Stable Diffusion 3, https://arxiv.org/abs/2403.03206, sections 3.1 and 5.3.2.

A velocity is mostly noise, and all of it has to pass through the network: that takes a width well above the
numbers of a patch, which latents allow and pixels do not. There the network may predict the clean data, which
lie on a low-dimensional manifold, with the loss still on the velocity that follows from them:

    v = (x_t - predict(x_t, 1000 t)) / t        loss = mean (min(1, t / 0.05) (v - (ε - x0)))^2

Source: Li & He, https://arxiv.org/abs/2511.13720 (x-prediction with v-loss).

Shapes: B batch; x0, noise and x_t (B, C, [T,] H, W).
"""

import math
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from dtrain.rng import SampleRNG
from uvit.guidance import Predict
from uvit.sample import Progress, SampleConfig, integrate

TIME_SCALE = 1000.0
"""The network sees 1000 t, so that its sinusoids resolve the unit interval."""

LEAST_TIME = 0.05
"""Below it the loss of a clean prediction, which is divided by the time, is held back."""

Time = TypeVar("Time", float, Tensor)


@dataclass(frozen=True)
class FlowConfig:
    """The distribution of training times, and the shift that sampling shares with it."""

    predict: Literal["velocity", "clean"] = field(
        default="velocity",
        metadata={
            "help": "what the network outputs; clean: the data, better for pixels, where a patch holds more "
            "numbers than a latent's"
        },
    )
    mean: float = field(default=0.0, metadata={"help": "mean of logit(t) before the shift; > 0 is noisier"})
    std: float = field(default=1.0, metadata={"help": "standard deviation of logit(t) before the shift"})
    shift: float | Literal["auto"] = field(
        default="auto",
        metadata={"help": "a in t <- a t / (1 + (a - 1) t); auto: sqrt(tokens / base_tokens); 1 is no shift"},
    )
    base_tokens: int = field(
        default=1024,
        metadata={
            "help": "tokens per sample at which the auto shift is 1 (1024: a 512x512 image, 8x8 VAE, patch 2)"
        },
    )

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"mean = {self.mean}: give a finite number")
        if not 0 < self.std < math.inf:
            raise ValueError(f"std = {self.std}: give a finite number > 0")
        if self.shift != "auto" and not 0 < self.shift < math.inf:
            raise ValueError(f'shift = {self.shift}: give a finite number > 0, or "auto"')
        if self.base_tokens < 1:
            raise ValueError(f"base_tokens = {self.base_tokens}: give at least 1")

    def shift_for(self, tokens: int) -> float:
        """The shift a for samples of `tokens` tokens."""
        if tokens < 1:
            raise ValueError(f"tokens = {tokens}: a sample has at least 1 token")
        return math.sqrt(tokens / self.base_tokens) if self.shift == "auto" else self.shift


def shift_time(t: Time, a: float) -> Time:
    """t <- a t / (1 + (a - 1) t): multiplies the noise-to-signal ratio t / (1 - t) by a; keeps 0 and 1."""
    return a * t / (1 + (a - 1) * t)


@dataclass(frozen=True)
class RectifiedFlow:
    """The rectified-flow objective; see `uvit.sample.Objective`."""

    config: FlowConfig = FlowConfig()

    def times(self, rng: SampleRNG, tokens: int) -> Tensor:
        """Training times in [0, 1], (B,) fp32; draws "time"."""
        # In fp64, so that vectorised and scalar code round to the same fp32 time on any device and batch.
        normal = torch.special.ndtri(rng.uniform("time").double())
        t = torch.sigmoid(self.config.mean + self.config.std * normal)
        return shift_time(t, self.config.shift_for(tokens)).float()

    def loss(self, predict: Predict, x0: Tensor, rng: SampleRNG, *, tokens: int, **cond: Tensor) -> Tensor:
        """Mean squared velocity error, scalar fp32; draws "time" and "noise"."""
        x0 = x0.float()
        noise = rng.normal("noise", x0.shape[1:])
        times = self.times(rng, tokens)
        t = times.view(-1, *[1] * (x0.ndim - 1))
        x_t = (1 - t) * x0 + t * noise
        out = predict(x_t, TIME_SCALE * times, **cond).float()
        if self.config.predict == "velocity":
            return (out - (noise - x0)).square().mean()
        # x_t - x0 = t (ε - x0): the velocity's error is that of the clean prediction over t.
        return ((out - x0) / t.clamp_min(LEAST_TIME)).square().mean()

    def sample(
        self,
        predict: Predict,
        noise: Tensor,
        config: SampleConfig,
        *,
        tokens: int,
        progress: Progress | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """Integrate from noise at t = 1 to samples at t = 0, on times shifted as in training."""
        method = config.solver_for("a rectified flow", ("euler", "heun"))
        a = self.config.shift_for(tokens)
        times = [shift_time(1 - step / config.steps, a) for step in range(config.steps + 1)]

        def velocity(x: Tensor, t: float) -> Tensor:
            timesteps = torch.full((len(x),), TIME_SCALE * t, dtype=torch.float32, device=x.device)
            out = predict(x, timesteps, **cond).to(x)
            return out if self.config.predict == "velocity" else (x - out) / t

        return integrate(velocity, noise, times, method, progress)
