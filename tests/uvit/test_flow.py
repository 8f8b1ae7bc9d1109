"""Rectified flow: its times, its marginals, its loss."""

import math

import pytest
import torch
from torch import Tensor

from dtrain.rng import SampleRNG
from uvit.flow import FlowConfig, RectifiedFlow, shift_time

SHAPE = (3, 2, 4, 4)
MANY = 4096


def data(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return SampleRNG(7, range(count)).normal("data", SHAPE).to(dtype)


class Recorder:
    """A network that answers zero and remembers what it was given."""

    def __call__(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
        self.x, self.timesteps, self.cond = x, timesteps, cond
        return torch.zeros_like(x)


def test_shift_multiplies_the_noise_to_signal_ratio() -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    shifted = shift_time(t, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * t / (1 - t))
    assert [shift_time(end, 3.0) for end in (0.0, 1.0)] == [0.0, 1.0]
    assert shift_time(0.5, 1.0) == 0.5


def test_auto_shift_follows_the_square_root_of_the_tokens() -> None:
    config = FlowConfig(shift="auto", base_tokens=256)
    assert [config.shift_for(n) for n in (256, 1024, 4096)] == [1.0, 2.0, 4.0]
    assert FlowConfig(shift=3.0).shift_for(10**6) == 3.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"std": 0.0}, "std = 0.0"),
        ({"mean": math.nan}, "mean = nan"),
        ({"shift": -1.0}, "shift = -1.0"),
        ({"base_tokens": 0}, "base_tokens = 0"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowConfig(**fields)  # type: ignore[arg-type]


def test_times_are_logit_normal_and_then_shifted() -> None:
    mean, std, a = 0.4, 0.8, 2.5
    flow = RectifiedFlow(FlowConfig(mean=mean, std=std, shift=a))
    t = flow.times(SampleRNG(1, range(MANY)), tokens=5).double()
    logits = t.logit() - math.log(a)
    standard = ((logits - mean) / std).sort().values
    # Kolmogorov-Smirnov: the largest gap between the empirical and the normal distribution function; 1.63 is
    # its 1 % point, and the draws are fixed.
    expected = (torch.arange(MANY, dtype=torch.float64) + 0.5) / MANY
    gap = (torch.special.ndtr(standard) - expected).abs().max()
    assert gap < 1.63 / math.sqrt(MANY)


def test_the_network_sees_a_point_on_the_line_and_a_thousandfold_time() -> None:
    x0, rng, seen = data(64), SampleRNG(3, range(64)), Recorder()
    label = torch.arange(64)
    flow = RectifiedFlow()
    loss = flow.loss(seen, x0, rng, tokens=4096, y=label)
    noise, t = rng.normal("noise", SHAPE), flow.times(rng, 4096)
    lines = [(1 - float(t[i])) * x0[i] + float(t[i]) * noise[i] for i in range(64)]
    torch.testing.assert_close(seen.x, torch.stack(lines))
    torch.testing.assert_close(seen.timesteps, 1000 * t)
    assert seen.cond == {"y": label}
    torch.testing.assert_close(loss, (noise - x0).square().mean())


def test_marginals_have_the_mean_and_variance_of_their_time() -> None:
    x0, seen = torch.full((MANY, *SHAPE), 2.0), Recorder()
    RectifiedFlow().loss(seen, x0, SampleRNG(5, range(MANY)), tokens=1024)
    t = (seen.timesteps / 1000).view(-1, 1, 1, 1, 1)
    noise = (seen.x - (1 - t) * 2.0) / t
    bound = 4 / math.sqrt(noise.numel())
    assert abs(noise.mean()) < bound
    assert abs(noise.var() - 1) < bound * math.sqrt(2)


def test_the_true_velocity_has_no_loss() -> None:
    x0 = data(16)

    def truth(x: Tensor, timesteps: Tensor, **_: Tensor) -> Tensor:
        t = (timesteps.double() / 1000).view(-1, 1, 1, 1, 1)
        return ((x.double() - x0) / t).float()

    assert RectifiedFlow().loss(truth, x0, SampleRNG(0, range(16)), tokens=64) < 1e-10


def test_a_clean_prediction_is_judged_by_the_velocity_that_follows_from_it() -> None:
    x0, rng = data(16), SampleRNG(0, range(16))
    velocity, clean = RectifiedFlow(), RectifiedFlow(FlowConfig(predict="clean"))
    t = velocity.times(rng, 1024).view(-1, 1, 1, 1, 1)
    assert 0.05 < float(t.min()) < 0.5
    seen = Recorder()
    velocity.loss(seen, x0, rng, tokens=1024)
    loss = clean.loss(lambda x, *_: 0.3 * x, x0, rng, tokens=1024)
    torch.testing.assert_close(loss, velocity.loss(lambda x, *_: (x - 0.3 * x) / t, x0, rng, tokens=1024))
    assert clean.loss(lambda *_: x0, x0, rng, tokens=1024) == 0


def test_the_loss_of_a_clean_prediction_is_held_back_near_time_zero() -> None:
    x0, rng = data(16), SampleRNG(0, range(16))
    early = FlowConfig(predict="clean", mean=-20.0)
    loss = RectifiedFlow(early).loss(lambda *_: x0 + 0.1, x0, rng, tokens=1024)
    torch.testing.assert_close(loss, torch.tensor((0.1 / 0.05) ** 2))


def test_draws_belong_to_the_sample() -> None:
    flow, x0 = RectifiedFlow(), data(4)
    together, alone = Recorder(), Recorder()
    flow.loss(together, x0, SampleRNG(9, range(4)), tokens=300)
    for i in range(4):
        flow.loss(alone, x0[i : i + 1], SampleRNG(9, [i]), tokens=300)
        assert torch.equal(alone.timesteps, together.timesteps[i : i + 1])
        assert torch.equal(alone.x, together.x[i : i + 1])


def test_low_precision_latents_and_predictions_give_an_fp32_loss() -> None:
    x0, rng = data(4, torch.bfloat16), SampleRNG(2, range(4))
    loss = RectifiedFlow().loss(lambda x, t, **_: x.bfloat16(), x0, rng, tokens=64)
    assert loss.dtype == torch.float32
    assert loss.shape == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_draws_do_not_depend_on_the_device() -> None:
    flow = RectifiedFlow()
    on_cpu, on_gpu = (flow.times(SampleRNG(4, range(256), device), 4096) for device in ("cpu", "cuda"))
    assert torch.equal(on_cpu, on_gpu.cpu())
