"""Reads altered videos until one kills or hangs the process: `fuzz_videos.py FOLDER COUNT OUT`.

Each file of the folder is altered at random, probed and read. OUT counts what came of it; before each read it
names the file, so that whoever started this knows which one it did not survive.
"""

import faulthandler
import json
import random
import sys
from collections import Counter
from pathlib import Path

import av.logging

from uvit.decode import VideoError, probe, read_clip

PATIENCE_S = 60.0


def alter(content: bytes, draw: random.Random) -> bytes:
    """Cut, blanked, with flipped bits, with a piece of it moved, or with noise in its header."""
    data, size = bytearray(content), len(content)
    kind = draw.choice(("cut", "blank", "flip", "many", "move", "header"))
    start = draw.randrange(size)
    length = draw.choice((1, 16, 512, size // 4))
    if kind == "cut":
        return bytes(data[:start])
    if kind == "blank":
        data[start : start + length] = bytes(len(data[start : start + length]))
    elif kind == "move":
        piece = data[start : start + length]
        place = draw.randrange(size)
        data[place : place + len(piece)] = piece
    else:
        reach = min(size, 256) if kind == "header" else size
        for _ in range(1 if kind == "flip" else 40):
            data[draw.randrange(reach)] ^= 1 << draw.randrange(8)
    return bytes(data)


def main(folder: str, count: str, out: str) -> None:
    av.logging.set_level(av.logging.PANIC)
    draw = random.Random(0)
    originals = {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.*"))}
    outcomes: Counter[str] = Counter()
    for number in range(int(count)):
        name = draw.choice(list(originals))
        path = Path(folder, "altered", f"{number}-{name}")
        path.write_bytes(alter(originals[name], draw))
        Path(out).write_text(json.dumps({"reading": path.name, **outcomes}))
        faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
        outcomes[read(path)] += 1
        faulthandler.cancel_dump_traceback_later()
        path.unlink()
    Path(out).write_text(json.dumps(outcomes))


def read(path: Path) -> str:
    """ "read" or "refused"; anything else of it is an exception that ends the process."""
    try:
        timeline = probe(path)
        clip = read_clip(path, timeline.times(0, 3, 1 / timeline.rate), 16, 24)
    except VideoError:
        return "refused"
    assert tuple(clip.shape) == (3, 3, 16, 24), clip.shape
    return "read"


if __name__ == "__main__":
    main(*sys.argv[1:])
