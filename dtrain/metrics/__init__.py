"""What a run tells: records and a summary on disk, the terminal, GPUs' telemetry, FLOPs, memory.

`dtrain.metrics.memory` reads the run's config, which holds this package's: it is not imported here.
"""

from dtrain.metrics.log import MetricsConfig, NullLog, RunLog, peak_memory_gib
from dtrain.metrics.records import Record, drop_after, read_records

__all__ = [
    "MetricsConfig", "NullLog", "Record", "RunLog", "drop_after", "peak_memory_gib", "read_records",
]  # fmt: skip
