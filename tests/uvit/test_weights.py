"""Official constructors and state dicts in, state dicts out, image weights as the start of a video model."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import uvit
from uvit.weights import export_official, from_official_config, inflate_image_weights, load_official

_IMAGE = uvit.UViTConfig(input_size=(1, 8, 8), width=24, depth=2, heads=2)
_SMALL: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 2, "num_heads": 2}


def _build(config: uvit.UViTConfig, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return uvit.build(config, **overrides)


def _keys(**kwargs: Any) -> set[str]:
    return set(from_official_config("uvit", _SMALL | kwargs).state_dict())


def test_official_options_add_exactly_their_keys() -> None:
    plain = _keys()
    assert _keys(num_classes=3) - plain == {"label_emb.weight"}
    assert _keys(mlp_time_embed=True) - plain == {
        f"time_embed.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")
    }
    assert plain - _keys(conv=False) == {"final_layer.weight", "final_layer.bias"}
    assert plain - _keys(skip=False) == {"out_blocks.0.skip_linear.weight", "out_blocks.0.skip_linear.bias"}
    blocks = ("in_blocks.0", "mid_block", "out_blocks.0")
    assert _keys(qkv_bias=True) - plain == {f"{block}.attn.qkv.bias" for block in blocks}
    assert _keys(use_checkpoint=True, norm_layer=nn.LayerNorm, qk_scale=None, num_classes=-1) == plain


def test_time_mlps_of_unidiffuser_have_the_official_keys() -> None:
    kwargs = {"img_size": (8, 4), "patch_size": 2, "in_chans": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
    kwargs |= {"text_dim": 6, "num_text_tokens": 3, "clip_img_dim": 5, "mlp_time_embed": True}
    model = from_official_config("unidiffuser_v1", kwargs)
    keys = set(model.state_dict())
    assert {f"time_{k}_embed.{i}.weight" for k in ("img", "text") for i in (0, 2)} <= keys
    assert {"token_embedding.weight", "pos_embed_token", "out_blocks.0.norm1.weight"} <= keys
    assert "out_blocks.1.norm1.weight" not in keys  # depth 3 has one block on each side
    time = torch.tensor([1.0])
    outs = model(
        torch.randn(1, 4, 8, 4), torch.randn(1, 1, 5), torch.randn(1, 3, 6), time, time, torch.tensor([1])
    )
    assert [tuple(out.shape) for out in outs] == [(1, 4, 8, 4), (1, 1, 5), (1, 3, 6)]


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("uvit_3d", {}, "kind = 'uvit_3d'.*unidiffuser_v1"),
        ("uvit", {"embed_dims": 24}, "embed_dims: no argument of the official uvit; nearest: embed_dim"),
        ("uvit", {"qk_scale": 0.5}, "qk_scale = 0.5: only the official default, None"),
        ("unidiffuser", {"drop_rate": 0.1}, "drop_rate = 0.1: only the official default, 0.0"),
        (
            "unidiffuser",
            {"img_size": 8, "in_chans": 4, "patch_size": 2},
            "text_dim, num_text_tokens, clip_img_dim",
        ),
        ("uvit", {"num_heads": 7}, "heads = 7: does not divide width = 24; heads = 6 would"),
    ],
)
def test_wrong_official_arguments_are_named(kind: str, kwargs: dict[str, Any], message: str) -> None:
    base = _SMALL if kind == "uvit" else {}
    with pytest.raises(ValueError, match=message):
        from_official_config(kind, base | kwargs)


def test_a_state_dict_that_does_not_fit_is_refused_by_name() -> None:
    model = _build(_IMAGE)
    before = export_official(model)
    state = export_official(_build(_IMAGE))
    del state["norm.bias"]
    state["extra"] = torch.zeros(1)
    state["pos_embed"] = torch.zeros(1, 3, 24)
    with pytest.raises(ValueError, match=r"missing: norm.bias; 1 unexpected: extra; .*pos_embed is") as error:
        load_official(model, state)
    assert "(1, 3, 24), must be (1, 17, 24)" in str(error.value)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_loading_into_a_meta_model_fills_it() -> None:
    state = export_official(_build(_IMAGE))
    with torch.device("meta"):
        model = uvit.build(_IMAGE)
    load_official(model, state)
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    state["pos_embed"].zero_()
    assert model.get_parameter("pos_embed").abs().sum() > 0  # a copy, not an alias


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"input_size": (4, 8, 8)}, "input_size"),
        ({"positions": "rope"}, "positions"),
    ],
)
def test_what_the_official_code_cannot_express_is_not_exported(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        export_official(_build(_IMAGE, **overrides))


def _inflated(overrides: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    image = _build(_IMAGE)
    video = _build(_IMAGE, **overrides)
    assert isinstance(video, uvit.UViT)
    load_official(video, inflate_image_weights(export_official(image), video.config))
    return image, video


def _image_and_clip(frames: int) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return image, image[:, :, None].expand(-1, -1, frames, -1, -1), torch.tensor([3.0, 700.0])


def test_a_still_clip_in_one_temporal_patch_is_treated_as_its_image() -> None:
    image_model, video_model = _inflated({"input_size": (4, 8, 8), "patch_size": (4, 2, 2)})
    image, clip, time = _image_and_clip(4)
    expected = image_model(image, time)[:, :, None].expand_as(clip)
    torch.testing.assert_close(video_model(clip, time), expected, rtol=1e-5, atol=1e-6)


def test_a_one_frame_clip_is_treated_as_its_image_after_inflation() -> None:
    image_model, video_model = _inflated({"input_size": (6, 8, 8)})
    image, clip, time = _image_and_clip(1)
    torch.testing.assert_close(video_model(clip, time), image_model(image, time)[:, :, None])


def test_frames_of_a_still_clip_stay_equal() -> None:
    # With several temporal patches the time token weighs less among the patches: only the symmetry is exact.
    _, video_model = _inflated({"input_size": (6, 8, 8), "patch_size": (2, 2, 2)})
    _, clip, time = _image_and_clip(6)
    out = video_model(clip, time)
    torch.testing.assert_close(out, out[:, :, :1].expand_as(out), rtol=1e-5, atol=1e-6)


def test_inflation_interpolates_in_space_and_says_what_it_drops(caplog: pytest.LogCaptureFixture) -> None:
    image = export_official(_build(_IMAGE))
    larger = inflate_image_weights(image, uvit.UViTConfig((2, 16, 16), width=24, depth=2, heads=2))
    assert larger["pos_embed"].shape == (1, 1 + 2 * 64, 24)
    assert larger["pos_embed"][:, :1].equal(image["pos_embed"][:, :1])
    rope = _build(_IMAGE, positions="rope", qk_norm=True, input_size=(3, 8, 8))
    assert isinstance(rope, uvit.UViT)
    with caplog.at_level(logging.INFO, logger="uvit.weights"):
        load_official(rope, inflate_image_weights(image, rope.config))
    assert "pos_embed is dropped" in caplog.text
    assert "q_norm" in caplog.text
