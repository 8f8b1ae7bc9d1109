"""What only a GPU can show of attention: bf16 at real sizes, races, offsets past 2^31, graphs, training.

With DTRAIN_REHEARSAL=1 and TRITON_INTERPRET=1 in the environment the same tests run on the CPU at tiny sizes,
in fp16, which shows that they can run, and no more.

Shapes: B batch, H heads, M queries, N keys, D width of a head.
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import uvit
from benchmarks.attention import exact
from dtrain.kernels import attention_backward, attention_forward
from dtrain.kernels.attention import Backend, attention
from dtrain.kernels.block_mask import BlockMask, block_causal, packed, tile_windows
from dtrain.kernels.launch import can_launch
from tests.launch import ROOT

T = TypeVar("T")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16

pytestmark = [
    pytest.mark.gpu(rehearsal=True),
    pytest.mark.skipif(
        not can_launch(torch.device(DEVICE)), reason="needs a GPU and Triton, or its interpreter"
    ),
]

FORMS = pytest.mark.parametrize("form", ["split", "fused"])
triton = functools.partial(attention, backend="triton")


def size(real: T, rehearsed: T) -> T:
    return real if DEVICE == "cuda" else rehearsed


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32).to(DTYPE)


def draw_packed(batch: int, tokens: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, D), views of one (B, N, 3, H, D)."""
    q, k, v = draw(batch, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    return q, k, v


def launch(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: attention_backward.Form,
    mask: BlockMask | None = None,
) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of the kernels."""
    scale = q.shape[-1] ** -0.5
    out, lse = attention_forward.forward(q, k, v, scale, mask)
    grads = attention_backward.backward(grad, None, q, k, v, out, lse, scale, mask, form)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def truth(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> dict[str, Tensor]:
    """The same in fp64."""
    values = *exact.forward(q, k, v, allowed), *exact.gradients(grad, q, k, v, allowed)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), values, strict=True))


def differentiated(function: Callable[..., Tensor], grad: Tensor, *qkv: Tensor) -> dict[str, Tensor]:
    """out, dq, dk, dv by autograd."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = function(*leaves)
    return dict(
        zip(("out", "dq", "dk", "dv"), (out.detach(), *torch.autograd.grad(out, leaves, grad)), strict=True)
    )


def plain(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Every step rounded to the inputs' dtype."""
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v


def assert_as_exact(ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """At most twice their error, in norm and at the worst element."""
    for name, other in theirs.items():
        mine, its = ours[name].double() - exact[name], other.double() - exact[name]
        assert mine.norm() <= 2 * its.norm(), f"{name}: {mine.norm():.3e}, theirs {its.norm():.3e}"
        assert mine.abs().max() <= 2 * its.abs().max(), f"{name}: worst {mine.abs().max():.3e}"


def assert_lse(ours: Tensor, exact: Tensor) -> None:
    assert ours.dtype == torch.float32
    assert ours.isinf().equal(exact.isinf())
    assert (ours - exact).nan_to_num(0.0, 0.0, 0.0).abs().max() < size(1e-4, 2e-3)


@FORMS
@pytest.mark.parametrize("head_dim", size([64, 72, 96, 128], [72]))
@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    size([(1, 4099, 3967), (4, 2048, 2048), (2, 8191, 8191)], [(1, 35, 41), (2, 32, 32), (1, 33, 33)]),
)
def test_error_is_at_most_twice_pytorchs(
    batch: int, queries: int, keys: int, head_dim: int, form: attention_backward.Form
) -> None:
    heads = size(4, 1)
    if queries == keys:
        q, k, v = draw_packed(batch, queries, heads, head_dim)
    else:
        q, k, v = (draw(batch, heads, n, head_dim, seed=i) for i, n in enumerate((queries, keys, keys)))
    grad = draw(batch, queries, heads, head_dim, seed=9).transpose(1, 2)
    ours, exactly = launch(grad, q, k, v, form), truth(grad, q, k, v)
    assert_as_exact(ours, differentiated(plain, grad, q, k, v), exactly)
    assert_lse(ours["lse"], exactly["lse"])


def masks() -> Iterator[tuple[str, BlockMask]]:
    yield "clips", packed(size([0, 1000, 1000, 5003, 8191], [0, 7, 7, 30, 41]))
    yield (
        "clips without keys",
        packed(size([0, 900, 2000, 4096], [0, 9, 20, 40]), size([0, 1500, 1500, 3000], [0, 15, 15, 30])),
    )
    yield "frames", block_causal(size(13, 3), size(577, 17), prefix=size(78, 5))
    grid, tile, window = size(((12, 24, 20), (4, 8, 4), (12, 24, 12)), ((3, 4, 5), (2, 4, 2), (2, 4, 4)))
    yield "windows", tile_windows(grid, tile, window, prefix=size(78, 3))


@FORMS
@pytest.mark.parametrize("head_dim", size([64, 72, 128], [72]))
@pytest.mark.parametrize("mask", [pytest.param(mask, id=name) for name, mask in masks()])
def test_masks(mask: BlockMask, head_dim: int, form: attention_backward.Form) -> None:
    mask = mask.to(DEVICE)
    (queries, keys), heads = mask.shape, size(3, 1)
    q, k, v = (draw(1, heads, n, head_dim, seed=i) for i, n in enumerate((queries, keys, keys)))
    grad = draw(1, heads, queries, head_dim, seed=9)
    allowed = mask.dense()
    ours, exactly = launch(grad, q, k, v, form, mask), truth(grad, q, k, v, allowed)
    seeing = allowed.any(1)  # a softmax over nothing is NaN in PyTorch
    theirs = differentiated(
        lambda q, k, v: plain(q[:, :, seeing], k, v, allowed[seeing]), grad[:, :, seeing], q, k, v
    )
    for name in ("out", "dq"):
        assert not ours[name][:, :, ~seeing].any(), name
    comparable = {name: x[:, :, seeing] if name == "out" else x for name, x in ours.items()}
    assert_as_exact(comparable, theirs, {**exactly, "out": exactly["out"][:, :, seeing]})
    assert_lse(ours["lse"], exactly["lse"])


@pytest.mark.parametrize("head_dim", size([64, 72, 128], [72]))
def test_the_split_backward_repeats_bit_by_bit(head_dim: int) -> None:
    q, k, v = draw_packed(size(4, 1), size(4099, 35), size(8, 1), head_dim)
    grad = draw(*q.shape, seed=9)
    first = launch(grad, q, k, v, "split")
    for _ in range(size(19, 1)):
        assert all(x.equal(first[name]) for name, x in launch(grad, q, k, v, "split").items())


@FORMS
def test_more_than_31_bits_of_elements(form: attention_backward.Form) -> None:
    """Outputs and gradients alone have more than 2^31, the packed qkv three times as many."""
    batch, tokens, heads, head_dim = size((260, 4096, 16, 128), (3, 20, 1, 64))
    packed_qkv = torch.empty(batch, tokens, 3, heads, head_dim, device=DEVICE, dtype=DTYPE)
    grad = torch.empty(batch, tokens, heads, head_dim, device=DEVICE, dtype=DTYPE)
    for i in range(batch):
        packed_qkv[i].normal_()
        grad[i].normal_()
    assert DEVICE == "cpu" or grad.numel() > 2**31
    q, k, v = packed_qkv.permute(2, 0, 3, 1, 4)
    grad = grad.transpose(1, 2)
    whole = launch(grad, q, k, v, form)
    for i in (0, batch // 2, batch - 1):
        one = slice(i, i + 1)
        alone = launch(grad[one], q[one], k[one], v[one], form)
        for name, x in alone.items():
            if form == "split" or name != "dq":  # atomics add in any order
                assert x.equal(whole[name][one]), name
            else:
                assert (x - whole[name][one]).float().norm() <= 1e-2 * x.float().norm()


_SANITIZED = """
import torch
from dtrain.kernels import attention_backward as b, attention_forward as f
from dtrain.kernels.block_mask import packed
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float16)
for head_dim, tokens in ((64, 130), (72, 97)):
    q, k, v = torch.randn(1, tokens, 3, 2, head_dim).to(device, dtype).permute(2, 0, 3, 1, 4)
    for mask in (None, packed((0, 33, tokens)).to(device)):
        out, lse = f.forward(q, k, v, 0.1, mask)
        for form in ("split", "fused"):
            grads = b.backward(out, None, q, k, v, out, lse, 0.1, mask, form)
            assert all(g.isfinite().all() for g in grads)
print("all launched")
"""


@pytest.mark.parametrize("tool", size(["memcheck", "racecheck"], ["none"]))
def test_compute_sanitizer_finds_nothing(tool: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SANITIZED]
    if DEVICE == "cuda":
        command = [_sanitizer(), "--tool", tool, "--error-exitcode", "99", *command]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    said = (done.stdout + done.stderr)[-4000:]
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, said
    assert "all launched" in said


def _sanitizer() -> str:
    found = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    return found


@pytest.fixture
def deterministic() -> Iterator[None]:
    """The split backward, whatever the tables say."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_torch_compile_sees_an_operator() -> None:
    q, k, v = draw_packed(size(2, 1), size(1000, 35), size(4, 1), 72)
    grad = draw(*q.shape, seed=9)
    compiled = torch.compile(
        lambda q, k, v: triton(q * 2, k, v) + 1, fullgraph=True, backend=size("inductor", "aot_eager")
    )
    eager = differentiated(lambda q, k, v: triton(q * 2, k, v) + 1, grad, q, k, v)
    for name, x in differentiated(compiled, grad, q, k, v).items():
        assert x.equal(eager[name]), name


@pytest.mark.usefixtures("deterministic")
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs have no counterpart on the CPU")
def test_cuda_graphs_replay_both_ways() -> None:
    q, k, v = (x.clone().requires_grad_() for x in draw_packed(2, 1000, 4, 72))
    grad = draw(*q.shape, seed=9)
    graphed = torch.cuda.make_graphed_callables(lambda q, k, v: triton(q, k, v), (q, k, v))
    for seed in range(3):
        fresh = [draw(*q.shape, seed=seed + 10 * i) for i in range(3)]
        eager = differentiated(triton, grad, *fresh)
        for name, x in differentiated(graphed, grad, *fresh).items():
            assert x.equal(eager[name]), name


def test_training_steps_lose_as_with_pytorchs_attention() -> None:
    losses = {backend: _train(backend) for backend in ("triton", "sdpa")}
    assert losses["sdpa"][-1] < losses["sdpa"][0]
    assert losses["triton"][0] == pytest.approx(losses["sdpa"][0], rel=1e-3)
    assert losses["triton"] == pytest.approx(losses["sdpa"], rel=2e-2)  # AdamW spreads the rounding


def _train(backend: Backend) -> list[float]:
    """Losses of a U-ViT under autocast that learns to remove noise from one batch."""
    torch.manual_seed(0)
    width, side = size((512, 32), (64, 8))
    model = uvit.build(
        "cifar10_s2", width=width, depth=size(4, 2), heads=size(8, 1), input_size=(1, side, side)
    )
    model.to(DEVICE)
    for module in model.modules():
        if isinstance(module, uvit.layers.Attention):
            module.attention_backend = backend
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    noise = draw(size(16, 2), 3, side, side).float()
    times = torch.linspace(0, 999, len(noise), device=DEVICE)
    losses = []
    for _ in range(size(10, 2)):
        with torch.autocast(DEVICE, dtype=DTYPE):
            loss = F.mse_loss(model(noise * 0.7, times).float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
