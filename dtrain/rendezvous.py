"""A rendezvous for torchrun that listens on the address that it was given, and on no other.

torchrun's own (c10d) opens two stores, where agents and where ranks meet, on all interfaces of a host:
whoever reaches them can write what a run reads. Here the first is bound to the address of `--rdzv-endpoint`,
on the host that has it, and the second to `--local-addr`, or to the address of the host's name.

    torchrun --rdzv-backend dtrain --rdzv-endpoint 10.0.0.1:29500 --local-addr 10.0.0.1 --nnodes 2 …

torchrun finds it by the entry point `torchrun.handlers` of the installed package.
Source: https://docs.pytorch.org/docs/stable/elastic/rendezvous.html
"""

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

__all__ = ["bound_store", "handler"]

_NAME = "dtrain"  # of the entry point
_PORT = 29400  # where --rdzv-endpoint names none, as torchrun's own
_PATIENCE = timedelta(seconds=60)


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What the entry point gives to torchrun."""
    return _rendezvous


def bound_store(host: str, port: int) -> TCPStore:
    """A store that listens on one address of this host.

    Args:
        host: name or address.
        port: 0 takes a free one.

    Raises:
        OSError: the address is another host's, or something listens there.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.create_server(address[:2], family=family)
    taken: int = listening.getsockname()[1]
    return TCPStore(
        host,
        taken,
        is_master=True,
        timeout=_PATIENCE,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


class _Backend(C10dRendezvousBackend):
    """PyTorch's, by the name that torchrun asked for."""

    @property
    def name(self) -> str:
        return _NAME


def _rendezvous(parameters: RendezvousParameters) -> RendezvousHandler:
    host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=_PORT)
    try:
        store = bound_store(host, port)
    except OSError:  # another agent keeps it
        store = TCPStore(host, port, is_master=False, timeout=_PATIENCE)
    meets: Any = create_handler(store, _Backend(store, parameters.run_id), parameters)
    if not hasattr(meets, "_create_tcp_store_server"):
        raise RuntimeError("this version of PyTorch makes the ranks' store elsewhere: it cannot be bound")
    meets._create_tcp_store_server = bound_store
    found: RendezvousHandler = meets
    return found
