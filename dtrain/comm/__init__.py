"""Compressed collectives for FSDP2: `attach` puts them on a sharded model."""

from dtrain.comm.attach import Comm, attach, attached
from dtrain.comm.config import CommConfig

__all__ = ["Comm", "CommConfig", "attach", "attached"]
