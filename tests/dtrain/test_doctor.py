"""doctor: the real self-test, and verdicts on machines that are not fit."""

import platform

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from dtrain import doctor
from dtrain.__main__ import app
from dtrain.doctor import Check, check_version, requirements, self_test


@pytest.mark.distributed
def test_two_ranks_agree() -> None:
    checks = self_test("gloo")
    names = ["all-reduce", "all-gather", "reduce-scatter", "fully_shard step"]
    assert [c.name for c in checks] == [f"gloo {name}" for name in names]
    assert {c.state for c in checks} == {"ok"}


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_agree() -> None:
    assert {c.state for c in self_test("nccl")} == {"ok"}


def test_a_backend_that_does_not_start_is_a_failed_check() -> None:
    (check,) = self_test("no-such-backend")
    assert check.failed
    assert check.advice


def test_a_rank_that_disagrees_is_named() -> None:
    assert doctor._verdict("gloo", "all-reduce", ["", "off by 1"]) == Check(
        "gloo all-reduce", "rank 1: off by 1", "failed"
    )
    assert doctor._difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == "off by 0.5"
    assert doctor._difference(torch.tensor([1.0]), torch.tensor([1.25]), tolerance=0.25) == ""
    assert doctor._difference(torch.tensor([torch.nan]), torch.tensor([1.0])) != ""


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.13.0+cu130", "ok"), ("2.11.0", "ok"), ("2.10.1", "failed"), ("2.14.0", "failed"), (None, "failed")],
)
def test_versions_are_held_against_the_declared_range(version: str | None, state: str) -> None:
    check = check_version(Requirement("torch>=2.11,<2.14"), version)
    assert check.state == state
    assert check.failed == bool(check.advice)


def test_requirements_are_the_projects_own() -> None:
    python, packages = requirements()
    assert platform.python_version() in Requirement(f"python{python}").specifier
    assert {"torch", "pydantic", "av"} <= {package.name for package in packages}


def test_the_command_fails_when_a_check_does(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("torch", "2.13.0"), Check("driver", "none [yet]", "absent")]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    fit = CliRunner().invoke(app, ["doctor"])
    assert fit.exit_code == 0
    assert "none [yet]" in fit.output
    checks.append(Check("gloo", "timed out", "failed", "open the firewall"))
    unfit = CliRunner().invoke(app, ["doctor"])
    assert unfit.exit_code == 1
    assert "open the firewall" in unfit.output
