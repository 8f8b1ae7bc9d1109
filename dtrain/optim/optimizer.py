"""AdamW with parameter groups, and the learning-rate schedule.

The schedule is a pure function of the step, so that it needs no state and a resumed run may change it.
AdamW: Loshchilov & Hutter, https://arxiv.org/abs/1711.05101
"""

import logging
import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dtrain.optim.adamw import AdamW, Moments, has_codes
from dtrain.sharding.precision import Precision

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParamGroup:
    """Overrides for the parameters whose name matches."""

    match: str = field(default="*", metadata={"help": "Glob over parameter names, such as '*.norm*.weight'."})
    lr_scale: float = field(default=1.0, metadata={"help": "Multiplies the learning rate."})
    weight_decay: float | None = field(default=None, metadata={"help": "Replaces optim.weight_decay."})


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule; the defaults are U-ViT's for ImageNet 256."""

    lr: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    betas: tuple[float, float] = field(
        default=(0.99, 0.99), metadata={"help": "Decay of the first and second moment, each in [0, 1)."}
    )
    eps: float = field(default=1e-8, metadata={"help": "Added to the denominator."})
    weight_decay: float = field(default=0.03, metadata={"help": "Decoupled weight decay."})
    groups: tuple[ParamGroup, ...] = field(
        default=(), metadata={"help": "Per-parameter overrides; the first group whose glob matches counts."}
    )
    schedule: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata={"help": "Shape of the decay from the peak after warm-up."}
    )
    warmup_steps: int = field(default=5000, metadata={"help": "Steps of linear warm-up from zero."})
    final_ratio: float = field(
        default=0.0, metadata={"help": "Last learning rate over the peak, for linear and cosine."}
    )
    weights: Precision = field(
        default="fp32",
        metadata={
            "help": "How shards of weights are kept: fp32, or bf16 with no copy in fp32, rounded by chance. "
            "Saves 2 bytes a parameter, and 2 of its gradient, which micro-batches then add up in bf16 "
            "unless shard.reduce_each_micro_batch = false."
        },
    )
    moments: Moments = field(
        default="fp32",
        metadata={
            "help": "How AdamW keeps its moments: 8 bytes a parameter, or 8bit: 2, rounded by chance. A run "
            "cannot change it."
        },
    )
    clip_norm: float = field(
        default=0.0, metadata={"help": "Clip the global gradient norm to this value; 0 only measures it."}
    )

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr = {self.lr}: must be greater than 0.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas = {self.betas}: each must be in [0, 1).")
        for name in ("weight_decay", "warmup_steps", "clip_norm", "final_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} = {getattr(self, name)}: must be 0 or more.")


def lr_multiplier(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of update number `step` (from 0) over the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    falling = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_ratio + (1 - config.final_ratio) * falling


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total_steps: int
) -> float:
    """Set every group's learning rate for update number `step`; returns the unscaled one."""
    lr = config.lr * lr_multiplier(config, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def build_optimizer(model: nn.Module, config: OptimConfig, seed: int = 0) -> AdamW:
    """AdamW over the trainable parameters, grouped by `config.groups`.

    Args:
        model: sharded or not.
        config: of the optimizer.
        seed: of the run.
    Raises:
        ValueError: a group matches no parameter.
    """
    rules = (*config.groups, ParamGroup())
    members: list[list[nn.Parameter]] = [[] for _ in rules]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[next(i for i, rule in enumerate(rules) if fnmatchcase(name, rule.match))].append(
                parameter
            )
    for rule, parameters in zip(config.groups, members, strict=False):
        if not parameters:
            raise ValueError(
                f"optim.groups: match = {rule.match!r} matches no parameter that an earlier group left."
            )
    groups = [_group(config, rule, p) for rule, p in zip(rules, members, strict=True) if p]
    if config.moments == "8bit":
        _say_what_stays_fp32(model)
    _say_what_is_slow(model, config)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, moments=config.moments, seed=seed)


def _say_what_stays_fp32(model: nn.Module) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    small = [name for name, p in trained.items() if not has_codes(p, "8bit")]
    if small:
        elements = sum(trained[name].numel() for name in small)
        log.info(
            'optim.moments = "8bit": %d of %d parameters, %s elements in all, are too small for it or have '
            "one row, and keep moments in fp32: %s",
            len(small), len(trained), f"{elements:,}", ", ".join(small),
        )  # fmt: skip


def _say_what_is_slow(model: nn.Module, config: OptimConfig) -> None:
    offloaded = any(
        p.device_mesh.device_type != p.device.type for p in model.parameters() if isinstance(p, DTensor)
    )
    if offloaded and (config.moments, config.weights) != ("fp32", "fp32"):
        log.warning(
            'optim.moments = "%s", optim.weights = "%s" with shard.cpu_offload: rounding by chance takes '
            "about 30 times as long on a CPU as fp32 throughout.",
            config.moments, config.weights,
        )  # fmt: skip


def _group(config: OptimConfig, rule: ParamGroup, parameters: list[nn.Parameter]) -> dict[str, Any]:
    decay = config.weight_decay if rule.weight_decay is None else rule.weight_decay
    return {"params": parameters, "weight_decay": decay, "lr_scale": rule.lr_scale}
