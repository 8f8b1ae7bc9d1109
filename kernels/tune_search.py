"""The search of `tune`: which tile of each pass, and who serves, by the clock and within a budget of time.

A candidate has been judged by the compiler; it is launched, held against the fp64 reference at a small size,
and timed at a real one. The fastest few are timed again, for longer. Medians of the device's time throughout.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dtrain.kernels import tune_attention as op
from dtrain.kernels.aot import Measurement, measure
from dtrain.kernels.launch import arch_of, known_arch, triton
from dtrain.kernels.tiles import Choice, Tile

__all__ = ["Deadline", "DeviceLost", "Findings", "Timing", "Tuner", "judge"]

_log = logging.getLogger(__name__)

_FINALISTS = 3
_TILES_PART = 0.75  # of the time; the rest is for the choices
_WIDTH = 1152  # heads · head dim, about that of a model
_BATCH_TOKENS = 16384
_CHECK_TOKENS = 333  # no multiple of a block
# Lengths that are timed, and up to which length each decides.
_LENGTHS = {1024: 2048, 4096: 8192, 16384: 2**31 - 1}
_CPU_LENGTHS = {48: 2**31 - 1}
# Relative to fp64: rounding of the inputs' dtype many times over, and far below a wrong tile.
_ERROR_BOUND = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


class DeviceLost(RuntimeError):
    """No kernel runs any more in this process."""


class Deadline:
    """Seconds that a run may take; what comes after it is left out, by name."""

    def __init__(self, budget_s: float) -> None:
        self.start, self.budget_s = time.perf_counter(), budget_s
        self.left_out: list[str] = []

    def over(self, what: str, part: float = 1.0) -> bool:
        """Whether that part of the time is spent; if so, `what` is left out."""
        if time.perf_counter() - self.start < part * self.budget_s:
            return False
        self.left_out.append(what)
        return True


@dataclass(frozen=True)
class Timing:
    """One thing that was timed, or why it was not."""

    what: str
    head_dim: int
    tokens: int
    tile: Tile | None = None
    ms: float = math.inf
    problem: str = ""


@dataclass
class Findings:
    """What a run found: tiles by pass and head dim, rows of choices, and every timing."""

    tiles: dict[str, dict[int, Tile]] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    def as_file(self, arch: str) -> dict[str, Any]:
        """Of DTRAIN_TILES, see `tiles`."""
        rows = {
            name: {arch: {str(d): asdict(tile) for d, tile in sorted(found.items())}}
            for name, found in self.tiles.items()
        }
        return {"attention": rows, "choices": {arch: [asdict(choice) for choice in self.choices]}}


def judge(job: tuple[str, str, int, Tile]) -> Measurement:
    """Compile one candidate, in a process of its own."""
    return measure(op.aot_case(*job))


def _milliseconds(call: Callable[[], object], device: str, rep: int) -> float:
    """Median of the device's time; on the CPU one call, so that a rehearsal goes all the way."""
    if device == "cuda":
        return float(triton.testing.do_bench(call, warmup=rep // 2, rep=rep, return_mode="median"))
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


class Tuner:
    """One run: sizes, time left, and what was found so far."""

    def __init__(self, device: str, tokens: int, limit: int, deadline: Deadline) -> None:
        self.device, self.tokens, self.limit, self.deadline = device, tokens, limit, deadline
        self.arch = arch_of(torch.device(device))
        # bf16 products are wrong in Triton's interpreter
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float16
        self.found = Findings()

    def run(self, head_dims: Sequence[int], passes: Sequence[str], pool: Executor) -> Findings:
        groups = [(name, head_dim) for head_dim in head_dims for name in passes]
        # All at once: the next groups compile while this one is timed.
        judged = {group: self._judged(*group, pool) for group in groups}
        try:
            for name, head_dim in groups:
                if not self.deadline.over(f"tiles of {name}, head dim {head_dim}", _TILES_PART):
                    self._tile(name, head_dim, judged[name, head_dim])
            for head_dim in head_dims:
                if not self.deadline.over(f"choices of head dim {head_dim}"):
                    self._choices(head_dim)
        except DeviceLost as lost:
            _log.error("%s: no kernel runs after it; what was found before is kept", lost)
            self.deadline.left_out.append("all that was to come")
        return self.found

    def _judged(self, name: str, head_dim: int, pool: Executor) -> list[tuple[Tile, "Future[Measurement]"]]:
        arch = known_arch(self.arch)
        chosen = op.candidates(name, arch, head_dim)[: self.limit]
        return [(tile, pool.submit(judge, (name, arch, head_dim, tile))) for tile in chosen]

    def _tile(self, name: str, head_dim: int, judged: list[tuple[Tile, "Future[Measurement]"]]) -> None:
        check = self._problem(head_dim, _CHECK_TOKENS if self.device == "cuda" else 21, heads=2)
        real = self._problem(head_dim, self.tokens)
        timed: list[Timing] = []
        for tile, future in judged:
            what = f"{name}, head dim {head_dim}, {tile}"
            if timed and self.deadline.over(what, _TILES_PART):
                continue
            timing = self._timing(name, tile, future, check, real)
            self.found.timings.append(timing)
            if timing.problem:
                _log.info("%s drops out: %s", what, timing.problem)
            else:
                timed.append(timing)
        if not timed:
            _log.warning("%s, head dim %d: no candidate is left; the shipped tile stays", name, head_dim)
            return
        best = self._final(name, real, sorted(timed, key=lambda t: t.ms)[:_FINALISTS])
        assert best.tile is not None
        self.found.tiles.setdefault(name, {})[head_dim] = best.tile
        print(f"{name:15} D={head_dim:<3} {best.ms:9.3f} ms  {best.tile}", flush=True)

    def _timing(
        self, name: str, tile: Tile, future: "Future[Measurement]", check: op.Problem, real: op.Problem
    ) -> Timing:
        try:
            problems = list(future.result().problems) or _wrong(check, op.run(check, name, tile))
            if problems:
                return Timing(name, real.head_dim, real.tokens, tile, problem="; ".join(problems))
            ms = _milliseconds(lambda: op.run(real, name, tile), self.device, rep=20)
        except Exception as error:  # launches fail in many ways, and the next candidate may not
            self._still_there(f"{name}, head dim {real.head_dim}, {tile}")
            return Timing(name, real.head_dim, real.tokens, tile, problem=f"{type(error).__name__}: {error}")
        return Timing(name, real.head_dim, real.tokens, tile, ms)

    def _still_there(self, suspect: str) -> None:
        """A kernel that reads where it may not takes the GPU from the whole process."""
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise DeviceLost(f"{suspect}: {str(error).partition(chr(10))[0]}") from error

    def _final(self, name: str, real: op.Problem, finalists: list[Timing]) -> Timing:
        again = []
        for timing in finalists:
            assert timing.tile is not None
            call = _bound(op.run, real, name, timing.tile)
            ms = _milliseconds(call, self.device, rep=100)
            again.append(Timing(f"{name}, final", real.head_dim, real.tokens, timing.tile, ms))
        self.found.timings += again
        return min(again, key=lambda t: t.ms)

    def _choices(self, head_dim: int) -> None:
        for tokens, reach in (_LENGTHS if self.device == "cuda" else _CPU_LENGTHS).items():
            forms, theirs = self._ours(self._problem(head_dim, tokens)), self._theirs(head_dim, tokens)
            self._choose(head_dim, reach, False, forms, theirs)
        tokens, clips = (max(_LENGTHS), 8) if self.device == "cuda" else (max(_CPU_LENGTHS), 2)
        packed = self._problem(head_dim, tokens, clips=clips)
        self._choose(head_dim, 2**31 - 1, True, self._ours(packed), {})

    def _choose(
        self, head_dim: int, keys: int, sparse: bool, forms: Mapping[str, float], theirs: Mapping[str, float]
    ) -> None:
        if not forms:
            return
        form = min(forms, key=lambda name: forms[name])
        ours = forms[form] < min(theirs.values(), default=math.inf)
        choice = Choice(head_dim, keys, sparse, "triton" if ours else "sdpa", form)  # type: ignore[arg-type]
        self.found.choices.append(choice)
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in {**forms, **theirs}.items())
        print(f"{choice}  ({times})", flush=True)

    def _ours(self, problem: op.Problem) -> dict[str, float]:
        """Milliseconds of a pass both ways, in each form, with the tiles found here."""
        own = {
            name: rows[problem.head_dim]
            for name, rows in self.found.tiles.items()
            if problem.head_dim in rows
        }
        calls: dict[str, Callable[[], object]] = {}
        for form in ("split", "fused"):
            calls[form] = _bound(_both, problem, form, own)
        return self._times(problem, calls)

    def _theirs(self, head_dim: int, tokens: int) -> dict[str, float]:
        problem = self._problem(head_dim, tokens)
        return self._times(problem, dict(op.sdpa_calls(problem)))

    def _times(self, problem: op.Problem, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        times = {}
        for name, call in calls.items():
            what = f"{name}, both ways, {problem.clips} clips"
            try:
                times[name] = _milliseconds(call, self.device, rep=50)
                timing = Timing(what, problem.head_dim, problem.tokens, ms=times[name])
            except Exception as error:  # SDPA's kernels refuse by exceptions of many kinds
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                timing = Timing(what, problem.head_dim, problem.tokens, problem=reason)
                _log.info("%s does not serve head dim %d: %s", name, problem.head_dim, reason)
            self.found.timings.append(timing)
        return times

    def _problem(self, head_dim: int, tokens: int, heads: int = 0, clips: int = 1) -> op.Problem:
        if self.device == "cpu" or heads:
            return op.Problem(self.device, self.dtype, 1, heads or 1, tokens, head_dim, clips)
        batch = max(1, _BATCH_TOKENS // tokens)  # enough work to hide the launches
        return op.Problem(self.device, self.dtype, batch, _WIDTH // head_dim, tokens, head_dim, clips)


def _both(problem: op.Problem, form: Any, own: Mapping[str, Tile]) -> None:
    op.run_forward(problem, own.get("forward"))
    op.run_backward(problem, form, own)


def _bound(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


def _wrong(check: op.Problem, made: Mapping[str, torch.Tensor]) -> list[str]:
    bound = _ERROR_BOUND[check.dtype]
    return [f"{name} is off by {e:.1e}" for name, e in op.errors(check, made).items() if not e <= bound]
