"""How fast TCP really is between two hosts: a stream of bytes, timed where it arrives.

Started inside a network namespace as `python stream.py receive PORT` and `python stream.py send ADDRESS PORT
BYTES`; standard library only, so that it starts at once. The first tenth is not timed: it holds slow start
and the burst that a token bucket lets through.

    rate = (bytes − first tenth) / (time of the last byte − time of the first tenth)
"""

import socket
import sys
import time

__all__ = ["receive", "send"]

_PIECE = 1 << 20


def send(address: str, port: int, size: int) -> None:
    """Send `size` bytes, and wait until the other side has closed."""
    piece = memoryview(bytes(_PIECE))
    with socket.create_connection((address, port), timeout=60) as connection:
        left = size
        while left:
            left -= connection.send(piece[: min(left, _PIECE)])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


def receive(port: int) -> tuple[int, float]:
    """Take one connection; returns (bytes timed, seconds). Says "ready" on stdout before."""
    with socket.create_server(("", port)) as server:
        server.settimeout(60)
        print("ready", flush=True)
        connection, _ = server.accept()
    arrivals: list[tuple[float, int]] = []
    buffer, total = bytearray(_PIECE), 0
    with connection:
        connection.settimeout(60)
        while got := connection.recv_into(buffer):
            total += got
            arrivals.append((time.perf_counter(), total))
    begin = next(arrival for arrival in arrivals if arrival[1] >= total / 10)
    return total - begin[1], arrivals[-1][0] - begin[0]


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "receive":
        print(*receive(int(rest[0])), flush=True)
    else:
        send(rest[0], int(rest[1]), int(rest[2]))


if __name__ == "__main__":
    main()
