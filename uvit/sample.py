"""Sampling: from noise to data, for flow models and for noise-prediction models.

Both are the same problem, an ordinary differential equation whose right-hand side is the network. A flow's
dx/dt = v(x, t) is smooth enough for textbook methods, from t = 1 (noise) to t = 0 (data):

    Euler   x_s = x_t + (s - t) v(x_t, t)                                        error O(h)
    Heun    x_s = x_t + (s - t) (v(x_t, t) + v(Euler's x_s, s)) / 2              error O(h^2)

The noise models' equation is stiff; DPM-Solver++ integrates its linear part exactly. It comes from diffusers.
Sources: Heun for diffusion https://arxiv.org/abs/2206.00364, DPM-Solver++ https://arxiv.org/abs/2211.01095

Shapes: noise and samples (B, C, [T,] H, W).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtrain.rng import SampleRNG
from uvit.guidance import Predict, guided

Progress = Callable[[int, int], object]
"""Called after every step with (steps done, steps in all)."""


@dataclass(frozen=True)
class SampleConfig:
    """How samples are generated."""

    steps: int = field(default=50, metadata={"help": "solver steps; heun makes two network calls a step"})
    solver: Literal["auto", "euler", "heun", "dpm++", "ddim"] = field(
        default="auto",
        metadata={"help": "flow: euler or heun; noise prediction: dpm++ or ddim; auto: the first of each"},
    )
    guidance: float = field(
        default=0.0, metadata={"help": "classifier-free guidance s in c + s (c - u); 0 is no guidance"}
    )

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: a sample needs a step; give at least 1")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance = {self.guidance}: give a finite number >= 0 (0 is no guidance)")

    def solver_for(self, objective: str, choices: Sequence[str]) -> str:
        """The solver to use among those an objective has, its preferred one first.

        Raises:
            ValueError: the configured solver belongs to another objective.
        """
        if self.solver == "auto":
            return choices[0]
        if self.solver not in choices:
            raise ValueError(
                f"solver = {self.solver!r}: does not solve {objective}; choose one of {', '.join(choices)}"
            )
        return self.solver


class Objective(Protocol):
    """What a network is trained to predict, and how that prediction becomes samples.

    `tokens` is the number of tokens of one sample: objectives may noise long sequences more.
    """

    def loss(self, predict: Predict, x0: Tensor, rng: SampleRNG, *, tokens: int, **cond: Tensor) -> Tensor:
        """Scalar fp32 mean over clean data x0 (B, ...); draws "time" and "noise" from `rng`."""
        ...

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
        """Turn standard normal noise (B, ...) into samples; `predict` is used as it is, see `generate`."""
        ...


def generate(
    objective: Objective,
    predict: Predict,
    noise: Tensor,
    config: SampleConfig,
    *,
    tokens: int,
    null: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
    **cond: Tensor,
) -> Tensor:
    """Sample with guidance.

    The number of network calls depends on `config` only: ranks of a sharded model stay in step.

    Args:
        objective: what the network was trained for.
        predict: the network.
        noise: standard normal, (B, C, [T,] H, W).
        tokens: tokens of one sample, see `Objective`.
        null: null conditions by name, see `guided`.
        cond: conditions by name, each (B, ...).
    """
    network = guided(predict, config.guidance, null or {})
    return objective.sample(network, noise, config, tokens=tokens, progress=progress, **cond)


@torch.no_grad()
def integrate(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    times: Sequence[float],
    method: str = "euler",
    progress: Progress | None = None,
) -> Tensor:
    """Solve dx/dt = velocity(x, t) along `times`, which fall to 0.

    Heun's last step is an Euler step: a single one costs no order, and it spares the call at t = 0, which
    networks are hardly trained for.

    Args:
        velocity: (x, t) -> dx/dt, of x's shape.
        x: the state at times[0].
        method: "euler" or "heun".
    """
    for done, (t, s) in enumerate(pairwise(times), start=1):
        v = velocity(x, t)
        if method == "heun" and s > 0:
            v = (v + velocity(x + (s - t) * v, s)) / 2
        x = x + (s - t) * v
        if progress:
            progress(done, len(times) - 1)
    return x


@torch.no_grad()
def denoise(
    noise_at: Callable[[Tensor, int], Tensor],
    x: Tensor,
    betas: NDArray[np.float64],
    steps: int,
    order: int = 2,
    progress: Progress | None = None,
) -> Tensor:
    """Multistep DPM-Solver++ over a discrete variance-preserving schedule; order 1 is deterministic DDIM.

    The levels go from the noisiest to the cleanest, whose prediction of the clean data is the result: `steps`
    network calls, and no noise is left.

    Args:
        noise_at: (x, level 0 … len(betas) - 1) -> predicted noise, of x's shape.
        x: standard normal noise.
        betas: the variances that each level adds.
        order: 1 or 2.

    Raises:
        ValueError: more steps than levels.
        ImportError: diffusers is not installed.
    """
    if steps > len(betas):
        raise ValueError(f"steps = {steps}: the schedule has {len(betas)} levels; give at most that many")
    scheduler = _dpm_solver(betas, order)
    levels = noise_levels(len(betas), steps)
    scheduler.set_timesteps(timesteps=levels)
    for done, level in enumerate(levels, start=1):
        x = scheduler.step(noise_at(x, level), level, x, return_dict=False)[0]
        if progress:
            progress(done, steps)
    return x


def noise_levels(count: int, steps: int) -> list[int]:
    """`steps` distinct levels, count - 1 down to 0, quadratically denser towards the clean end.

    Log-SNR, along which the solver extrapolates, changes fastest there: equal spacing would cross most of it
    in the last few steps (DDIM, https://arxiv.org/abs/2010.02502, spaces its levels so as well).
    """
    u = np.linspace(1, 0, steps)
    quadratic, linear = (count - 1) * u**2, (steps - 1) * u
    # Where the parabola has become flatter than one level a step, single levels take over.
    return [int(level) for level in np.maximum(quadratic, linear).round()]


def _dpm_solver(betas: NDArray[np.float64], order: int) -> Any:
    try:
        from diffusers import DPMSolverMultistepScheduler
    except ImportError as error:
        raise ImportError(
            "sampling a noise-prediction model needs diffusers: pip install 'dtrain[diffusers]'"
        ) from error
    return DPMSolverMultistepScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        solver_order=order,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
    )
