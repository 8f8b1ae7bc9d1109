"""Clips out of video files, exact to the frame.

A clip is a grid of times t_k = start + k·step, and its frame k is the one with the timestamp nearest to t_k.
On a file of constant frame rate that is every n-th frame; on one of variable rate it keeps the speed of the
motion. Decoding starts at a key frame before t_0, and where a seek lands is checked, so the frames are those
that decoding from the beginning gives.

Timestamps and seeking: https://ffmpeg.org/doxygen/trunk/group__lavf__decoding.html

Shapes: T frames, H height, W width.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import av
import torch
import torch.nn.functional as F
from av.stream import Disposition
from torch import Tensor

# How long before the first wanted frame to seek to. A demuxer may land late (its index lists decode times, or
# nothing at all): then a longer run-up is tried, and at last the whole file.
_RUN_UP_S = (0.5, 4.0, math.inf)
_BEYOND_THE_END_S = 1e9


class VideoError(ValueError):
    """A file that cannot give the frames that are asked of it; the message is one line without the path."""


@dataclass(frozen=True)
class Timeline:
    """What a probe learns of a file: seconds, frames per second, pixels, width : height of a pixel."""

    first_s: float
    last_s: float
    rate: float
    height: int
    width: int
    pixel_aspect: float

    def starts(self, frames: int, step_s: float) -> int:
        """At how many frames a clip of `frames` frames, `step_s` seconds apart, can start."""
        room_s = self.last_s - self.first_s - (frames - 1) * step_s
        # Containers round timestamps (WebM to 1 ms): a quarter of a frame is not a missing frame.
        return max(0, math.floor(room_s * self.rate + 0.25) + 1)

    def times(self, start: int, frames: int, step_s: float) -> list[float]:
        """Times in seconds of the clip's frames that starts at frame number `start`."""
        origin_s = self.first_s + start / self.rate
        return [origin_s + k * step_s for k in range(frames)]


def probe(path: Path) -> Timeline:
    """Open a video or image, decode its first frame and find the time of its last one.

    The last time is read from the packets at the end of the file, since headers only tell what was once
    written. Raises VideoError with the reason when the file is not a video, is damaged or holds no frame.
    """
    with _opened(path) as (container, stream):
        head = next(_frames(container, stream), None)
        if head is None:
            raise VideoError("no frame can be decoded")
        rate = _rate(stream)
        moved = _seek(container, stream, _BEYOND_THE_END_S)
        times_s = [head.time, *_packet_times_s(container, stream)]
        if moved and len(times_s) == 1:
            raise VideoError("cut short: the end that its header promises is not there")
        aspect = float(stream.sample_aspect_ratio or 1)
    return Timeline(head.time, max(times_s), rate, head.height, head.width, aspect)


def read_clip(
    path: Path,
    times_s: Sequence[float],
    height: int,
    width: int,
    *,
    pixel_aspect: float = 1.0,
    anchor: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """Decode the frames nearest to `times_s` (ascending), crop and resize them: (T, 3, height, width) uint8.

    Args:
        pixel_aspect: width : height of the file's pixels.
        anchor: where the box that is kept lies, (down, right) from 0 to 1; (.5, .5) is the middle.

    Raises VideoError when the file cannot be read or ends before the last of the times.
    """
    for run_up_s in _RUN_UP_S:
        clip, previous = [], None
        try:
            for frame in _frames_at(path, times_s, run_up_s):
                if frame is not previous:  # a frame may be the nearest to several times
                    image = _fit(frame, height, width, pixel_aspect, anchor)
                clip.append(image)
                previous = frame
            return torch.stack(clip)
        except VideoError:  # damage, or only a seek into the midst of a group
            if run_up_s == math.inf:
                raise
    raise AssertionError("the last run-up reads or raises")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    try:
        if path.stat().st_size == 0:
            raise VideoError("empty file")
        with av.open(str(path)) as container:
            # A cover picture in a music file is listed as a video stream too.
            videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not videos:
                raise VideoError("no video stream")
            if videos[0].codec_context is None:
                raise VideoError("nothing here decodes its video stream")
            videos[0].codec_context.thread_count = 1  # the loader's workers are the parallelism
            yield container, videos[0]
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise VideoError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _rate(stream: Any) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise VideoError("the frame rate is unknown")
    return float(rate)


def _seek(container: Any, stream: Any, time_s: float) -> bool:
    try:
        container.seek(math.floor(time_s / stream.time_base), stream=stream)
    except av.FFmpegError:
        return False
    return True


def _packet_times_s(container: Any, stream: Any) -> Iterator[float]:
    for packet in container.demux(stream):
        if packet.pts is not None and not (packet.is_corrupt or packet.is_discard):
            yield float(packet.pts * stream.time_base)


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    for frame in container.decode(stream):
        if frame.time is None:
            raise VideoError("frames without timestamps")
        if frame.is_corrupt:
            raise VideoError(f"damaged frame at {frame.time:.3f} s")
        yield frame


def _frames_at(path: Path, times_s: Sequence[float], run_up_s: float) -> Iterator[Any]:
    with _opened(path) as (container, stream):
        # Pictures just before the key frame may need the group before it (open groups of pictures).
        early_s = times_s[0] - max(run_up_s, 8 / _rate(stream))
        moved = early_s > 0 and _seek(container, stream, early_s)
        frames = _frames(container, stream)
        head = next(frames, None)
        if head is None or (moved and head.time > times_s[0]):
            raise VideoError(f"no frame can be decoded at {times_s[0]:.3f} s")
        yield from _nearest(chain([head], frames), times_s, 0.5 / _rate(stream))


def _nearest(frames: Iterable[Any], times_s: Sequence[float], tolerance_s: float) -> Iterator[Any]:
    wanted = 0
    last = None
    for frame in frames:
        while last is not None and times_s[wanted] <= (last.time + frame.time) / 2:
            yield last
            wanted += 1
            if wanted == len(times_s):
                return
        last = frame
    for time_s in times_s[wanted:]:
        if last is None or time_s > last.time + tolerance_s:
            raise VideoError(f"ends before {time_s:.3f} s")
        yield last


def _fit(frame: Any, height: int, width: int, aspect: float, anchor: tuple[float, float]) -> Tensor:
    """Crop to the wanted shape, resize (antialiased) and turn upright: (3, height, width) uint8."""
    turns = round(frame.rotation / 90) % 4
    if turns % 2:
        height, width = width, height
    image = torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1)).permute(2, 0, 1)
    # width / height of the box in stored pixels, each `aspect` times as wide as high
    shape = width / height / aspect
    box_h = min(frame.height, max(1, round(frame.width / shape)))
    box_w = min(frame.width, max(1, round(frame.height * shape)))
    top, left = round((frame.height - box_h) * anchor[0]), round((frame.width - box_w) * anchor[1])
    box = image[None, :, top : top + box_h, left : left + box_w]
    resized = F.interpolate(box, (height, width), mode="bilinear", antialias=True)[0]
    return torch.rot90(resized, turns, (-2, -1))
