"""Our models are the official ones: outputs, every gradient, parameter counts and state keys.

The fixtures were made with the official modules (github.com/baofff/U-ViT, github.com/thu-ml/unidiffuser).
UniDiffuser v1 has no fixture; it is checked against its equations written out plainly.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import uvit
from uvit.weights import export_official, from_official_config, load_official

_FIXTURES = Path(__file__).parents[1] / "fixtures"
_CASES = [("uvit", "uvit_class"), ("uvit_t2i", "uvit_text"), ("unidiffuser", "unidiffuser_v0")]

_PARAMETERS_M = {
    "cifar10_s2": 44.26,
    "celeba64_s4": 44.29,
    "imagenet64_m4": 130.94,
    "imagenet64_l4": 286.83,
    "imagenet256_l2": 286.76,
    "imagenet256_h2": 500.83,
    "imagenet512_l4": 286.86,
    "imagenet512_h4": 500.94,
    "mscoco_s2": 44.69,
    "mscoco_s2_deep": 58.35,
}


def _read(name: str) -> tuple[dict[str, object], dict[str, dict[str, Tensor]]]:
    groups: dict[str, dict[str, Tensor]] = {"state": {}, "input": {}, "output": {}, "grad": {}, "loss": {}}
    with safe_open(_FIXTURES / f"{name}.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118  (a file, not a dict)
            group, _, rest = key.partition(".")
            groups[group][rest] = file.get_tensor(key)
        return json.loads(file.metadata()["config"]), groups


def _error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def _loss(outputs: list[Tensor]) -> Tensor:
    return torch.stack([out.square().mean() for out in outputs]).sum()


@pytest.mark.parametrize(("kind", "name"), _CASES)
def test_outputs_and_every_gradient(kind: str, name: str) -> None:
    config, fixture = _read(name)
    model = from_official_config(kind, config)
    load_official(model, fixture["state"])
    result = model(**fixture["input"])
    outputs = list(result) if isinstance(result, tuple) else [result]
    assert len(outputs) == len(fixture["output"])
    for i, out in enumerate(outputs):
        assert _error(out, fixture["output"][str(i)]) < 1e-5
    loss = _loss(outputs)
    assert _error(loss, fixture["loss"][""]) < 1e-5
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == fixture["grad"].keys()
    errors = {name: _error(grad, fixture["grad"][name]) for name, grad in gradients.items()}
    assert {name: e for name, e in errors.items() if not e < 1e-5} == {}


@pytest.mark.parametrize(("kind", "name"), _CASES)
def test_load_then_export_is_the_identity(kind: str, name: str) -> None:
    config, fixture = _read(name)
    model = from_official_config(kind, config)
    load_official(model, fixture["state"])
    exported = export_official(model)
    assert exported.keys() == fixture["state"].keys()
    assert all(exported[key].equal(value) for key, value in fixture["state"].items())


@pytest.mark.parametrize("preset", _PARAMETERS_M)
def test_parameter_counts(preset: str) -> None:
    with torch.device("meta"):
        model = uvit.build(preset)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == _PARAMETERS_M[preset]


def test_parameter_counts_of_unidiffuser() -> None:
    with torch.device("meta"):
        models = [uvit.build("unidiffuser_v0"), uvit.build("unidiffuser_v1")]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert [round(count / 1e6, 1) for count in counts] == [952.5, 952.5]
    # The data-type table of two rows and one more position.
    assert counts[1] - counts[0] == 3 * 1536


def _plain_block(state: dict[str, Tensor], name: str, x: Tensor, heads: int, skip: Tensor | None) -> Tensor:
    def linear(key: str, value: Tensor) -> Tensor:
        return F.linear(value, state[f"{name}.{key}.weight"], state.get(f"{name}.{key}.bias"))

    def norm(key: str, value: Tensor) -> Tensor:
        return F.layer_norm(
            value, value.shape[-1:], state[f"{name}.{key}.weight"], state[f"{name}.{key}.bias"]
        )

    if skip is not None:
        x = norm("norm1", linear("skip_linear", torch.cat([x, skip], dim=-1)))
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in linear("attn.qkv", x).chunk(3, -1))
    scores = (q @ k.transpose(-2, -1)) / (q.shape[-1] ** 0.5)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = norm("norm2", x + linear("attn.proj", mixed))
    return norm("norm3", x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", x))))


def _plain_v1(state: dict[str, Tensor], inputs: dict[str, Tensor], native: int) -> list[Tensor]:
    """UniDiffuser v1 of depth 4, two heads, patch 2, in plain operations."""
    width = state["pos_embed"].shape[-1]

    def time(t: Tensor) -> Tensor:
        angles = t[:, None] * 10000.0 ** (-torch.arange(width // 2) / (width // 2))
        return torch.cat([angles.cos(), angles.sin()], dim=-1)[:, None]

    def linear(key: str, value: Tensor) -> Tensor:
        return F.linear(value, state[f"{key}.weight"], state[f"{key}.bias"])

    img = inputs["img"]
    patches = F.conv2d(img, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=2)
    grid = patches.shape[2:]
    kind = state["token_embedding.weight"][inputs["data_type"]][:, None]
    text, clip = linear("text_embed", inputs["text"]), linear("clip_img_embed", inputs["clip_img"])
    tokens = [time(inputs["t_img"]), time(inputs["t_text"]), kind, text, clip, patches.flatten(2).mT]
    extra = 3 + text.shape[1]
    table = state["pos_embed"]
    spatial = table[:, extra:].mT.unflatten(2, (native, native))
    spatial = F.interpolate(spatial, grid, mode="bilinear").flatten(2).mT
    x = torch.cat(tokens, dim=1)
    x = x + torch.cat([table[:, :2], state["pos_embed_token"], table[:, 2:extra], spatial], dim=1)
    first = _plain_block(state, "in_blocks.0", x, 2, None)
    second = _plain_block(state, "in_blocks.1", first, 2, None)
    x = _plain_block(state, "mid_block", second, 2, None)
    x = _plain_block(state, "out_blocks.0", x, 2, second)
    x = _plain_block(state, "out_blocks.1", x, 2, first)
    x = F.layer_norm(x, (width,), state["norm.weight"], state["norm.bias"])
    pixels = linear("decoder_pred", x[:, extra + 1 :])
    folded = F.fold(pixels.unflatten(-1, (4, -1)).transpose(2, 3).flatten(2).mT, img.shape[2:], 2, stride=2)
    return [folded, linear("clip_img_out", x[:, extra : extra + 1]), linear("text_out", x[:, 3:extra])]


@pytest.mark.parametrize("size", [8, 12])
def test_unidiffuser_v1_is_its_equations(size: int) -> None:
    config, fixture = _read("unidiffuser_v0")
    torch.manual_seed(0)
    model = from_official_config("unidiffuser_v1", config)
    nn.init.normal_(model.get_parameter("pos_embed_token"))
    inputs = fixture["input"] | {"img": torch.randn(2, 4, size, size), "data_type": torch.tensor([1, 0])}
    state = dict(model.named_parameters())
    ours, plain = model(**inputs), _plain_v1(state, inputs, native=4)
    for one, other in zip(ours, plain, strict=True):
        assert one.shape == other.shape
        assert _error(one, other) < 1e-5
    names, parameters = zip(*state.items(), strict=True)
    gradients = [torch.autograd.grad(_loss(list(outs)), parameters) for outs in (ours, plain)]
    errors = {name: _error(a, b) for name, a, b in zip(names, *gradients, strict=True)}
    assert {name: e for name, e in errors.items() if not e < 1e-5} == {}
