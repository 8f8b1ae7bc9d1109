"""Is this machine fit to train? Versions, devices, and two real processes that talk to each other.

The self-test runs the collectives that FSDP2 uses, and one sharded training step that must equal the
unsharded one: on gloo, and with two GPUs or more on NCCL as well. The supported versions are the project's
own declared requirements (https://packaging.python.org/en/latest/specifications/dependency-specifiers/).
"""

import copy
import json
import logging
import platform
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import rich
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessException, spawn

from dtrain.metrics.telemetry import nvml_state

logger = logging.getLogger(__name__)

_RANKS = 2
_TIMEOUT = timedelta(seconds=60)


class Check(NamedTuple):
    """One line of the report."""

    name: str
    found: str
    state: Literal["ok", "absent", "failed"] = "ok"
    advice: str = ""

    @property
    def failed(self) -> bool:
        return self.state == "failed"


def examine() -> list[Check]:
    """Run all checks; takes some seconds, because two processes are started."""
    checks = [*_versions(), *_devices(), _codecs(), *self_test("gloo")]
    if torch.cuda.device_count() >= _RANKS:
        checks += self_test("nccl")
    return checks


def show(checks: Iterable[Check]) -> None:
    """Print the checks as a table, with advice below what failed."""
    table = Table("check", "", "found", header_style="bold")
    for check in checks:
        colour = {"ok": "green", "absent": "yellow", "failed": "red"}[check.state]
        advice = f"\n[bold]{escape(check.advice)}[/bold]" if check.advice else ""
        table.add_row(check.name, f"[{colour}]{check.state}[/{colour}]", escape(check.found) + advice)
    rich.print(table)


def check_version(requirement: Requirement, version: str | None) -> Check:
    """Compare an installed version (None: not installed) with what is required."""
    name, wanted = requirement.name, requirement.specifier
    if version is None:
        return Check(name, "not installed", "failed", f"pip install '{name}{wanted}'")
    if not wanted.contains(version, prereleases=True):
        return Check(name, f"{version}, supported is {wanted}", "failed", f"pip install '{name}{wanted}'")
    return Check(name, version)


def requirements() -> tuple[str, list[Requirement]]:
    """(Python versions, packages) that the project declares, installed or in an uninstalled clone."""
    try:
        declared = metadata.metadata("dtrain")
        return declared["Requires-Python"], [Requirement(r) for r in metadata.requires("dtrain") or []]
    except metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        return project["requires-python"], [Requirement(r) for r in project["dependencies"]]


def _versions() -> Iterator[Check]:
    python, packages = requirements()
    version = platform.python_version()
    fits = SpecifierSet(python).contains(version)
    yield Check("python", version) if fits else Check("python", version, "failed", f"use Python {python}")
    for requirement in packages:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield check_version(requirement, _installed(requirement.name))
    diffusers = _installed("diffusers")
    if diffusers:
        yield Check("diffusers", diffusers)
    else:
        yield Check("diffusers", "not installed", "absent", "optional: pip install 'dtrain[diffusers]'")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Check]:
    nvml = nvml_state()
    driver = nvml.startswith("driver")
    yield Check("NVML", nvml, "ok" if driver else "absent")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            memory_gib = p.total_memory / 1024**3
            yield Check(
                f"cuda:{i}", f"{p.name}, {memory_gib:.0f} GiB, compute capability {p.major}.{p.minor}"
            )
        yield Check("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        # A driver without a usable device is a broken installation; no driver is a machine without a GPU.
        advice = "this PyTorch cannot use the GPU: install a CUDA build that suits the driver"
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
        found = f"no device (PyTorch built {build})"
        yield Check("cuda", found, "failed", advice) if driver else Check("cuda", found, "absent")
    yield Check("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")


def _codecs() -> Check:
    import av

    missing = sorted({"h264", "libx264", "gif", "png"} - av.codecs_available)
    libraries = f"libavcodec {av.library_versions['libavcodec'][0]}"
    if missing:
        found = f"{libraries}, without {', '.join(missing)}"
        return Check("video", found, "failed", "use PyAV's own wheel: pip install --only-binary av av")
    return Check("video", f"{libraries}, {len(av.codecs_available)} codecs, writes H.264 and GIF")


def self_test(backend: str) -> list[Check]:
    """Start two processes that check the collectives and a sharded step; one `Check` for each.

    Args:
        backend: "gloo" on the CPU, "nccl" on the first two GPUs.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"rank{rank}.json" for rank in range(_RANKS)]
        try:
            spawn(_rank, args=(backend, folder), nprocs=_RANKS)
        except ProcessException as error:
            last = str(error).strip().splitlines()[-1]
            if not all(file.exists() for file in files):
                advice = (
                    "a firewall or a wrong network interface? try GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME"
                )
                return [Check(f"{backend}, two ranks", last, "failed", advice)]
            # gloo's threads may abort a process that is on its way out, after all its checks.
            logger.warning("%s: a rank ended badly after its checks: %s", backend, last)
        reports = [json.loads(file.read_text()) for file in files]
    return [_verdict(backend, name, [report[name] for report in reports]) for name in reports[0]]


def _verdict(backend: str, name: str, errors: list[str]) -> Check:
    wrong = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error]
    return Check(f"{backend} {name}", "; ".join(wrong) or "two ranks agree", "failed" if wrong else "ok")


def _rank(rank: int, backend: str, folder: str) -> None:
    torch.set_num_threads(1)
    # Newer versions of PyTorch rename these collectives; the old names work in all that are supported.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=_RANKS, timeout=_TIMEOUT)
    report = {name: test(rank, device) for name, test in _TESTS.items()}
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(report))
    dist.barrier()  # a rank that leaves early breaks the connections under the other
    dist.destroy_process_group()


def _difference(found: Tensor, expected: Tensor, tolerance: float = 0.0) -> str:
    """Empty when two tensors agree, else what is wrong."""
    error = (found - expected).abs().max().item()
    return "" if error <= tolerance else f"off by {error:.3g}"


def _all_reduce(rank: int, device: torch.device) -> str:
    tensor = torch.full((4,), float(rank + 1), device=device)
    dist.all_reduce(tensor)
    return _difference(tensor, torch.full_like(tensor, 3.0))


def _all_gather(rank: int, device: torch.device) -> str:
    whole = torch.arange(8.0, device=device)
    gathered = torch.full_like(whole, torch.inf)
    dist.all_gather_into_tensor(gathered, whole.chunk(_RANKS)[rank].contiguous())
    return _difference(gathered, whole)


def _reduce_scatter(rank: int, device: torch.device) -> str:
    whole = torch.arange(8.0, device=device)
    mine = torch.full_like(whole.chunk(_RANKS)[rank], torch.inf)
    dist.reduce_scatter_tensor(mine, whole * (rank + 1))
    return _difference(mine, 3 * whole.chunk(_RANKS)[rank])


def _sharded_step(rank: int, device: torch.device) -> str:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).to(device)
    x = torch.randn(4, 8).to(device)
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=init_device_mesh(device.type, (_RANKS,)))
    _sgd_step(plain, x)
    _sgd_step(sharded, x.chunk(_RANKS)[rank])
    errors = [
        _difference(p.full_tensor() if isinstance(p, DTensor) else p, q, tolerance=1e-5)
        for p, q in zip(sharded.parameters(), plain.parameters(), strict=True)
    ]
    return next(filter(None, errors), "")


def _sgd_step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


_TESTS: dict[str, Callable[[int, torch.device], str]] = {
    "all-reduce": _all_reduce,
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
    "fully_shard step": _sharded_step,
}
