"""A folder of videos as a data set.

The folder is searched once: every file is opened, its first frame decoded and its length read, so that a file
which cannot be used is named before training and not in the middle of a night. What breaks later all the same
(a file that is damaged further in) is replaced by the next clip of the epoch and reported with the sample.

Captions follow the Hugging Face folder layout: https://huggingface.co/docs/datasets/video_dataset

Shapes: C colours (3), T frames, H height, W width.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dtrain.recipe import Clip
from dtrain.rng import derive_seed
from uvit.clips import DataConfig, item_of, to_video
from uvit.decode import Timeline, VideoError, probe, read_clip

logger = logging.getLogger(__name__)

_METADATA = "metadata.jsonl"
_KEPT_BYTES = 64 * 2**20
# Files that people keep beside videos: descriptions of them, not videos that cannot be read.
_SIDE_CARS = {".txt", ".jsonl", ".json", ".csv", ".tsv", ".md", ".srt", ".vtt"}


@dataclass(frozen=True)
class Entry:
    """One usable file: path relative to the folder (with /), caption, class index, timeline."""

    source: str
    caption: str
    label: int
    timeline: Timeline


@dataclass(frozen=True)
class VideoIndex:
    """What a search of the folder found; `skipped` holds (source, reason)."""

    root: Path
    entries: tuple[Entry, ...]
    skipped: tuple[tuple[str, str], ...]
    classes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of the usable files' names, captions, classes, lengths and sizes; not of pixels."""
        return _hash(self.entries, self.classes)


def scan(config: DataConfig, *, progress: bool = False) -> VideoIndex:
    """Search `config.path` for files that can give a clip; log what was skipped and what has no caption.

    Raises ValueError if the folder does not exist or nothing in it can be used.
    """
    root = Path(config.path).expanduser().resolve()
    if not root.is_dir():
        raise ValueError(f"path = {config.path!r}: not a folder; name one that holds videos")
    sources = sorted(_sources(root))
    found = dict(zip(sources, _probe_all(config, root, sources, progress), strict=True))
    skipped = tuple((source, reason) for source, reason in found.items() if isinstance(reason, str))
    if len(skipped) == len(sources):
        raise ValueError(
            f"path = {config.path!r}: nothing usable among {len(sources)} files; "
            + ("; ".join(f"{s}: {reason}" for s, reason in skipped[:5]) or "it needs videos or images")
        )
    classes = tuple(sorted({_class_folder(source) for source in sources}))
    captions = _captions(config, root, sources)
    entries = tuple(
        Entry(source, captions.get(source, ""), classes.index(_class_folder(source)), timeline)
        for source, timeline in found.items()
        if isinstance(timeline, Timeline)
    )
    _report(config, entries, skipped)
    return VideoIndex(root, entries, skipped, classes)


class VideoFolder:
    """Clips of a folder of videos, see uvit.clips.ClipDataset."""

    def __init__(self, config: DataConfig, seed: int, *, progress: bool = False) -> None:
        self.config = config
        self.seed = seed
        self.index = scan(config, progress=progress)
        self.classes = self.index.classes
        self.skipped = self.index.skipped
        self.fingerprint = _hash(self.index.fingerprint, replace(config, path=".", workers=0), seed)
        # (entry, start frame), None where the start is drawn at every visit
        self._items: list[tuple[Entry, int | None]] = [
            (entry, start) for entry in self.index.entries for start in self._fixed_starts(entry)
        ][: config.limit or None]
        # Clips that come again as they are, in each process that reads: few enough are decoded only once.
        size_bytes = len(self._items) * config.frames * config.height * config.width * 3
        fixed = config.clips_per_video > 0 and config.crop == "center"
        self._keep = fixed and size_bytes <= _KEPT_BYTES
        self._kept: dict[tuple[str, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read the clip that a global sample index means; ValueError once no file can be read any more."""
        broken: dict[str, str] = {}
        for ahead in range(len(self._items)):
            entry, start = self._items[item_of(index, len(self._items), self.seed, ahead)]
            if entry.source in broken:
                continue
            try:
                frames_THW3 = self._read(entry, self._start(entry, index) if start is None else start, index)
            except VideoError as error:
                broken[entry.source] = str(error)
                continue
            return {
                "video": to_video(frames_THW3),
                "index": index,
                "caption": entry.caption,
                "class": entry.label,
                "source": entry.source,
                "skipped": list(broken.items()),
            }
        raise ValueError(f"path = {self.config.path!r}: no file can be read any more: {broken}")

    def clips(self, count: int) -> list[Clip]:
        """The first `count` clips in the order of the files; VideoError if one became unreadable."""
        return [
            Clip(self._read(entry, start or 0), entry.caption, 1 / self._step_s(entry))
            for entry, start in self._items[:count]
        ]

    def _read(self, entry: Entry, start: int, index: int | None = None) -> Tensor:
        config = self.config
        times_s = entry.timeline.times(start, config.frames, self._step_s(entry))
        path = self.index.root / entry.source
        anchor = (0.5, 0.5)
        if config.crop == "random" and index is not None:
            anchor = (self._draw("crop down", index) / 2**63, self._draw("crop right", index) / 2**63)
        aspect = entry.timeline.pixel_aspect
        frames_T3HW = self._kept.get((entry.source, start))
        if frames_T3HW is None:
            frames_T3HW = read_clip(
                path, times_s, config.height, config.width, pixel_aspect=aspect, anchor=anchor
            )
            if self._keep:
                self._kept[entry.source, start] = frames_T3HW
        if config.flip and index is not None and self._draw("flip", index) % 2:
            frames_T3HW = frames_T3HW.flip(-1)
        return frames_T3HW.permute(0, 2, 3, 1)

    def _draw(self, purpose: str, index: int) -> int:
        return derive_seed(self.seed, purpose, index)

    def _start(self, entry: Entry, index: int) -> int:
        return self._draw("start", index) % _starts(self.config, entry.timeline)

    def _fixed_starts(self, entry: Entry) -> Sequence[int | None]:
        count = self.config.clips_per_video
        if count == 0:
            return [None]
        last = _starts(self.config, entry.timeline) - 1
        return sorted({round(i * last / max(1, count - 1)) for i in range(count)})

    def _step_s(self, entry: Entry) -> float:
        return _step_s(self.config, entry.timeline)


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _step_s(config: DataConfig, timeline: Timeline) -> float:
    return config.stride / (config.fps or timeline.rate)


def _starts(config: DataConfig, timeline: Timeline) -> int:
    return timeline.starts(config.frames, _step_s(config, timeline))


def _sources(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() not in _SIDE_CARS:
                yield (Path(folder) / name).relative_to(root).as_posix()


def _class_folder(source: str) -> str:
    return source.split("/", 1)[0] if "/" in source else ""


def _probe_all(config: DataConfig, root: Path, sources: list[str], progress: bool) -> list[Timeline | str]:
    def one(source: str) -> Timeline | str:
        try:
            timeline = probe(root / source)
        except VideoError as error:
            return str(error)
        if _starts(config, timeline):
            return timeline
        needed_s = (config.frames - 1) * _step_s(config, timeline)
        length_s = timeline.last_s - timeline.first_s
        return f"too short: {length_s:.2f} s; {config.frames} frames span {needed_s:.2f} s"

    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        found: Iterable[Timeline | str] = pool.map(one, sources)
        if progress:
            from rich.progress import track

            found = track(found, "Looking at the videos", total=len(sources))
        return list(found)


def _captions(config: DataConfig, root: Path, sources: list[str]) -> dict[str, str]:
    if config.captions == "none":
        return {}
    if config.captions == "folders":
        return {source: _class_folder(source).replace("_", " ") for source in sources}
    captions = {}
    if config.captions in ("auto", "files"):
        for source in sources:
            text = (root / source).with_suffix(".txt")
            if text.is_file():
                captions[source] = " ".join(text.read_text("utf-8", errors="replace").split())
    if config.captions in ("auto", "metadata"):
        for file in sorted(root.rglob(_METADATA)):
            captions.update(_read_metadata(root, file))
    return captions


def _read_metadata(root: Path, file: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row["text"] if "text" in row else row["caption"]
            source = (file.parent / name).relative_to(root).as_posix()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{file}, line {number}: {line[:80]!r}; a line is {{"file_name": "a.mp4", "text": "…"}}'
            ) from error
        yield source, str(caption)


def _report(config: DataConfig, entries: tuple[Entry, ...], skipped: tuple[tuple[str, str], ...]) -> None:
    for source, reason in skipped:
        logger.warning("skipped %s: %s", source, reason)
    small = sum(e.timeline.height < config.height or e.timeline.width < config.width for e in entries)
    if small:
        logger.warning("%d of %d files are smaller than the clip and are enlarged", small, len(entries))
    bare = sum(not e.caption for e in entries)
    if bare and config.captions != "none":
        logger.warning('%d of %d files have no caption: ""', bare, len(entries))
    logger.info("%d usable files, %d skipped", len(entries), len(skipped))
