"""Error feedback: what rounding took from a gradient is added to the next one.

    payload = Q(g + e)        e' = (g + e) - D(payload)

Summed over steps, the errors cancel but for the last (Karimireddy et al., arXiv 1901.09847; for sharded
training Xie et al., "LoCo", arXiv 2407.04480). A residual belongs to one rank and one set of
parameters. Where the set of those that have a gradient changes, it begins anew, which is counted.
"""

import logging

import torch
from torch import Tensor

from dtrain.comm.codec import Codec, Quantised
from dtrain.comm.config import Storage

log = logging.getLogger(__name__)

__all__ = ["Residual"]


class Residual:
    """The error of one hop of one unit's gradients.

    Args:
        name: of the unit and hop, for people.
        codec: whose errors.
        storage: "none", "bf16" or "int8".

    Attributes:
        restarts: how often it began anew with another set of parameters.
    """

    def __init__(self, name: str, codec: Codec, storage: Storage) -> None:
        self.name = name
        self.restarts = 0
        self._codec = codec if isinstance(codec, Quantised) and storage != "none" else None
        self._storage = storage
        self._of: tuple[int, ...] = ()
        self._tensor: Tensor | None = None
        self._saved: Tensor | None = None

    def take(self, of: tuple[int, ...], rows: int, n: int, device: torch.device) -> Tensor | None:
        """The residual of rows (rows, n), which `Codec.encode` replaces; None where none is kept.

        Args:
            of: the parameters that the rows hold.
        """
        if self._codec is None:
            return None
        if self._tensor is None or self._of != of:
            self._begin(of, self._codec.residual(rows, n, self._storage, device))
        return self._tensor

    def _begin(self, of: tuple[int, ...], zeros: Tensor) -> None:
        saved, self._saved = self._saved, None
        if saved is not None and self._of == of and saved.nbytes == zeros.nbytes:
            zeros.view(-1).view(torch.uint8).copy_(saved)
        elif self._tensor is not None or saved is not None:
            self.restarts += 1
            if self._of == of:
                log.warning("comm: %s was cut otherwise: its error feedback begins anew.", self.name)
            elif self.restarts == 1:
                log.warning(
                    "comm: other parameters of %s have gradients than before (%d, then %d): its error "
                    "feedback begins anew, now and each time that this happens.",
                    self.name, len(self._of), len(of),
                )  # fmt: skip
        self._of, self._tensor = of, zeros

    @property
    def state(self) -> tuple[tuple[int, ...], Tensor] | None:
        """The parameters and the bytes (size,) uint8; None where there is none yet."""
        if self._tensor is None:
            return None if self._saved is None else (self._of, self._saved)
        return self._of, self._tensor.view(-1).view(torch.uint8)

    def restore(self, of: tuple[int, ...], saved: Tensor) -> None:
        """Take what `state` gave, at the next gradient."""
        self._of, self._saved, self._tensor = of, saved, None

    def clear(self) -> None:
        """Begin from zero at the next gradient."""
        self._tensor = self._saved = None

    @property
    def nbytes(self) -> int:
        """Memory that it takes on this rank."""
        return 0 if self._tensor is None else self._tensor.nbytes
