"""Where a run listens: under dtrain's rendezvous on the addresses that its user named, and nowhere else."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.rendezvous import bound_store
from tests.faults.runs import Run

pytestmark = pytest.mark.distributed

_LISTENS = "0A"  # of TCP, in /proc


def test_a_store_listens_on_one_address() -> None:
    store = bound_store("127.0.0.2", 0)
    assert ("127.0.0.2", store.port) in set(_listeners({os.getpid()}))
    with pytest.raises(OSError, match="Address already in use"):
        bound_store("127.0.0.2", store.port)
    with pytest.raises(OSError, match="Cannot assign requested address"):
        bound_store("192.0.2.1", 0)  # of a network that is kept for documentation


def test_a_run_listens_where_it_was_told_to(tmp_path: Path) -> None:
    """Under torchrun's own rendezvous one of the addresses is ::, every interface."""
    run = Run(tmp_path, "run")
    with socket.create_server(("127.0.0.2", 0)) as free:
        port = free.getsockname()[1]
    options = (
        "--rdzv-backend",
        "dtrain",
        "--rdzv-endpoint",
        f"127.0.0.2:{port}",
        "--local-addr",
        "127.0.0.3",
    )
    with run.started(*options, sets=("faulty.step_s=0.5", "train.steps=1000")) as process:
        addresses = {address for address, _ in _listeners(_tree(process.pid))}
    assert addresses == {"127.0.0.1", "127.0.0.2", "127.0.0.3"}  # gloo is on lo's


def _tree(root: int) -> set[int]:
    """A process and all below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[pid] = int(rest[1])
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return tree


def _listeners(pids: set[int]) -> Iterator[tuple[str, int]]:
    """Addresses and ports on which processes listen."""
    theirs = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            try:
                theirs.add(os.readlink(handle))
            except OSError:  # it has been closed
                continue
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == _LISTENS and f"socket:[{inode}]" in theirs:
                address, _, port = local.partition(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                yield socket.inet_ntop(family, b"".join(words)), int(port, 16)
