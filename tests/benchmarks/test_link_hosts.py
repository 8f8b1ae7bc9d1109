"""Hosts in network namespaces: they come, are limited, and go, whatever ends the run; training between them.

Nothing here depends on how fast anything is. Skipped by name where namespaces cannot be made.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.link import hosts as hosts_module
from benchmarks.link.__main__ import main
from benchmarks.link.hosts import Hosts, Unavailable, hosts, require_network_tools
from benchmarks.link.launch import HostFailed, run_job
from benchmarks.link.result import LinkRun, read_run
from benchmarks.link.workload import TINY, VARIANTS, Job
from tests.launch import ROOT

try:
    require_network_tools()
except Unavailable as reason:
    pytestmark = pytest.mark.skip(reason=f"no network namespaces here: {reason}")


def names_of(pid: int) -> set[str]:
    """Namespaces and links that bear a process's number."""
    listed = "".join(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in (("ip", "netns", "list"), ("ip", "-o", "link"))
    )
    return set(re.findall(rf"\bdtl{pid}[bnv]\d*", listed))


@contextmanager
def another_run() -> Iterator[subprocess.Popen[str]]:
    """A process that holds two hosts, with a sleeping process in one of them."""
    code = """
        import signal, time
        from benchmarks.link.hosts import hosts
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
        with hosts(2) as made:
            made.popen(0, ("sleep", "600"))
            print("made", flush=True)
            time.sleep(600)
    """
    command = (sys.executable, "-c", textwrap.dedent(code))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "made\n"
            yield process
        finally:
            process.kill()


def inside(pid: int) -> list[int]:
    """What runs in a run's first host; something does, but it may still be on its way in."""
    for _ in range(200):
        found = subprocess.run(("ip", "netns", "pids", f"dtl{pid}n0"), capture_output=True, text=True)
        if found.stdout.split():
            break
        time.sleep(0.05)
    return [int(word) for word in found.stdout.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_and_leaves_nothing(number: signal.Signals) -> None:
    with another_run() as process:
        (sleeper,) = inside(process.pid)
        assert len(names_of(process.pid)) == 5  # a bridge, two cables, two namespaces
        process.send_signal(number)
        process.wait(timeout=60)
        assert names_of(process.pid) == set()
        assert not alive(sleeper)


def test_what_a_killed_run_leaves_the_next_one_removes_and_no_living_one_s() -> None:
    with another_run() as killed, another_run() as living:
        (sleeper,) = inside(killed.pid)
        killed.kill()
        killed.wait()
        assert names_of(killed.pid)
        with hosts(2):
            assert names_of(killed.pid) == set()
            assert not alive(sleeper)
            assert len(names_of(living.pid)) == 5
    assert names_of(os.getpid()) == set()


def test_an_error_removes_the_hosts() -> None:
    with pytest.raises(ZeroDivisionError), hosts(3):
        _ = 1 / (len(names_of(os.getpid())) - 7)
    assert names_of(os.getpid()) == set()


def limits(made: Hosts) -> list[str]:
    """The rates of both ends of every cable, as tc says them."""
    ends = [("tc", "qdisc", "show", "dev", cable) for cable in made._cables]
    ends += [("tc", "-n", name, "qdisc", "show", "dev", "eth0") for name in made._names]
    said = [subprocess.run(end, capture_output=True, text=True, check=True).stdout for end in ends]
    return [match[1] if (match := re.search(r"tbf .*rate (\S+)", text)) else "" for text in said]


def test_rates_are_set_and_changed_in_place_on_both_ends() -> None:
    with hosts(2, 1e9) as made:
        assert limits(made) == ["1Gbit"] * 4
        made.set_rate(2e8)
        assert limits(made) == ["200Mbit"] * 4
        made.set_rate(None)
        assert limits(made) == [""] * 4
        made.set_rate(5e9)
        assert limits(made) == ["5Gbit"] * 4


def test_a_stream_is_counted_by_the_interface_and_large_frames_pass() -> None:
    with hosts(2, 1e9) as made:
        before = made.sent_bytes(0), made.sent_bytes(1)
        assert made.measure(0, 1) > 0
        sent, answered = (made.sent_bytes(i) - before[i] for i in (0, 1))
        assert 62.5e6 <= sent <= 1.03 * 62.5e6  # half a second's bytes, and headers
        assert answered < 0.03 * sent
        asked = made.popen(0, (sys.executable, "-c", ROUTE_MTU, made.address(1)), stdout=subprocess.PIPE)
        assert asked.communicate(timeout=60)[0].strip() == "9000"


ROUTE_MTU = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], 9))
print(s.getsockopt(socket.IPPROTO_IP, 14))  # IP_MTU of the route
"""


def has_netem() -> bool:
    with hosts(2) as made:
        add = ("tc", "-n", made._names[0], "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "1ms")
        return subprocess.run(add, capture_output=True).returncode == 0


def test_a_delay_is_made_or_refused_by_name() -> None:
    if not has_netem():
        with (
            pytest.raises(Unavailable, match=r"delay_ms = 3\.0: needs the kernel's sch_netem"),
            hosts(2, None, 3.0),
        ):
            pass
    else:
        with hosts(2, 1e9, delay_ms=3.0) as made:
            assert limits(made) == ["1Gbit"] * 4
            shown = ("tc", "-n", made._names[0], "qdisc", "show", "dev", "eth0")
            assert re.search(r"netem .*delay 3(\.0)?ms", subprocess.check_output(shown, text=True))
    assert names_of(os.getpid()) == set()


def test_a_number_out_of_range_is_refused() -> None:
    for count in (1, 201):
        with pytest.raises(ValueError, match=f"hosts = {count}: must be 2 to 200"), hosts(count):
            pass
    with pytest.raises(ValueError, match=r"delay_ms = -1"), hosts(2, delay_ms=-1):
        pass


def test_a_missing_tool_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_module.shutil, "which", lambda tool: None if tool == "tc" else f"/{tool}")
    with pytest.raises(Unavailable, match="`tc` is not there: install the package iproute2"):
        require_network_tools()


def test_a_host_that_fails_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    job = Job(replace(TINY, heads=3), ("bf16",), 1, 1, 1.0, False, False, str(tmp_path))
    with hosts(2) as made, pytest.raises(HostFailed, match=r"host \d failed") as error:
        run_job(job, made, os.environ)
    assert "heads = 3" in str(error.value)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> LinkRun:
    out = tmp_path_factory.mktemp("link")
    assert main(["--smoke", "--out", str(out)]) == 0
    assert (out / "plot.png").exists()
    return read_run(out / "link.json")


@pytest.mark.distributed
def test_what_the_interface_sends_is_what_the_meter_counts(smoke: LinkRun) -> None:
    (rate,) = smoke.rates
    assert tuple(rate.variants) == VARIANTS
    for name, variant in rate.variants.items():
        if name.startswith("fsdp2"):
            assert variant.meter_over_interface is None
        elif variant.preset != "none":
            assert variant.meter_over_interface is not None, name
            assert 0.97 <= variant.meter_over_interface <= 1, name


@pytest.mark.distributed
def test_each_preset_sends_what_it_promises(smoke: LinkRun) -> None:
    """Bytes by the interface over those of FSDP2 in bf16 by rings."""
    of_formula = {name: variant.of_formula for name, variant in smoke.rates[0].variants.items()}
    most = {"bf16": 1.02, "int8": 0.53, "int8-int4": 0.44, "int4-delta": 0.19}
    for name, limit in most.items():
        assert 0.9 * limit <= of_formula[name] <= limit, (name, of_formula[name])
    assert of_formula["fsdp2-bf16"] >= 1
    assert of_formula["fsdp2-fp32"] >= 4 / 3


@pytest.mark.distributed
def test_all_variants_train_alike(smoke: LinkRun) -> None:
    exact = smoke.rates[0].variants["fsdp2-fp32"].losses
    for name, variant in smoke.rates[0].variants.items():
        assert len(variant.losses) == 2, name
        assert variant.losses[1] < variant.losses[0], name
        assert variant.losses == pytest.approx(exact, rel=0.03), name
        assert variant.sampled.get("wire_non_finite", 0) == 0, name
