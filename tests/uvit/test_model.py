"""The U-ViT as a video model: sizes, positions, FLOPs, memory, initial weights, and how it is trained."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import uvit
from tests.uvit.inputs import draw_inputs
from uvit.config import Grid
from uvit.embed import Layout, PatchEmbed, fit_positions, patchify, rope_table, timestep_embedding, unpatchify
from uvit.layers import Attention, Block

_CONFIG = uvit.UViTConfig(input_size=(4, 8, 8), patch_size=(1, 2, 2), width=32, depth=4, heads=4)
_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class": {"condition": "class", "num_classes": 5, "time_embed": True, "qkv_bias": True},
    "text": {"condition": "text", "text_dim": 12, "text_tokens": 3, "final_conv": False},
    "rope": {"positions": "rope", "qk_norm": True, "patch_size": (2, 2, 4), "mlp_ratio": 2.5},
    "no skips": {"long_skips": False},
}


def _model(**overrides: Any) -> uvit.UViT:
    torch.manual_seed(0)
    model = uvit.build(_CONFIG, **overrides)
    assert isinstance(model, uvit.UViT)
    return model


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
@pytest.mark.parametrize("size", [(4, 8, 8), (2, 12, 4), (6, 4, 16)])
def test_any_size_that_the_patch_divides_runs(options: dict[str, Any], size: Grid) -> None:
    model = _model(**options)
    inputs = draw_inputs(model.config, size)
    out = model(**inputs)
    assert out.shape == inputs["x"].shape
    out.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("name", ["plain", "class", "text"])
def test_an_image_is_a_one_frame_video(name: str) -> None:
    model = _model(**_OPTIONS[name])
    inputs = draw_inputs(model.config, (1, 8, 8))
    video = model(**inputs)
    image = model(**inputs | {"x": inputs["x"].squeeze(2)})
    assert image.unsqueeze(2).equal(video)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 4)])
def test_patch_embedding_is_the_convolution(patch: Grid) -> None:
    embed = PatchEmbed(patch, 3, 16).double()
    x = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    weight = embed.proj.weight if patch[0] > 1 else embed.proj.weight[:, :, None]
    tokens = F.conv3d(x, weight, embed.proj.bias, stride=patch).flatten(2).mT
    torch.testing.assert_close(embed(x), tokens)


def test_unpatchify_puts_every_number_back() -> None:
    x = torch.arange(2 * 3 * 4 * 8 * 8).view(2, 3, 4, 8, 8)
    channels_last = patchify(x, (2, 2, 4)).unflatten(-1, (3, -1)).mT.flatten(2)  # the head's order: pixels, C
    assert unpatchify(channels_last, (2, 4, 2), (2, 2, 4)).equal(x.transpose(1, 2).flatten(0, 1))


def test_positions_are_the_table_at_the_native_size_and_bilinear_at_another() -> None:
    table = torch.randn(1, 3 + 16, 6)
    assert fit_positions(table, (1, 4, 4), (1, 4, 4)) is table
    image = table[:, 3:].mT.unflatten(2, (4, 4))
    expected = F.interpolate(image, (6, 2), mode="bilinear").flatten(2).mT
    fitted = fit_positions(table, (1, 4, 4), (1, 6, 2))
    assert fitted[:, :3].equal(table[:, :3])
    torch.testing.assert_close(fitted[:, 3:], expected)


def test_positions_interpolate_in_time() -> None:
    steps = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 2, 2, 5).reshape(1, 16, 5)
    fitted = fit_positions(torch.cat([torch.full((1, 1, 5), 9.0), steps], 1), (4, 2, 2), (2, 2, 2))
    assert fitted[:, 0].eq(9.0).all()
    torch.testing.assert_close(fitted[0, 1:, 0], torch.tensor([0.5] * 4 + [2.5] * 4))


def test_rope_leaves_extra_tokens_and_the_first_patch_alone() -> None:
    rope = rope_table(3, (2, 2, 2), 12, torch.device("cpu"))
    assert rope.cos.shape == rope.sin.shape == (11, 6)
    assert rope.cos[:4].eq(1).all()
    assert rope.sin[:4].eq(0).all()
    assert rope.sin[4:].abs().amax(-1).gt(0).all()


def test_time_is_cosines_then_sines() -> None:
    embedding = timestep_embedding(torch.tensor([0, 2]), 8)
    angles = 2 * 10000.0 ** (-torch.arange(4.0) / 4)
    assert embedding[0].equal(torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(embedding[1], torch.cat([angles.cos(), angles.sin()]))


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys() -> None:
    torch.manual_seed(0)
    attention, x = Attention(24, 2, qk_norm=True).double(), torch.randn(2, 5, 24, dtype=torch.float64)
    for norm in (attention.q_norm, attention.k_norm):
        norm.eps = 0.0
    before = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:48] *= 7
    torch.testing.assert_close(attention(x), before)


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
@pytest.mark.parametrize("size", [(4, 8, 8), (2, 4, 12)])
def test_flops_are_those_that_pytorch_counts(options: dict[str, Any], size: Grid) -> None:
    model = _model(**options)
    # The mathematical backend: PyTorch's counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**draw_inputs(model.config, size, batch=3))
    assert uvit.forward_flops(model.config, 3, *size) == counter.get_total_flops()
    patch = model.config.patch_size
    patches = size[0] // patch[0] * (size[1] // patch[1]) * (size[2] // patch[2])
    assert uvit.token_count(model.config, *size) == model.config.extra_tokens + patches


class _Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        return out


def _wide_shapes(model: nn.Module, inputs: dict[str, Tensor]) -> set[tuple[int, ...]]:
    """Shapes with a dim of 2D that forward and backward produce, the weight's own aside."""
    width = _CONFIG.width
    with _Shapes() as seen:
        model(**inputs).square().mean().backward()
    return {s for s in seen.shapes if 2 * width in s and s not in {(width, 2 * width), (2 * width, width)}}


def test_a_long_skip_never_makes_a_tensor_twice_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    size = (2, 6, 6)  # 18 patches: nothing else measures 2D = 64
    inputs = draw_inputs(_CONFIG, size)
    assert _wide_shapes(_model(input_size=size), inputs) == set()

    def concatenated(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(torch.cat([x, skip], dim=-1), weight, bias)

    monkeypatch.setattr("uvit.layers.skip_linear", concatenated)
    assert (2, 19, 64) in _wide_shapes(_model(input_size=size), inputs)  # so the check can fail


def test_skips_are_last_in_first_out() -> None:
    model = _model()
    seen: list[Tensor] = []
    for block in [*model.in_blocks, *model.out_blocks]:
        block.register_forward_hook(lambda _, args, out: seen.append(args[1] if args[1] is not None else out))
    model(**draw_inputs(_CONFIG))
    assert [a is b for a, b in zip(seen[:2], reversed(seen[2:]), strict=True)] == [True, True]


def _gradients(run: Callable[[], Tensor], model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(run().square().mean(), list(model.parameters())))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_can_be_checkpointed(reentrant: bool) -> None:
    torch.manual_seed(0)
    block = Block(32, 4, qk_norm=True, skip=True)
    layout = Layout(rope_table(1, (2, 2, 2), 8, torch.device("cpu")))
    x, skip = torch.randn(2, 9, 32, requires_grad=True), torch.randn(2, 9, 32)
    plain = block(x, skip, layout)
    again = checkpoint(block, x, skip, layout, use_reentrant=reentrant)
    for out in (plain, again):
        out.square().mean().backward()
    gradients = [p.grad for p in block.parameters()]
    assert again.equal(plain)
    single = _gradients(lambda: block(x, skip, layout), block)
    for twice, once in zip(gradients, single, strict=True):
        assert twice is not None
        torch.testing.assert_close(twice, 2 * once)


def test_a_block_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    block = Block(32, 4, qk_norm=True, skip=True)
    layout = Layout(rope_table(1, (2, 2, 2), 8, torch.device("cpu")))
    x, skip = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, skip, layout), block(x, skip, layout))
    ours, theirs = (_gradients(lambda f=f: f(x, skip, layout), block) for f in (compiled, block))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
def test_bf16_by_autocast_and_by_parameters(options: dict[str, Any]) -> None:
    model = _model(**options)
    inputs = draw_inputs(model.config)
    exact = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(**inputs)
    cast = model.to(torch.bfloat16)(**inputs)
    assert autocast.dtype == cast.dtype == torch.bfloat16
    for out in (autocast, cast):
        assert ((out.float() - exact).norm() / exact.norm()).item() < 0.05


def test_fsdp_casts_the_parameters_but_not_the_rotations() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = _model(positions="rope", qk_norm=True)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
        for block in [*model.in_blocks, model.mid_block, *model.out_blocks]:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False))
        seen: list[tuple[torch.dtype, torch.dtype]] = []
        model.mid_block.attn.register_forward_hook(
            lambda _, args, __: seen.append((args[0].dtype, args[1].cos.dtype))
        )
        out = model(**draw_inputs(model.config))
        assert not out._is_view()
        out.square().mean().backward()
        assert seen == [(torch.bfloat16, torch.float32)]
        assert out.dtype == torch.bfloat16
    finally:
        dist.destroy_process_group()


def _by_name(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


def test_initial_weights_are_the_official_distributions() -> None:
    model = _model(width=256, heads=4, condition="class", num_classes=40, time_embed=True, qk_norm=True)
    fill = uvit.initializer(model)
    filled = {}
    for name, parameter in model.named_parameters():
        filled[name] = torch.full(parameter.shape, torch.nan)
        fill(name, filled[name], _by_name(name))
    for name, value in filled.items():
        if name.startswith(("patch_embed", "final_layer")):
            bound = (4 * (4 if name.startswith("patch") else 9)) ** -0.5
            assert value.abs().max() <= bound
            if value.numel() > 100:
                assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
        elif name == "label_emb.weight":
            assert value.std().item() == pytest.approx(1.0, rel=0.05)
        elif "norm" in name:
            assert value.eq(1.0 if name.endswith("weight") else 0.0).all()
        elif name.endswith("bias"):
            assert value.eq(0).all()
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.1)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    ours = uvit.build("cifar10_s2", width=32, depth=2, heads=2)
    torch.manual_seed(3)
    again = uvit.build("cifar10_s2", width=32, depth=2, heads=2)
    other = uvit.build("cifar10_s2", width=32, depth=2, heads=2)
    state = ours.state_dict()
    assert all(value.equal(state[key]) for key, value in again.state_dict().items())
    assert not other.state_dict()["pos_embed"].equal(state["pos_embed"])
    generator = torch.Generator().manual_seed(3)
    uvit.init_parameters(other, generator)
    assert all(value.equal(state[key]) for key, value in other.state_dict().items())


def test_a_meta_model_stays_meta_and_has_no_buffers() -> None:
    with torch.device("meta"):
        model = uvit.build("video_s2")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert list(model.buffers()) == []


def test_presets_are_consistent_data() -> None:
    presets = uvit.presets()
    assert uvit.UViTConfig.presets() == presets
    assert {n for n, c in presets.items() if c.input_size[0] > 1} == {f"video_{s}2" for s in "smlh"}
    assert uvit.token_count(presets["video_h2"], 17, 32, 32) == 1 + 77 + 4352
    assert [uvit.token_count(presets[n], 1, 32, 32) for n in ("cifar10_s2", "imagenet256_h2")] == [257, 258]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 5}, "heads = 5: does not divide width = 32; heads = 4 would"),
        ({"depth": 5}, "depth = 5: must be even"),
        ({"width": 33, "heads": 3}, "width = 33: must be even"),
        (
            {"patch_size": (3, 2, 2)},
            r"input_size = \(4, 8, 8\): .*patch_size = \(3, 2, 2\); \(3, 8, 8\) would",
        ),
        ({"patch_size": (1, 0, 2)}, "patch_size = .*: every side must be positive"),
        ({"condition": "class"}, "num_classes = 0: condition = 'class' needs at least 1"),
        ({"positions": "rope", "heads": 8}, "heads = 8: positions = 'rope' needs .*, not 4"),
        ({"mlp_ratio": 0.0}, "mlp_ratio = 0.0: must be positive"),
        ({"in_channels": 0}, "in_channels = 0: must be positive"),
        ({"head": 4}, "head: no field of UViTConfig; nearest: heads"),
    ],
)
def test_a_wrong_configuration_is_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uvit.build(_CONFIG, **overrides)


def test_a_mistyped_preset_is_named() -> None:
    with pytest.raises(ValueError, match="preset = 'video_s': no such preset; nearest: video_s2"):
        uvit.build("video_s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 8, 8)}, r"x has shape \(2, 3, 4, 8, 8\): must be \(B, 4"),
        ({"x": torch.zeros(2, 4, 4, 8, 7)}, r"= \(4, 8, 7\): not divisible by patch_size = \(1, 2, 2\)"),
        ({"timesteps": torch.zeros(())}, r"timesteps is a tensor of shape \(\)"),
        ({"timesteps": torch.zeros(2).bfloat16()}, "timesteps have dtype torch.bfloat16"),
        ({"y": None}, r"y is None: condition = 'class' needs \(2,\)"),
        (
            {"context": torch.zeros(2, 3, 4)},
            "context is a tensor of shape .*: condition = 'class' needs None",
        ),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, Any], message: str) -> None:
    model = _model(condition="class", num_classes=5)
    with pytest.raises(ValueError, match=message):
        model(**draw_inputs(model.config) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"img": torch.zeros(2, 3, 8, 8)},
            r"img is a tensor of shape \(2, 3, 8, 8\): .* needs \(2, 4, 8, 8\)",
        ),
        ({"t_text": torch.zeros(1)}, r"t_text is a tensor of shape \(1,\)"),
        ({"data_type": None}, r"data_type is None: data_type_token = True .* needs \(2,\)"),
    ],
)
def test_wrong_inputs_of_unidiffuser_are_named(change: dict[str, Any], message: str) -> None:
    model = uvit.build("unidiffuser_v1", input_size=(8, 8), width=32, depth=2, heads=2, text_tokens=3)
    inputs = {
        "img": torch.zeros(2, 4, 8, 8),
        "clip_img": torch.zeros(2, 1, 512),
        "text": torch.zeros(2, 3, 64),
    }
    inputs |= {"t_img": torch.zeros(2), "t_text": torch.ones(2), "data_type": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        model(**inputs | change)


def test_importing_the_models_stays_light() -> None:
    code = "import json, sys, uvit; print(json.dumps([m for m in sys.modules if '.' not in m]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) & {"av", "matplotlib", "diffusers", "rich", "tensorboard"} == set()
