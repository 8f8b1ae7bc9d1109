"""What is saved, and what one start of the worker does."""

from dataclasses import dataclass, field

from uvit import UViTConfig

__all__ = ["CONTESTANTS", "OURS", "PLAIN", "Job", "Workload"]

PLAIN, OURS = "plain PyTorch", "dtrain"
CONTESTANTS = (PLAIN, OURS)


@dataclass(frozen=True)
class Workload:
    """The model whose weights, moments and averages are saved, and the batch of a rank's step."""

    width: int = field(default=512, metadata={"help": "features of a token"})
    depth: int = field(default=6, metadata={"help": "in and out blocks; there is one more"})
    batch: int = field(default=4, metadata={"help": "samples of a rank, of 17 tokens"})

    @property
    def config(self) -> UViTConfig:
        """Of the model; raises ValueError where the sizes do not fit each other."""
        return UViTConfig(
            input_size=(1, 8, 8),
            width=self.width,
            depth=self.depth,
            heads=max(1, self.width // 64),
            final_conv=False,
        )


@dataclass(frozen=True)
class Job:
    """What one start of `worker` measures.

    Args:
        workload: what is saved.
        rounds: that are measured, after one of warm-up.
        checkpoints: folder to save to; made and emptied again.
        out: folder of the results, rank0.json and so on.
    """

    workload: Workload
    rounds: int
    checkpoints: str
    out: str

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds = {self.rounds}: must be 1 or more")
