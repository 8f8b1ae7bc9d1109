"""What the tests of the fused norm share: inputs by name, and everything that a call gives."""

from typing import Any

import torch
from torch import Tensor

from dtrain.kernels.norm import add_norm, norm
from tests.kernels.attention_checks import draw

# Error over norm: one rounding of the output, and for gradients that of the s that was kept.
BOUND = {torch.float16: 5e-4, torch.float32: 5e-7}
OF_SAMPLES = ("gate", "scale", "shift")
EVERYTHING = ("branch", "gate", "weight", "bias", "scale", "shift")


def draw_given(
    shape: tuple[int, ...],
    names: tuple[str, ...] = EVERYTHING,
    dtype: torch.dtype = torch.float32,
    branch_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """x (B, ..., D) and what is named; gate, scale and shift are chunks of one (B, 3D)."""
    branch_dtype = branch_dtype or dtype
    projected = draw(shape[0], 3 * shape[-1], seed=3, dtype=branch_dtype)
    given = {
        "x": 1 + draw(*shape, dtype=dtype),
        "branch": draw(*shape, seed=1, dtype=branch_dtype),
        "weight": 1 + 0.3 * draw(shape[-1], seed=2, dtype=dtype),
        "bias": draw(shape[-1], seed=4, dtype=dtype),
        **dict(zip(OF_SAMPLES, projected.chunk(3, dim=1), strict=True)),
    }
    return {name: value for name, value in given.items() if name in ("x", *names)}


def draw_grads(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """By s and y in their dtypes."""
    x = given["x"]
    dtype = torch.promote_types(x.dtype, given["branch"].dtype) if "branch" in given else x.dtype
    grads = {name: draw(*x.shape, seed=seed, dtype=dtype) for name, seed in (("s", 7), ("y", 8))}
    return grads if "branch" in given else {"y": grads["y"]}


def evaluate(given: dict[str, Tensor], grads: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """s and y, and the gradients by all that is given, from those of the outputs that have one."""
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    found = add_norm(**leaves, **options) if "branch" in given else norm(**leaves, **options)
    outputs = dict(zip(("s", "y"), found, strict=True)) if "branch" in given else {"y": found}
    of_outputs = [outputs[name] for name in grads]
    by_leaves = torch.autograd.grad(
        of_outputs, list(leaves.values()), list(grads.values()), allow_unused=True
    )
    return outputs | {f"grad_{name}": g for name, g in zip(leaves, by_leaves, strict=True) if g is not None}


def exact(given: dict[str, Tensor], grads: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The same by the reference in fp64."""
    return evaluate(in_double(given), in_double(grads), **options | {"backend": "reference", "dtype": None})


def in_double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in tensors.items()}


def assert_exact(given: dict[str, Tensor], grads: dict[str, Tensor] | None = None, **options: Any) -> None:
    """Outputs and gradients agree with fp64 as far as their dtype reaches, and have the dtype they should."""
    grads = draw_grads(given) if grads is None else grads
    ours = evaluate(given, grads, backend="triton", **options)
    truths = exact(given, grads, **options)
    assert ours.keys() == truths.keys()
    for name, truth in truths.items():
        mine = ours[name]
        error = (mine.double() - truth).norm() / truth.norm().clamp(min=1e-30)
        assert error < BOUND[mine.dtype], f"{name}: {error:.1e}"
        if name.startswith("grad_"):
            assert mine.dtype == given[name.removeprefix("grad_")].dtype, name


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert {name: x.equal(theirs[name]) for name, x in ours.items()} == dict.fromkeys(theirs, True)
