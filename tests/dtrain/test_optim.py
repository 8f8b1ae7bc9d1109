"""Parameter groups, schedules and the averaged weights, against PyTorch and closed forms."""

import pytest
import torch
from torch import nn

from dtrain.optim import (
    EMA,
    EMAConfig,
    OptimConfig,
    ParamGroup,
    build_optimizer,
    decay_at,
    gradient_norm,
    lr_multiplier,
    set_learning_rate,
)
from dtrain.sharding.mesh import MeshConfig
from dtrain.step import clip_coefficient


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_the_first_matching_group_counts() -> None:
    config = OptimConfig(
        weight_decay=0.1,
        groups=(ParamGroup("*.bias", weight_decay=0.0), ParamGroup("0.*", lr_scale=0.5)),
    )
    net = model()
    optimizer = build_optimizer(net, config)
    names = {id(p): name for name, p in net.named_parameters()}
    summary = [
        ([names[id(p)] for p in group["params"]], group["weight_decay"], group["lr_scale"])
        for group in optimizer.param_groups
    ]
    assert summary == [
        (["0.bias", "1.bias", "2.bias"], 0.0, 1.0),
        (["0.weight"], 0.1, 0.5),
        (["1.weight", "2.weight"], 0.1, 1.0),
    ]
    set_learning_rate(optimizer, config, step=4999, total_steps=10_000)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 1e-4, 2e-4]


def test_a_group_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"match = '\*.scale' matches no parameter"):
        build_optimizer(model(), OptimConfig(groups=(ParamGroup("*.scale"),)))


def test_schedules() -> None:
    warm = OptimConfig(warmup_steps=4)
    assert [lr_multiplier(warm, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    linear = OptimConfig(warmup_steps=0, schedule="linear", final_ratio=0.2)
    assert [lr_multiplier(linear, step, 4) for step in (0, 2, 4, 9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    cosine = OptimConfig(warmup_steps=2, schedule="cosine")
    assert lr_multiplier(cosine, 2, 10) == 1.0
    assert lr_multiplier(cosine, 6, 10) == pytest.approx(0.5)
    assert lr_multiplier(cosine, 10, 10) == pytest.approx(0.0)


def test_clipping_equals_pytorch() -> None:
    """The coefficient goes into the optimizer's pass; the bits are those of clipping first."""
    ours, theirs = model(), model()
    for net in (ours, theirs):
        net(torch.ones(5, 3)).square().sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    norm = gradient_norm(ours.parameters())
    assert norm.equal(expected)
    build_optimizer(ours, OptimConfig()).step(grad_scale=clip_coefficient(norm, 0.1))
    build_optimizer(theirs, OptimConfig()).step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.equal(b)


def test_zero_clip_norm_only_measures_and_small_gradients_stay() -> None:
    assert clip_coefficient(torch.tensor(3.0), 0.0) is None
    assert clip_coefficient(torch.tensor(3.0), 5.0) == 1
    assert clip_coefficient(torch.tensor(10.0), 5.0) == pytest.approx(0.5)


def test_ema_follows_its_definition_and_swaps_back() -> None:
    net, config = model(), EMAConfig(decay=0.5, warmup=False)
    ema = EMA(net, config)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        for p in net.parameters():
            p += 1
    ema.update(0)
    for name, average in ema.shards.items():
        torch.testing.assert_close(average, start[name] + 0.5)
    trained = {name: p.detach().clone() for name, p in net.named_parameters()}
    averaged = {name: average.clone() for name, average in ema.shards.items()}
    with ema.swapped_into(net):
        assert all(torch.equal(p, averaged[name]) for name, p in net.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in net.named_parameters())
    assert all(torch.equal(ema.shards[name], averaged[name]) for name in averaged)


def test_ema_warm_up() -> None:
    config = EMAConfig(decay=0.99)
    assert [decay_at(config, step) for step in (0, 8, 10**6)] == [0.1, 0.5, 0.99]


@pytest.mark.parametrize(
    ("mesh", "world", "sizes"),
    [
        (MeshConfig(), 8, (1, 8)),
        (MeshConfig(replicate=2), 8, (2, 4)),
        (MeshConfig(replicate=4, shard=2), 8, (4, 2)),
    ],
)
def test_mesh_sizes(mesh: MeshConfig, world: int, sizes: tuple[int, int]) -> None:
    assert mesh.sizes(world) == sizes


def test_a_mesh_that_does_not_fit_names_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"mesh.replicate = 3 does not divide the world size 8.*1, 2, 4, 8"):
        MeshConfig(replicate=3).sizes(8)
    with pytest.raises(ValueError, match=r"2 x 3 = 6, but the world size is 8"):
        MeshConfig(replicate=2, shard=3).sizes(8)
