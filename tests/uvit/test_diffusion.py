"""Noise prediction: its two schedules, its marginals, its loss."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dtrain.rng import SampleRNG
from uvit.diffusion import DiffusionConfig, NoisePrediction, stable_diffusion_alpha_bars, vp_alpha_bar

SHAPE = (3, 2, 4, 4)
SCHEDULES = ("vp_sde", "stable_diffusion")
LAST = 1 - 2.0**-24  # the largest uniform draw in fp32


def objective(schedule: str) -> NoisePrediction:
    return NoisePrediction(DiffusionConfig(schedule=schedule))  # type: ignore[arg-type]


def alpha_bar_of(schedule: str, timesteps: Tensor) -> Tensor:
    """ᾱ from what the network sees, fp64."""
    if schedule == "vp_sde":
        t = timesteps.double() / 999
        return torch.exp(-(0.1 * t + 19.9 * t * t / 2))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    after = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    return after[timesteps.long()]


class Recorder:
    """A network that answers zero and remembers what it was given."""

    def __call__(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
        self.x, self.timesteps, self.cond = x, timesteps, cond
        return torch.zeros_like(x)


def test_the_discrete_schedule_is_that_of_stable_diffusion() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    np.testing.assert_allclose(stable_diffusion_alpha_bars(), theirs.alphas_cumprod.numpy(), rtol=2e-4)
    assert math.isclose(stable_diffusion_alpha_bars()[0], 1 - 0.00085)


def test_the_continuous_schedule_solves_its_equation() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    log_alpha_bar = vp_alpha_bar(t).log()
    (slope,) = torch.autograd.grad(log_alpha_bar.sum(), t)
    torch.testing.assert_close(-slope, 0.1 + t.detach() * 19.9)  # beta(t) rises from 0.1 to 20
    assert float(vp_alpha_bar(torch.zeros(()))) == 1.0


def test_the_discrete_network_sees_1_to_1000() -> None:
    alpha_bar, seen = objective("stable_diffusion").level(torch.tensor([0.0, 0.001, 0.5, LAST]))
    assert seen.tolist() == [1, 2, 501, 1000]
    assert alpha_bar.tolist() == stable_diffusion_alpha_bars()[[0, 1, 500, 999]].tolist()


def test_the_continuous_network_sees_999_t() -> None:
    alpha_bar, seen = objective("vp_sde").level(torch.tensor([0.0, LAST]))
    torch.testing.assert_close(seen, torch.tensor([999e-5, 999.0]))
    torch.testing.assert_close(alpha_bar, alpha_bar_of("vp_sde", seen), rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_sampling_grid_lies_on_the_training_schedule(schedule: str) -> None:
    levels = torch.arange(1, 1001, dtype=torch.float64)
    seen = levels if schedule == "stable_diffusion" else 0.999 * levels
    np.testing.assert_allclose(objective(schedule).alpha_bars(), alpha_bar_of(schedule, seen), rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_network_sees_the_sample_at_its_level(schedule: str) -> None:
    rng, seen = SampleRNG(3, range(64)), Recorder()
    x0, label = SampleRNG(7, range(64)).normal("data", SHAPE), torch.arange(64)
    loss = objective(schedule).loss(seen, x0, rng, tokens=64, y=label)
    noise, alpha_bar = rng.normal("noise", SHAPE), alpha_bar_of(schedule, seen.timesteps)
    rows = [a.sqrt() * x + (1 - a).sqrt() * e for a, x, e in zip(alpha_bar, x0, noise, strict=True)]
    torch.testing.assert_close(seen.x, torch.stack(rows).float(), rtol=1e-4, atol=1e-5)
    assert seen.cond == {"y": label}
    torch.testing.assert_close(loss, noise.square().mean())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_marginals_have_the_mean_and_variance_of_their_level(schedule: str) -> None:
    count, seen = 4096, Recorder()
    x0 = torch.full((count, *SHAPE), 2.0)
    objective(schedule).loss(seen, x0, SampleRNG(5, range(count)), tokens=64)
    alpha_bar = alpha_bar_of(schedule, seen.timesteps).view(-1, 1, 1, 1, 1)
    noise = (seen.x - alpha_bar.sqrt() * 2.0) / (1 - alpha_bar).sqrt()
    bound = 4 / math.sqrt(noise.numel())
    assert abs(noise.mean()) < bound
    assert abs(noise.var() - 1) < bound * math.sqrt(2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_are_uniform(schedule: str) -> None:
    _, seen = objective(schedule).level(SampleRNG(6, range(4096)).uniform("time"))
    levels = seen.double().sort().values / 1000
    gap = (levels - (torch.arange(4096) + 0.5) / 4096).abs().max()
    assert gap < 1.63 / math.sqrt(4096) + 1e-3  # Kolmogorov-Smirnov at 1 %, plus one level


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_true_noise_has_no_loss(schedule: str) -> None:
    x0 = SampleRNG(7, range(16)).normal("data", SHAPE)

    def truth(x: Tensor, timesteps: Tensor, **_: Tensor) -> Tensor:
        alpha_bar = alpha_bar_of(schedule, timesteps).view(-1, 1, 1, 1, 1)
        return ((x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()).float()

    assert objective(schedule).loss(truth, x0, SampleRNG(0, range(16)), tokens=64) < 1e-8


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_draws_belong_to_the_sample(schedule: str) -> None:
    x0, together, alone = torch.randn(4, *SHAPE), Recorder(), Recorder()
    objective(schedule).loss(together, x0, SampleRNG(9, range(4)), tokens=1)
    for i in range(4):
        objective(schedule).loss(alone, x0[i : i + 1], SampleRNG(9, [i]), tokens=1)
        assert torch.equal(alone.timesteps, together.timesteps[i : i + 1])
        assert torch.equal(alone.x, together.x[i : i + 1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_draws_do_not_depend_on_the_device(schedule: str) -> None:
    u = SampleRNG(4, range(256)).uniform("time")
    _, on_cpu = objective(schedule).level(u)
    _, on_gpu = objective(schedule).level(u.cuda())
    assert torch.equal(on_cpu, on_gpu.cpu())
