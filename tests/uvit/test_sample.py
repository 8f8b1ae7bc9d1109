"""Guidance, and solvers against data whose optimal prediction is known: a Gaussian N(m, s^2) per element.

With x_t = α x0 + σ ε, x_t is Gaussian with variance V = α^2 s^2 + σ^2, the posterior means are
E[x0 | x] = m + α s^2 (x - α m) / V and E[ε | x] = σ (x - α m) / V, and the flow keeps (x - α m) / sqrt(V).
"""

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dtrain.rng import SampleRNG
from uvit.diffusion import DiffusionConfig, NoisePrediction
from uvit.flow import FlowConfig, RectifiedFlow
from uvit.guidance import drop_condition, drop_mask, guided
from uvit.sample import Objective, SampleConfig, generate, noise_levels

M, S = 1.5, 0.5
SHAPE = (1, 2, 8, 8)


def column(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))


def velocity(x: Tensor, timesteps: Tensor, **_: Tensor) -> Tensor:
    t = column(timesteps.to(x) / 1000, x)
    residual = (x - (1 - t) * M) / ((1 - t) ** 2 * S**2 + t**2)
    return t * residual - (M + (1 - t) * S**2 * residual)


def noise_of(alpha_bar: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def predict(x: Tensor, timesteps: Tensor, **_: Tensor) -> Tensor:
        a = column(alpha_bar(timesteps.double()), x)
        return ((1 - a).sqrt() * (x - a.sqrt() * M) / (a * S**2 + 1 - a)).to(x)

    return predict


def vp(timesteps: Tensor) -> Tensor:
    t = timesteps / 999
    return torch.exp(-(0.1 * t + 19.9 * t * t / 2))


def stable_diffusion(timesteps: Tensor) -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)[timesteps.long() - 1]


SCHEDULES = {"vp_sde": vp, "stable_diffusion": stable_diffusion}


def start(count: int = 8) -> Tensor:
    return SampleRNG(0, range(count)).normal("start", SHAPE).double()


def flow_error(method: str, steps: int, shift: float) -> float:
    flow = RectifiedFlow(FlowConfig(shift=shift))
    config = SampleConfig(steps=steps, solver=method)  # type: ignore[arg-type]
    out = flow.sample(velocity, start(), config, tokens=1)
    return float((out - (M + S * start())).abs().max())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_flow_solvers_converge_at_their_order(method: str, order: int, shift: float) -> None:
    coarse, fine = (flow_error(method, steps, shift) for steps in (160, 320))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_flow_samples_have_the_mean_and_deviation_of_the_data() -> None:
    noise = SampleRNG(1, range(256)).normal("start", SHAPE)
    out = generate(RectifiedFlow(), velocity, noise, SampleConfig(steps=50, solver="heun"), tokens=4096)
    assert out.shape == noise.shape
    assert out.dtype == torch.float32
    assert float(out.mean()) == pytest.approx(M, abs=0.01)
    assert float(out.std()) == pytest.approx(S, abs=0.01)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_clean_predictions_give_the_samples_of_their_velocities(solver: str) -> None:
    def clean(x: Tensor, timesteps: Tensor, **_: Tensor) -> Tensor:
        return x - column(timesteps.to(x) / 1000, x) * velocity(x, timesteps)

    config = SampleConfig(steps=12, solver=solver)  # type: ignore[arg-type]
    by_velocity = RectifiedFlow().sample(velocity, start(), config, tokens=64)
    by_clean = RectifiedFlow(FlowConfig(predict="clean")).sample(clean, start(), config, tokens=64)
    torch.testing.assert_close(by_clean, by_velocity, rtol=1e-5, atol=1e-6)


def test_the_time_grid_is_shifted_as_in_training() -> None:
    seen: list[float] = []

    def predict(x: Tensor, timesteps: Tensor, **_: Tensor) -> Tensor:
        assert timesteps.shape == (len(x),)
        seen.append(float(timesteps[0]))
        return torch.zeros_like(x)

    flow = RectifiedFlow(FlowConfig(shift="auto", base_tokens=100))
    flow.sample(predict, start(), SampleConfig(steps=4), tokens=900)
    expected = [1000 * 3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25)]
    assert seen == pytest.approx(expected)


def noise_model(schedule: str) -> NoisePrediction:
    pytest.importorskip("diffusers")
    return NoisePrediction(DiffusionConfig(schedule=schedule))  # type: ignore[arg-type]


def noise_error(schedule: str, solver: str, steps: int) -> float:
    """Root mean square distance to the exact flow, ended as the sampler ends it: by E[x0 | x] at level 1."""
    alpha_bar = SCHEDULES[schedule]
    first, last = alpha_bar(torch.tensor([1.0, 1000.0]) * (0.999 if schedule == "vp_sde" else 1))
    z = (start() - last.sqrt() * M) / (last * S**2 + 1 - last).sqrt()
    exact = M + first.sqrt() * S**2 / (first * S**2 + 1 - first).sqrt() * z
    config = SampleConfig(steps=steps, solver=solver)  # type: ignore[arg-type]
    out = noise_model(schedule).sample(noise_of(alpha_bar), start().float(), config, tokens=1)
    return float((out - exact).square().mean().sqrt())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_converges_at_order_1(schedule: str) -> None:
    coarse, fine = (noise_error(schedule, "ddim", steps) for steps in (20, 40))
    assert math.log2(coarse / fine) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dpm_solver_converges_at_order_2_to_the_exact_flow(schedule: str) -> None:
    coarse, fine = (noise_error(schedule, "dpm++", steps) for steps in (10, 20))
    assert math.log2(coarse / fine) > 2
    # A network that were told a neighbouring level would end 0.003 away.
    assert noise_error(schedule, "dpm++", 160) < 5e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_samples_have_the_mean_and_deviation_of_the_data(schedule: str) -> None:
    alpha_bar = SCHEDULES[schedule]
    # The schedules end near pure noise, not at it (Stable Diffusion's keeps 7 % of the signal): start there.
    last = float(alpha_bar(torch.tensor([999.0 if schedule == "vp_sde" else 1000.0])))
    noise = SampleRNG(1, range(256)).normal("start", SHAPE)
    x = math.sqrt(last) * M + math.sqrt(last * S**2 + 1 - last) * noise
    out = generate(noise_model(schedule), noise_of(alpha_bar), x, SampleConfig(steps=50), tokens=64)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert float(out.mean()) == pytest.approx(M, abs=0.01)
    assert float(out.std()) == pytest.approx(S, abs=0.01)


def test_ddim_is_the_deterministic_step_of_its_paper() -> None:
    seen: list[float] = []

    def predict(x: Tensor, timesteps: Tensor, **_: Tensor) -> Tensor:
        seen.append(float(timesteps[0]))
        return torch.tanh(x) + 0.1

    config = SampleConfig(steps=7, solver="ddim")
    out = noise_model("stable_diffusion").sample(predict, start().float(), config, tokens=1)

    assert seen[0] == 1000
    assert seen[-1] == 1
    alpha_bars = [float(stable_diffusion(torch.tensor([n]))) for n in seen] + [1.0]
    x = start()
    for a, b in pairwise(alpha_bars):
        noise = torch.tanh(x) + 0.1
        x0 = (x - math.sqrt(1 - a) * noise) / math.sqrt(a)
        x = math.sqrt(b) * x0 + math.sqrt(1 - b) * noise
    torch.testing.assert_close(out.double(), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 20, 50, 250, 999, 1000])
def test_levels_are_distinct_and_span_the_schedule(steps: int) -> None:
    levels = noise_levels(1000, steps)
    assert len(set(levels)) == steps
    assert levels == sorted(levels, reverse=True)
    assert (levels[0], levels[-1]) == (999, 0 if steps > 1 else 999)


@pytest.mark.parametrize(
    ("objective", "solver", "calls"),
    [
        (RectifiedFlow(), "euler", 6),
        (RectifiedFlow(), "heun", 11),
        (NoisePrediction(), "dpm++", 6),
        (NoisePrediction(), "ddim", 6),
    ],
)
def test_network_calls_and_progress_are_those_of_the_steps(
    objective: Objective, solver: str, calls: int
) -> None:
    if isinstance(objective, NoisePrediction):
        pytest.importorskip("diffusers")
    count, steps, weight = 0, [], torch.ones((), requires_grad=True)

    def predict(x: Tensor, timesteps: Tensor, **_: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x * weight

    config = SampleConfig(steps=6, solver=solver)  # type: ignore[arg-type]
    out = objective.sample(
        predict, start(2).float(), config, tokens=9, progress=lambda done, total: steps.append((done, total))
    )
    assert count == calls
    assert steps == [(done, 6) for done in range(1, 7)]
    assert not out.requires_grad


def test_a_bfloat16_network_does_not_coarsen_the_state() -> None:
    pytest.importorskip("diffusers")
    for objective in (RectifiedFlow(), NoisePrediction()):
        inputs = []

        def predict(x: Tensor, timesteps: Tensor, **_: Tensor) -> Tensor:
            inputs.append(x.dtype)  # noqa: B023
            return x.bfloat16()

        out = objective.sample(predict, start(2).float(), SampleConfig(steps=3), tokens=9)
        assert {out.dtype, *inputs} == {torch.float32}


@pytest.mark.parametrize(
    ("objective", "config", "message"),
    [
        (RectifiedFlow(), SampleConfig(solver="ddim"), "solver = 'ddim'.*euler, heun"),
        (NoisePrediction(), SampleConfig(solver="heun"), r"solver = 'heun'.*dpm\+\+, ddim"),
        (NoisePrediction(), SampleConfig(steps=1001), "steps = 1001.*1000 levels"),
    ],
)
def test_a_solver_that_does_not_fit_is_refused(
    objective: Objective, config: SampleConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        objective.sample(velocity, start(1), config, tokens=4)


@pytest.mark.parametrize("fields", [{"steps": 0}, {"guidance": -0.1}, {"guidance": math.inf}])
def test_a_wrong_field_is_named(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))} = "):
        SampleConfig(**fields)  # type: ignore[arg-type]


def test_without_diffusers_the_extra_is_named() -> None:
    """In an interpreter that cannot import it, as when it is not installed."""
    code = """
import sys, torch
sys.modules["diffusers"] = None
from uvit.diffusion import NoisePrediction
from uvit.flow import RectifiedFlow
from uvit.sample import SampleConfig
x, config = torch.zeros(1, 1, 2, 2), SampleConfig(steps=2)
RectifiedFlow().sample(lambda x, t: x, x, config, tokens=1)
try:
    NoisePrediction().sample(lambda x, t: x, x, config, tokens=1)
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'dtrain[diffusers]'" in run.stdout


def network(x: Tensor, timesteps: Tensor, /, **cond: Tensor) -> Tensor:
    """Any function of all its inputs, one sample at a time."""
    total = column(timesteps.to(x), x) * x
    for value in cond.values():
        total = total + column(value.to(x).flatten(1).sum(1) if value.ndim > 1 else value.to(x), x)
    return total


def test_guidance_extrapolates_in_one_call_of_twice_the_batch() -> None:
    batches: list[int] = []

    def counted(x: Tensor, timesteps: Tensor, /, **cond: Tensor) -> Tensor:
        batches.append(len(x))
        return network(x, timesteps, **cond)

    x, t, y = start(3), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4, 5, 6])
    context, size = torch.randn(3, 7, 2), torch.tensor([8.0, 9.0, 10.0])
    null = {"y": torch.tensor(10), "context": torch.randn(7, 2)}
    out = guided(counted, 0.7, null)(x, t, y=y, context=context, size=size)

    c = network(x, t, y=y, context=context, size=size)
    u = network(x, t, y=torch.tensor([10] * 3), context=null["context"].expand(3, 7, 2), size=size)
    torch.testing.assert_close(out, c + 0.7 * (c - u))
    assert batches == [6]


def test_no_guidance_is_the_network_itself() -> None:
    assert guided(network, 0.0, {"y": torch.tensor(10)}) is network


def test_guidance_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance = 1\.5: .*no null"):
        guided(network, 1.5, {})
    with pytest.raises(ValueError, match=r"guidance = 1\.5: .*\['y'\]"):
        guided(network, 1.5, {"y": torch.tensor(1)})(start(1), torch.ones(1))


def test_generate_guides_every_step() -> None:
    flow, config = RectifiedFlow(), SampleConfig(steps=3, guidance=0.5)
    y, null = torch.tensor([1, 2]), {"y": torch.tensor(0)}
    out = generate(flow, network, start(2), config, tokens=16, null=null, y=y)
    by_hand = flow.sample(guided(network, 0.5, null), start(2), config, tokens=16, y=y)
    alone = flow.sample(network, start(2), config, tokens=16, y=y)
    assert torch.equal(out, by_hand)
    assert not torch.equal(out, alone)


def test_dropped_conditions_are_null_and_belong_to_the_sample() -> None:
    rng = SampleRNG(2, range(4096))
    mask = drop_mask(rng, 0.1)
    assert abs(mask.float().mean() - 0.1) < 3 * math.sqrt(0.09 / 4096)
    assert [bool(drop_mask(SampleRNG(2, [i]), 0.1)) for i in range(64)] == mask[:64].tolist()
    assert not drop_mask(rng, 0.0).any()
    assert drop_mask(rng, 1.0).all()

    labels = drop_condition(torch.arange(4096), torch.tensor(5000), mask)
    assert torch.equal(labels, torch.arange(4096).masked_fill(mask, 5000))
    context, null = torch.randn(4096, 3, 2), torch.randn(3, 2)
    dropped = drop_condition(context, null, mask)
    assert torch.equal(dropped[~mask], context[~mask])
    assert torch.equal(dropped[mask], null.expand(int(mask.sum()), 3, 2))
