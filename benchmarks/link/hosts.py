"""Hosts on one machine: network namespaces, joined by a bridge over cables of a limited rate.

    host i: eth0 ── veth ── bridge        tc tbf on both ends: what a host sends, and what it is sent

A token bucket (`tc-tbf(8)`) lets bytes pass at the rate, and `burst` at once; what waits longer than
`latency` is dropped, as by a switch. Frames are of 9000 bytes, as between servers. All hosts share the
machine's CPU: what they compute, they compute as slowly as it is divided.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.link import stream

__all__ = ["INTERFACE", "Hosts", "Unavailable", "hosts", "require_network_tools"]

INTERFACE = "eth0"
MTU = 9000
_PREFIX = "dtl"  # names are PREFIX, pid, letter, number: at most 15 characters for an interface
_OURS = re.compile(rf"\b{_PREFIX}(\d+)[bnv]\d*\b")
_CONGESTION_CONTROL = "/proc/sys/net/ipv4/tcp_congestion_control"
_PORT = 47800
_LATENCY_MS = 50
_BURST_MS = 1.0
_LEAST_BURST = 4 * 65536  # TCP hands over up to 64 KiB as one packet, which must fit


class Unavailable(RuntimeError):
    """This machine cannot make hosts; says what is missing."""


def require_network_tools() -> None:
    """Check that namespaces can be made here.

    Raises:
        Unavailable: names what is missing.
    """
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise Unavailable(f"the command `{tool}` is not there: install the package iproute2")
    name = f"{_PREFIX}{os.getpid()}n"
    veth = ("type", "veth", "peer", "name", "right")
    probes = (
        (("ip", "netns", "add", name), "network namespaces (root, CAP_SYS_ADMIN, CAP_NET_ADMIN)"),
        (("ip", "-n", name, "link", "add", "left", *veth), "the kernel's veth"),
        (("ip", "-n", name, "link", "add", "middle", "type", "bridge"), "the kernel's bridge"),
        (("tc", "-n", name, "qdisc", "add", "dev", "left", "root", "tbf", "rate", "1gbit", "burst", "1mb",
          "latency", "50ms"), "the kernel's sch_tbf"),
    )  # fmt: skip
    try:
        for command, needed in probes:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise Unavailable(f"needs {needed}: `{' '.join(command)}` said: {done.stderr.strip()}")
    finally:
        subprocess.run(("ip", "netns", "del", name), capture_output=True)


@contextmanager
def hosts(count: int, rate: float | None = None, delay_ms: float = 0.0) -> Iterator["Hosts"]:
    """Make hosts, and remove them and whatever runs in them at the end, also on SIGINT and SIGTERM.

    Args:
        count: of hosts, 2 to 200.
        rate: of each cable and direction, in bits a second; None: as fast as the machine is.
        delay_ms: added to what each host sends; needs the kernel's netem.
    Raises:
        Unavailable: the machine cannot make them.
        ValueError: a number out of range.
    """
    if not 2 <= count <= 200:
        raise ValueError(f"hosts = {count}: must be 2 to 200")
    if delay_ms < 0:
        raise ValueError(f"delay_ms = {delay_ms}: must be 0 or more")
    require_network_tools()
    _remove_stale()
    with _terminate_orderly(), ExitStack() as stack:
        made = Hosts(count)
        stack.callback(made.remove)
        made.build(delay_ms)
        made.set_rate(rate)
        yield made


class Hosts:
    """Namespaces with one interface each; see `hosts`, which makes and removes them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.rate: float | None = None
        own = f"{_PREFIX}{os.getpid()}"
        self._bridge = f"{own}b"
        self._names = [f"{own}n{i}" for i in range(count)]
        self._cables = [f"{own}v{i}" for i in range(count)]
        self._delay_ms = 0.0

    def build(self, delay_ms: float) -> None:
        """Make the bridge, the namespaces and their cables."""
        self._delay_ms = delay_ms
        _call("ip", "link", "add", self._bridge, "mtu", MTU, "type", "bridge")
        _call("ip", "link", "set", self._bridge, "up")
        for i, (name, cable) in enumerate(zip(self._names, self._cables, strict=True)):
            _call("ip", "netns", "add", name)
            _call("ip", "link", "add", cable, "mtu", MTU, "type", "veth",
                  "peer", "name", INTERFACE, "mtu", MTU, "netns", name)  # fmt: skip
            _call("ip", "link", "set", cable, "master", self._bridge, "up")
            _call("ip", "-n", name, "link", "set", "lo", "up")
            _call("ip", "-n", name, "link", "set", INTERFACE, "up")
            _call("ip", "-n", name, "address", "add", f"{self.address(i)}/24", "dev", INTERFACE)
            _set_congestion_control(name)
            if delay_ms:
                self._add_delay(name)

    def _add_delay(self, name: str) -> None:
        command = ("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "handle", "1:", "netem",
                   "delay", f"{self._delay_ms}ms", "limit", "100000")  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(
                f"delay_ms = {self._delay_ms}: needs the kernel's sch_netem, which is not there "
                f"({done.stderr.strip()}); use delay_ms = 0"
            )

    def address(self, host: int) -> str:
        """IPv4 address of a host."""
        return f"10.77.0.{host + 1}"

    def set_rate(self, rate: float | None) -> None:
        """Limit what every host sends and is sent, in bits a second; None takes the limit away."""
        self.rate = rate
        for name, cable in zip(self._names, self._cables, strict=True):
            # With a delay, the bucket hangs below it.
            place = ("parent", "1:1") if self._delay_ms else ("root",)
            _limit(("tc", "-n", name), INTERFACE, place, rate)
            _limit(("tc",), cable, ("root",), rate)

    def popen(self, host: int, command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
        """Start a command inside a host; options as of `subprocess.Popen`. `remove` ends it at the latest."""
        return subprocess.Popen(("ip", "netns", "exec", self._names[host], *command), text=True, **options)

    def sent_bytes(self, host: int) -> int:
        """Bytes that a host's interface has sent since it was made, headers included."""
        file = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
        return int(_call("ip", "netns", "exec", self._names[host], "cat", file))

    def congestion_control(self) -> str:
        """The algorithm by which the hosts' TCP finds its rate."""
        return _call("ip", "netns", "exec", self._names[0], "cat", _CONGESTION_CONTROL).strip()

    def achieved(self) -> tuple[float, ...]:
        """Bits a second of a TCP stream from each host to the next, one after another."""
        return tuple(self.measure(i, (i + 1) % self.count) for i in range(self.count))

    def measure(self, sender: int, receiver: int) -> float:
        """Bits a second of one TCP stream of about half a second; see `stream`."""
        size = int((self.rate or 8e9) / 8 * 0.5)
        program = (sys.executable, stream.__file__)
        with self.popen(receiver, (*program, "receive", str(_PORT)), stdout=subprocess.PIPE) as listening:
            assert listening.stdout is not None
            if listening.stdout.readline().strip() != "ready":
                raise RuntimeError(f"host {receiver}: no stream could be received there")
            sending = (*program, "send", self.address(receiver), str(_PORT), str(size))
            with self.popen(sender, sending):
                count, taken_s = listening.stdout.readline().split()
        return 8 * int(count) / float(taken_s)

    def remove(self) -> None:
        """End what runs in the hosts, and take them away."""
        for name in self._names:
            _remove_namespace(name)
        for link in (*self._cables, self._bridge):
            subprocess.run(("ip", "link", "del", link), capture_output=True)


def _limit(tc: Sequence[str], device: str, place: Sequence[str], rate: float | None) -> None:
    if rate is None:
        # Fails where there is no limit yet, which is as well.
        subprocess.run((*tc, "qdisc", "del", "dev", device, *place), capture_output=True)
        return
    burst = max(_LEAST_BURST, int(rate / 8 * _BURST_MS / 1e3))
    _call(*tc, "qdisc", "replace", "dev", device, *place, "handle", "2:", "tbf",
          "rate", f"{int(rate)}bit", "burst", burst, "latency", f"{_LATENCY_MS}ms")  # fmt: skip


def _set_congestion_control(name: str) -> None:
    """Have TCP find its rate by losses, as Linux does by default and clusters do.

    bbr, which some machines are set to, is for wide areas: it paces each burst of a collective up from where
    the pause before has left it, and took twice the time in an all-gather at 1 Gbit/s. The kernel may keep
    cubic from namespaces; reno it never does.
    """
    for algorithm in ("cubic", "reno"):
        write = ("ip", "netns", "exec", name, "sh", "-c", f"echo {algorithm} > {_CONGESTION_CONTROL}")
        if subprocess.run(write, capture_output=True).returncode == 0:
            return
    raise Unavailable(f"neither cubic nor reno can be set in {_CONGESTION_CONTROL} of a namespace")


def _call(*command: object) -> str:
    words = tuple(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"`{' '.join(words)}` said: {done.stderr.strip()}")
    return done.stdout


def _remove_namespace(name: str) -> None:
    found = subprocess.run(("ip", "netns", "pids", name), capture_output=True, text=True)
    for pid in map(int, found.stdout.split()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(("ip", "netns", "del", name), capture_output=True)


def _remove_stale() -> None:
    """Take away what a killed run has left behind: names whose pid is dead."""
    listed = {
        kind: subprocess.run(command, capture_output=True, text=True).stdout
        for kind, command in (("namespace", ("ip", "netns", "list")), ("link", ("ip", "-o", "link", "show")))
    }
    for kind, text in listed.items():
        for match in {m[0]: m for m in _OURS.finditer(text)}.values():
            if Path(f"/proc/{match[1]}").exists():
                continue
            if kind == "namespace":
                _remove_namespace(match[0])
            else:
                subprocess.run(("ip", "link", "del", match[0]), capture_output=True)


@contextmanager
def _terminate_orderly() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that what is open is closed; as SIGINT does anyhow."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
