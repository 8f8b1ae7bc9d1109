"""The recipe that trains a U-ViT on video clips: `recipe = "uvit.recipe:video"`.

Its tables are `[model]`, `[objective]`, `[data]`, `[text]` and `[sample]`. Clips are pixels in [-1, 1],
(B, 3, T, H, W); what the network is told besides the time follows from `model.condition`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import uvit
from dtrain.config import override
from dtrain.data import loader
from dtrain.dist import environment_rank
from dtrain.recipe import Batch, Clip, DataState, Recipe, SampleRequest
from dtrain.rng import SampleRNG
from dtrain.sharding.init import fill_parameters
from uvit.captions import text_encoder
from uvit.clips import ClipDataset, DataConfig, collate, to_frames
from uvit.config import UViTConfig, patch_grid
from uvit.dataset import open_dataset
from uvit.diffusion import DiffusionConfig, NoisePrediction
from uvit.flow import FlowConfig, RectifiedFlow
from uvit.guidance import drop_condition, drop_mask
from uvit.media import compare, contact_sheet, nearest, save_clips
from uvit.sample import Objective, SampleConfig, generate

logger = logging.getLogger(__name__)

_REFERENCES = 64
"""Training clips that samples are held against."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the network learns to predict."""

    kind: Literal["flow", "noise"] = field(
        default="flow", metadata={"help": "flow: rectified flow; noise: the noise of a VP schedule (U-ViT)."}
    )
    drop_condition: float = field(
        default=0.1,
        metadata={"help": "Probability that a sample's condition is dropped, which guidance needs."},
    )
    flow: FlowConfig = field(default_factory=FlowConfig)
    noise: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.drop_condition < 1:
            raise ValueError(f"drop_condition = {self.drop_condition}: must be in [0, 1).")

    def build(self) -> Objective:
        """The objective that `kind` names."""
        return RectifiedFlow(self.flow) if self.kind == "flow" else NoisePrediction(self.noise)


@dataclass(frozen=True)
class TextConfig:
    """How captions become numbers, for condition = "text"."""

    encoder: str = field(
        default="bytes",
        metadata={"help": 'bytes: built in, knows spelling only; or "module:function" of a text model.'},
    )


@dataclass(frozen=True)
class SampleTable(SampleConfig):
    """How clips are generated, and of what."""

    prompts: tuple[str, ...] = field(
        default=(), metadata={"help": "Captions to sample in turn; the first training captions when empty."}
    )
    labels: tuple[int, ...] = field(
        default=(), metadata={"help": "Classes to sample in turn; 0, 1, 2, … when empty."}
    )


@dataclass(frozen=True)
class VideoConfig:
    """The tables of `uvit.recipe:video`."""

    model: UViTConfig = field(default_factory=UViTConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(kind="shapes"))
    text: TextConfig = field(default_factory=TextConfig)
    sample: SampleTable = field(default_factory=SampleTable)

    def __post_init__(self) -> None:
        if self.model.in_channels != 3:
            raise ValueError(f"model.in_channels = {self.model.in_channels}: clips are RGB, so it must be 3.")
        try:
            patch_grid(self.size, self.model.patch_size)
        except ValueError as error:
            raise ValueError(f"data.frames, data.height, data.width and model.patch_size: {error}") from None
        guided = self.sample.guidance > 0 and self.model.condition != "none"
        if guided and not self.objective.drop_condition:
            raise ValueError(
                f"sample.guidance = {self.sample.guidance} needs objective.drop_condition > 0 (0.1 is "
                "usual): the network must have seen samples without a condition."
            )

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip."""
        return self.data.frames, self.data.height, self.data.width


def video(config: VideoConfig) -> Recipe:
    """A U-ViT trained on a folder of videos or on generated shapes."""
    run = _VideoRecipe(config)
    return Recipe(
        build=run.build,
        init=run.init,
        loss=run.loss,
        data=run.data,
        flops=run.flops,
        tokens=run.tokens,
        sample=run.sample,
        save_clips=save_clips,
        score=run.score,
        fingerprint=lambda seed: run.dataset(seed).fingerprint,
    )


class _VideoRecipe:
    """The callables of `video`, around one config."""

    def __init__(self, config: VideoConfig) -> None:
        self.config = config
        self.objective = config.objective.build()
        self.tokens_per_sample = uvit.token_count(config.model, *config.size)
        self.encode = text_encoder(config.text.encoder, config.model.text_tokens, config.model.text_dim)
        # The folder is searched once per seed, however many callables ask for it.
        self.dataset: Callable[[int], ClipDataset] = cache(partial(_open_checked, config))

    def build(self) -> nn.Module:
        return uvit.build(self.config.model)

    def init(self, model: nn.Module) -> None:
        fill_parameters(model, uvit.initializer(model))

    def tokens(self, batch: Batch) -> int:
        return self.tokens_per_sample * len(batch["index"])

    def flops(self, batch: Batch) -> int:
        return uvit.forward_flops(self.config.model, len(batch["index"]), *self.config.size)

    def data(self, rank: int, world: int, state: DataState) -> Iterator[Batch]:
        dataset = self.dataset(state.seed)
        batches = loader(dataset, rank, world, state, workers=self.config.data.workers, collate=collate)
        found_before = list(dataset.skipped)
        for batch in batches:
            yield {**batch, "skipped": [*found_before, *batch["skipped"]]}
            found_before = []

    def loss(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Tensor:
        video_BCTHW = batch["video"]
        dropped = drop_mask(rng, self.config.objective.drop_condition)
        null = self._null()
        condition = {
            name: drop_condition(value.to(video_BCTHW.device), null[name], dropped)
            for name, value in self._condition(batch["caption"], batch["class"]).items()
        }
        return self.objective.loss(model, video_BCTHW, rng, tokens=self.tokens_per_sample, **condition)

    def sample(self, model: nn.Module, request: SampleRequest) -> list[Clip]:
        table = override(self.config.sample, request.options, "sampling options")
        items = range(request.first, request.first + request.count)
        captions, labels = self._asked(table, items, request.seed)
        device = request.device or next(model.parameters()).device
        rng = SampleRNG(request.seed, items, device)
        condition = self._condition(captions, torch.tensor(labels))
        videos = generate(
            self.objective,
            model,
            rng.normal("sample", (3, *self.config.size)),
            table,
            tokens=self.tokens_per_sample,
            null=self._null(),
            progress=request.progress,
            **{name: value.to(device) for name, value in condition.items()},
        )
        fps = (self.config.data.fps or 8.0) / self.config.data.stride
        return [Clip(to_frames(v), caption, fps) for v, caption in zip(videos, captions, strict=True)]

    def score(self, clips: Sequence[Clip], seed: int, folder: Path) -> Mapping[str, float]:
        """Mean PSNR in dB against the nearest training clips; draws both side by side."""
        references = self.dataset(seed).clips(_REFERENCES)
        contact_sheet(compare(clips, references), folder / "nearest_clips.png")
        return {"psnr_db": sum(nearest(clip, references)[1] for clip in clips) / len(clips)}

    def _condition(self, captions: Sequence[str], labels: Tensor) -> dict[str, Tensor]:
        if self.config.model.condition == "class":
            return {"y": labels}
        if self.config.model.condition == "text":
            return {"context": self.encode(list(captions))}
        return {}

    def _null(self) -> dict[str, Tensor]:
        null_label = torch.tensor([self.config.model.num_classes - 1])
        return {name: value[0] for name, value in self._condition([""], null_label).items()}

    def _asked(self, table: SampleTable, items: range, seed: int) -> tuple[list[str], list[int]]:
        """Caption and label of each sample."""
        condition = self.config.model.condition
        if condition == "class":
            names = self.dataset(seed).classes
            labels = [(table.labels or range(len(names)))[i % len(table.labels or names)] for i in items]
            return [names[label] for label in labels], labels
        if condition == "text":
            prompts = table.prompts or [clip.caption for clip in self.dataset(seed).clips(_REFERENCES)]
            return [prompts[i % len(prompts)] for i in items], [0] * len(items)
        return [f"sample {i}" for i in items], [0] * len(items)


def _open_checked(config: VideoConfig, seed: int) -> ClipDataset:
    try:
        dataset = open_dataset(config.data, seed, progress=environment_rank() == 0)
    except ValueError as error:
        raise ValueError(f"data.{error}") from None
    wanted = len(dataset.classes) + 1
    if config.model.condition == "class" and config.model.num_classes < wanted:
        raise ValueError(
            f"model.num_classes = {config.model.num_classes}: the data has {wanted - 1} classes, and "
            f"guidance needs a null label besides: set it to {wanted}."
        )
    return dataset
