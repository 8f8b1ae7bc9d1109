"""Noise prediction on the two variance-preserving schedules of the official U-ViT models.

    x = sqrt(ᾱ) x0 + sqrt(1 - ᾱ) ε        loss = mean (predict(x, timestep) - ε)^2

vp_sde (CIFAR10, CelebA 64, ImageNet 64), continuous t in [1e-5, 1]; the network sees 999 t:
    ᾱ(t) = exp(-0.1 t - (20 - 0.1) t^2 / 2)
stable_diffusion (ImageNet 256 and 512, MS-COCO), n in 1 … 1000; the network sees n itself, from 1:
    ᾱ_n = Π_{i <= n} (1 - β_i)        β = linspace(sqrt(0.00085), sqrt(0.012), 1000)^2

Sources: https://arxiv.org/abs/2011.13456 (VP-SDE), https://github.com/baofff/U-ViT (what the network sees).

Shapes: B batch; x0, noise and x (B, C, [T,] H, W).
"""

import functools
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtrain.rng import SampleRNG
from uvit.guidance import Predict
from uvit.sample import Progress, SampleConfig, denoise

LEVELS = 1000
"""Noise levels of the discrete schedule, and of the grid on which the continuous one is sampled."""

_BETA_MIN, _BETA_MAX = 0.1, 20.0
_T_MIN = 1e-5
_T_SCALE = 999.0


@dataclass(frozen=True)
class DiffusionConfig:
    """Which noise schedule the network learns."""

    schedule: Literal["vp_sde", "stable_diffusion"] = field(
        default="stable_diffusion",
        metadata={
            "help": "vp_sde: continuous, the official pixel models; stable_diffusion: 1000 levels, latents"
        },
    )


@functools.cache
def stable_diffusion_alpha_bars() -> NDArray[np.float64]:
    """ᾱ_1 … ᾱ_1000 of Stable Diffusion, (1000,)."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, LEVELS) ** 2
    return np.cumprod(1 - betas)


def vp_alpha_bar(t: Tensor) -> Tensor:
    """ᾱ(t) of the VP-SDE for times in [0, 1]."""
    return torch.exp(-_BETA_MIN * t - (_BETA_MAX - _BETA_MIN) * t.square() / 2)


@dataclass(frozen=True)
class NoisePrediction:
    """The noise-prediction objective; see `uvit.sample.Objective`. `tokens` does not change the schedule."""

    config: DiffusionConfig = DiffusionConfig()

    def level(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map uniform draws u in [0, 1), (B,), to (ᾱ fp64, what the network sees fp32), each (B,)."""
        u = u.double()
        if self.config.schedule == "vp_sde":
            t = _T_MIN + (1 - _T_MIN) * u
            return vp_alpha_bar(t), (_T_SCALE * t).float()
        row = (LEVELS * u).long()
        alpha_bars = torch.as_tensor(stable_diffusion_alpha_bars(), device=u.device)
        return alpha_bars[row], (row + 1).float()

    def loss(self, predict: Predict, x0: Tensor, rng: SampleRNG, *, tokens: int, **cond: Tensor) -> Tensor:
        """Mean squared error of the predicted noise, scalar fp32; draws "time" and "noise"."""
        x0 = x0.float()
        noise = rng.normal("noise", x0.shape[1:])
        alpha_bar, timesteps = self.level(rng.uniform("time"))
        alpha_bar = alpha_bar.view(-1, *[1] * (x0.ndim - 1))
        x = alpha_bar.sqrt().float() * x0 + (1 - alpha_bar).sqrt().float() * noise
        return (predict(x, timesteps, **cond).float() - noise).square().mean()

    def alpha_bars(self) -> NDArray[np.float64]:
        """ᾱ on the sampling grid, (1000,): row k is n = k + 1, or t = (k + 1) / 1000."""
        if self.config.schedule == "stable_diffusion":
            return stable_diffusion_alpha_bars()
        grid = torch.arange(1, LEVELS + 1, dtype=torch.float64, device="cpu") / LEVELS
        return vp_alpha_bar(grid).numpy()

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
        """Solve the probability-flow equation from noise to samples. Raises ImportError without diffusers."""
        order = {"dpm++": 2, "ddim": 1}[config.solver_for("noise prediction", ("dpm++", "ddim"))]
        alpha_bars = self.alpha_bars()
        betas = 1 - alpha_bars / np.concatenate([[1.0], alpha_bars[:-1]])
        scale = _T_SCALE / LEVELS if self.config.schedule == "vp_sde" else 1.0

        def noise_at(x: Tensor, row: int) -> Tensor:
            timesteps = torch.full((len(x),), scale * (row + 1), dtype=torch.float32, device=x.device)
            return predict(x, timesteps, **cond).to(x)

        return denoise(noise_at, noise, betas, config.steps, order, progress)
