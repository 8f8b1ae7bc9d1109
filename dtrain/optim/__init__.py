"""The update of a step over sharded parameters: gradient norm, AdamW, its schedule, averages."""

from dtrain.optim.adamw import AdamW, Moments, has_codes
from dtrain.optim.ema import EMA, Average, EMAConfig, decay_at
from dtrain.optim.norm import gradient_norm
from dtrain.optim.optimizer import OptimConfig, ParamGroup, build_optimizer, lr_multiplier, set_learning_rate

__all__ = [
    "AdamW", "Average", "EMA", "EMAConfig", "Moments", "OptimConfig", "ParamGroup", "build_optimizer",
    "decay_at", "gradient_norm", "has_codes", "lr_multiplier", "set_learning_rate",
]  # fmt: skip
