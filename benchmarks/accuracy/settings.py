"""How large the trainings are: one small video U-ViT on generated clips, the same for every variant.

The sizes are chosen so that thousands of steps on four gloo ranks fit two cores. The learning rate is one at
which training is stable: at three times as much loss spikes make chaos of the smallest difference, and
rounding weights to bf16 alone moves the final loss of a seed by 2 %, here by 0.4 %. What a preset does to a
seed is then visible beside what another seed does. The whole model is one FSDP2 unit, gathered for the
forward and again for the backward as large blocks are.
"""

from dataclasses import dataclass, field

from dtrain.optim import EMAConfig, OptimConfig
from dtrain.recipe import Recipe
from uvit.clips import DataConfig
from uvit.config import UViTConfig
from uvit.flow import FlowConfig
from uvit.recipe import ObjectiveConfig, VideoConfig, video
from uvit.shapes import CLASSES

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Of all trainings of a study. A seed decides initial weights, order of clips, times and noises."""

    steps: int = field(default=2000, metadata={"help": "optimizer steps of a training"})
    ranks: int = field(default=4, metadata={"help": "ranks, one process each"})
    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"help": "one training each"})
    batch: int = field(default=8, metadata={"help": "samples of a step, over all ranks"})
    clips: int = field(default=4096, metadata={"help": "clips of the training set"})
    held_out: int = field(default=256, metadata={"help": "clips of the held-out set"})
    draws: int = field(default=8, metadata={"help": "fixed times and noises of a held-out clip"})
    points: int = field(default=20, metadata={"help": "held-out losses of a training, the last one included"})
    repeat: int = field(default=50, metadata={"help": "first steps that are trained twice; 0: none"})
    exact_below: int = field(default=2048, metadata={"help": "smaller parameters travel uncompressed"})
    frames: int = field(default=4, metadata={"help": "frames of a clip"})
    side: int = field(default=16, metadata={"help": "height and width of a clip, pixels"})
    width: int = field(default=96, metadata={"help": "features of a token"})
    depth: int = field(default=2, metadata={"help": "blocks, without the one in the middle"})
    heads: int = field(default=4, metadata={"help": "of attention"})
    lr: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    warmup: int = field(default=100, metadata={"help": "steps of warm-up"})
    ema: float = field(default=0.995, metadata={"help": "decay of the averages"})

    def __post_init__(self) -> None:
        if self.batch % self.ranks:
            raise ValueError(
                f"batch = {self.batch}: not a multiple of ranks = {self.ranks}; "
                f"{-(-self.batch // self.ranks) * self.ranks} would be"
            )
        if self.steps < max(1, self.points, self.repeat):
            raise ValueError(
                f"steps = {self.steps}: too few for points = {self.points} and repeat = {self.repeat}"
            )

    @property
    def data(self) -> DataConfig:
        """The clips."""
        return DataConfig(kind="shapes", frames=self.frames, height=self.side, width=self.side, workers=0)

    @property
    def optim(self) -> OptimConfig:
        """Warm-up, then a cosine to zero: a loss that has settled differs less between seeds."""
        return OptimConfig(
            lr=self.lr,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            schedule="cosine",
            warmup_steps=self.warmup,
            clip_norm=1.0,
        )

    @property
    def average(self) -> EMAConfig:
        """Of the parameters."""
        return EMAConfig(decay=self.ema)

    def recipe(self) -> Recipe:
        """The model and its loss, without data."""
        model = UViTConfig(
            input_size=(self.frames, self.side, self.side),
            patch_size=(2, 4, 4),
            in_channels=3,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            qk_norm=True,
            condition="class",
            num_classes=len(CLASSES) + 1,
            final_conv=False,
        )
        objective = ObjectiveConfig(drop_condition=0.0, flow=FlowConfig(predict="clean", shift=3.0))
        return video(VideoConfig(model=model, objective=objective, data=self.data))
