from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

_CODECS = {
    ".mp4": ("libx264", "yuv420p"),
    ".mkv": ("libx264", "yuv420p"),
    ".ts": ("libx264", "yuv420p"),
    ".avi": ("mpeg4", "yuv420p"),
    ".webm": ("libvpx-vp9", "yuv420p"),
    ".gif": ("gif", "rgb8"),
}


def _numbered(count: int, height: int, width: int) -> list[np.ndarray]:
    """Frames that tell their number: frame k is a grey of 10·k, with a stripe that moves."""
    frames = [np.full((height, width, 3), 10 * k, np.uint8) for k in range(count)]
    for k, frame in enumerate(frames):
        frame[:4, (2 * k) % width :][:, :8] = (250, 40, 120)
    return frames


@pytest.fixture(scope="session")
def write_video() -> Callable[..., list[np.ndarray]]:
    """write_video(path, count, …): encode `count` numbered frames (or the given ones); returns them."""

    def write(
        path: Path,
        count: int = 24,
        *,
        frames: list[np.ndarray] | None = None,
        size: tuple[int, int] = (32, 48),
        rate: int = 25,
        times_ms: list[int] | None = None,
        rotation: int | None = None,
        pixel_aspect: int | None = None,
        options: dict[str, str] | None = None,
    ) -> list[np.ndarray]:
        frames = frames or _numbered(count, *size)
        codec, pixels = _CODECS[path.suffix]
        gop = {"g": "6", "bf": "2"} if codec != "gif" else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream: Any = container.add_stream(codec, rate=1000 if times_ms else rate, options=options or gop)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = pixels
            if rotation is not None:
                stream.set_display_rotation(rotation)
            if pixel_aspect is not None:
                stream.codec_context.sample_aspect_ratio = pixel_aspect
            for k, pixels_HW3 in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels_HW3, format="rgb24")
                frame.pts = times_ms[k] if times_ms else k
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return frames

    return write
