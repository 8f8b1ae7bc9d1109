"""Ways in which a file of a checkpoint goes bad."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = ["HARM", "cut", "flip"]


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def cut_at_a_line(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    places = [place for place, byte in enumerate(content) if byte == 10 and place + 1 < len(content)]
    os.truncate(file, draw.choice(places) + 1 if places else 0)


def lengthen(file: Path, draw: random.Random) -> None:
    with file.open("ab") as out:
        out.write(draw.randbytes(draw.randint(1, 64)))


def blank(file: Path, draw: random.Random) -> None:
    """A block that the disk never wrote."""
    content = bytearray(file.read_bytes())
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice((1, 64, 4096)))
    content[start:stop] = bytes(stop - start) if any(content[start:stop]) else b"\1" * (stop - start)
    file.write_bytes(content)


def remove(file: Path, draw: random.Random) -> None:
    file.unlink()


def replace(file: Path, draw: random.Random) -> None:
    """By another file of the same checkpoint."""
    others = [path for path in file.parent.iterdir() if path.name != file.name]
    shutil.copy(draw.choice(others), file)


HARM: list[Callable[[Path, random.Random], None]] = [
    flip,
    flip,
    cut,
    cut_at_a_line,
    lengthen,
    blank,
    remove,
    replace,
]
