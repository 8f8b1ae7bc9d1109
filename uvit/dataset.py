"""The data set that a `[data]` table names."""

from uvit.clips import ClipDataset, DataConfig


def open_dataset(config: DataConfig, seed: int, *, progress: bool = False) -> ClipDataset:
    """Open the clips that the `[data]` table names.

    Args:
        seed: the run's seed: it decides order, starts, crops and flips (and the shapes themselves).
        progress: show a bar while a folder is searched; wanted on one rank only.

    Raises ValueError if the folder does not exist or holds nothing usable.
    """
    if config.kind == "shapes":
        from uvit.shapes import Shapes

        return Shapes(config, seed)
    from uvit.folder import VideoFolder

    return VideoFolder(config, seed, progress=progress)
