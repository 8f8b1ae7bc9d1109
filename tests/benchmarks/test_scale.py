"""The model of step time: its bytes are the codecs', its limits are right, and it says that it is a model.

And the measured overlap of collectives with compute: spans that are known, and the run at a tiny size.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.result import Measurement, Result
from benchmarks.scale.__main__ import main
from benchmarks.scale.cluster import Cluster, all_to_all, rings
from benchmarks.scale.codecs import CodecRates, Moved, measured_rates
from benchmarks.scale.overlap import shares
from benchmarks.scale.step import StepTime, Workload, step_time
from benchmarks.scale.timeline import beside, total, union
from benchmarks.scale.variants import BASELINE, Variant, unit, variants
from benchmarks.sweep.run import Sweep
from tests.launch import run_python

FREE = {"collective_s": 0.0, "port_hop_s": 0.0, "link_hop_s": 0.0, "message_s": 0.0}
RATES = CodecRates({}, 2e12, "assumed")
WORK = Workload(parameters=2**28, units=16, tokens=4096, flops=4e14)
BY_NAME = {(v.name, v.levels): v for v in variants()}
PRESETS = [v for v in variants() if v.scheme]


def ids(variant: Variant) -> str:
    return f"{variant.name}-{variant.levels}"


def times(cluster: Cluster) -> dict[Variant, StepTime]:
    return {v: step_time(v, WORK, cluster, RATES) for v in variants()}


@pytest.mark.parametrize("variant", [v for v in PRESETS if v.levels == 1], ids=ids)
@pytest.mark.parametrize("gpus", [8, 1024])
def test_bytes_are_those_of_the_scheme(variant: Variant, gpus: int) -> None:
    assert variant.scheme
    sent = unit(variant, Cluster(gpus, per_node=1), 2**24).port_bytes
    assert sent == variant.scheme.wire_bytes(2**24, gpus)


def test_bytes_of_fsdp2_are_those_of_its_dtypes() -> None:
    for name, per_number in (("fsdp2-fp32", 8), ("fsdp2-bf16", 6)):
        sent = unit(BY_NAME[name, 0], Cluster(16, per_node=1), 2**24).port_bytes
        assert sent == per_number * 2**24 * 15 / 16


def test_ports_of_a_node_share_what_rings_bring_and_not_what_others_send() -> None:
    """Counted message by message on 3 nodes of 4."""
    cluster = Cluster(12, per_node=4)
    ranks = range(12)
    # A ring enters a node with each message from elsewhere once; 4 rings share them.
    ring = sum(source // 4 != 0 for source in ranks) / 4
    direct = sum(target // 4 != 0 for target in ranks)
    assert rings(cluster, 16)[:2] == (16 * ring, 16 * 11)
    assert all_to_all(cluster, 16).port_bytes == 16 * direct
    assert all_to_all(cluster, 16).link_bytes == 16 * 3
    assert all_to_all(cluster, 16, inside=False)[:2] == (16 * 2, 0)
    assert all_to_all(cluster, 16, between=False)[:2] == (0, 16 * 3)


def test_latencies_are_those_of_every_hop_and_message() -> None:
    cluster = Cluster(12, 4, 1e3, 1e3, collective_s=1.0, port_hop_s=10.0, link_hop_s=100.0, message_s=1000.0)
    # A ring of 12 crosses between the 3 nodes twice before the last has the first's message.
    assert cluster.seconds(rings(cluster, 0)) == 1 + 2 * 10 + 9 * 100
    assert cluster.seconds(all_to_all(cluster, 0)) == 1 + 10 + 8 * 1000
    assert cluster.seconds(all_to_all(cluster, 0, between=False)) == 1 + 100
    assert cluster.seconds(all_to_all(cluster, 500, inside=False)) == 1 + 10 + 2 * 1000 + 1
    assert rings(Cluster(1), 16) == all_to_all(Cluster(1), 16) == (0, 0, 0)


@pytest.mark.parametrize("variant", [v for v in PRESETS if v.levels == 2], ids=ids)
def test_two_levels_send_between_nodes_what_a_node_has_summed(variant: Variant) -> None:
    cluster, n = Cluster(64), 2**24 // 64
    scheme = variant.scheme
    assert scheme
    inside, between = unit(variant, cluster, 2**24).reduce
    assert inside[:2] == (0, 7 * 8 * scheme.inside.wire_bytes(n))
    assert between[:2] == (7 * scheme.gradients.wire_bytes(n), 0)


def test_on_links_without_end_presets_differ_by_their_codecs_alone() -> None:
    found = times(Cluster(64, port_rate=1e30, link_rate=1e30, **FREE))
    for time in found.values():
        assert time.step - time.compute == pytest.approx(time.codecs, rel=1e-9, abs=1e-15)
    assert found[BY_NAME[BASELINE, 0]].codecs == 0
    assert len({found[v].codecs for v in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize("per_node", [1, 8])
def test_on_slow_links_the_gain_is_the_ratio_of_bytes(per_node: int) -> None:
    found = times(Cluster(64, per_node=per_node, port_rate=1e3, **FREE))
    base = found[BY_NAME[BASELINE, 0]]
    for time in found.values():
        assert base.step / time.step == pytest.approx(base.port_bytes / time.port_bytes, rel=1e-3)
    if per_node == 1:
        best = base.port_bytes / found[BY_NAME["int4-delta", 1]].port_bytes
        assert best == pytest.approx(6 / (0.5 + 2 / 256 + 0.5 + 2 / 128), rel=1e-3)


def test_compute_hides_all_but_the_ends() -> None:
    variant, cluster = BY_NAME["int8", 1], Cluster(16, **FREE)
    one = unit(variant, cluster, WORK.parameters // WORK.units)
    ends = sum(cluster.seconds(t) for t in (one.forward, one.backward, *one.reduce))
    slow = dataclasses.replace(WORK, flops=1e12)
    assert step_time(variant, slow, cluster, RATES).exposed == pytest.approx(ends)
    fast = dataclasses.replace(WORK, flops=1e30)
    assert step_time(variant, fast, cluster, RATES).exposed == pytest.approx(16 * ends)
    # In between, a backward hides its gather and its sum together, and not each by itself.
    gather, back = cluster.seconds(one.forward), ends - cluster.seconds(one.forward)
    level = dataclasses.replace(WORK, flops=WORK.flops * WORK.forward_s / gather)
    assert step_time(variant, level, cluster, RATES).exposed == pytest.approx(
        ends + 15 * max(0, back - 2 * gather)
    )
    assert back > 2 * gather


@pytest.mark.parametrize("variant", PRESETS, ids=ids)
def test_codecs_pass_over_every_number_and_no_more_often_than_they_must(variant: Variant) -> None:
    """In bytes a parameter: every row is read once to be sent, and decoded where it arrives."""
    n = 2**24
    moved = unit(variant, Cluster(64), n).codecs
    per_number = sum(vars(moved).values()) / n
    gathers = {"bf16": 0, "int8": 2 * 3, "int8-int4": 2 * 3, "int4-delta": 4.5 + 4 + 4}[variant.name]
    sums = {"bf16": 6 + 10, "int8": 5 + 1, "int8-int4": 4.5 + 2 + 0.5, "int4-delta": 4.5 + 2 + 0.5}
    own = gathers + sums[variant.name]  # and a 64th of some more, for the numbers that a rank keeps
    if variant.levels == 1:
        assert own <= per_number <= 1.05 * own + 0.5
    else:
        assert per_number > own


def test_rates_that_were_measured_are_taken_over_assumed_ones(result: Result, tmp_path: Path) -> None:
    def measured(case: str, rate: float, kind: str = "cuda") -> Result:
        value = Measurement(rate, rate, rate, "GB/s", "higher", (rate,))
        device = dataclasses.replace(result.device, kind=kind, name="H100")
        gates = tuple(dataclasses.replace(g, passed=True) for g in result.gates)
        contestants = {"dtrain": {"bandwidth": value}}
        return dataclasses.replace(result, case=case, contestants=contestants, device=device, gates=gates)

    def write(*results: Result) -> None:
        path.write_text(json.dumps(dataclasses.asdict(Sweep(1, results, (), 1.0))))

    path = tmp_path / "fused.json"
    names = [("quantize_encode_int8", 1000.0), ("quantize_encode_int4", 2000.0), ("norm_forward", 9.0)]
    write(*(measured(*name) for name in names))
    rates = measured_rates(path, 1e9)
    assert rates.by_kind == {"encode": 1.5e12}
    assert rates.seconds(Moved(encode=1.5e12, decode_sum=2e9)) == pytest.approx(3)
    assert "H100" in rates.said
    write(measured("quantize_encode_int8", 1.0, "cpu"))
    with pytest.raises(ValueError, match="measured on a GPU"):
        measured_rates(path, 1e9)


def test_it_says_everywhere_that_it_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--gpus", "8", "64", "--gbit", "25", "100"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("MODEL, not a measurement.")
    assert said.count("MODEL: ") == 2
    saved = json.loads((tmp_path / "scale.json").read_text())
    assert saved["kind"] == "model"
    assert len(saved["points"]) == 2 * (6 + 10)
    assert "400 TFLOP/s" in saved["assumptions"][0]
    assert {p["gain"] for p in saved["points"] if p["variant"] == BASELINE} == {1.0}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "12"], "gpus = 12: must be a multiple of per_node = 8"),
        (["--tokens", "0"], "tokens = 0: must be above 0"),
        (["--gbit", "-1"], "port_rate"),
        (["--codec-share", "2"], "codec-share = 2.0"),
        (["--codecs", "nowhere.json"], "codecs = nowhere.json: no such file"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_spans_beside_each_other() -> None:
    spans = [(4.0, 6.0), (0.0, 2.0), (1.0, 3.0), (5.0, 5.5)]
    assert union(spans) == [(0.0, 3.0), (4.0, 6.0)]
    assert total(spans) == 5
    assert beside(spans, [(2.5, 4.5), (4.0, 5.0), (7.0, 8.0)]) == pytest.approx(0.5 + 1)
    assert beside([(0.0, 1.0)], [(1.0, 2.0)]) == 0


def test_shares_of_a_step() -> None:
    spans = {"step": [(0.0, 10.0)], "gather": [(0.0, 2.0), (3.0, 5.0)], "reduce": [(4.0, 8.0)]}
    found = shares(spans | {"compute": [(2.0, 4.5), (6.0, 7.0)]})
    assert found == {
        "step_ms": 10, "compute_ms": 3.5, "gather_ms": 4, "reduce_ms": 4, "collective_ms": 7,
        "beside_ms": 2.5, "share_beside": pytest.approx(2.5 / 7),
    }  # fmt: skip


@pytest.mark.distributed
def test_the_overlap_is_rehearsed_on_two_ranks(tmp_path: Path) -> None:
    """On a CPU nothing is beside anything, and everything is within the step."""
    run_python("-m", "benchmarks.scale.overlap", "--device", "cpu", "--out", tmp_path, "--steps", "1")
    saved = json.loads((tmp_path / "overlap.json").read_text())
    assert saved["kind"] == "rehearsal"
    assert [one["preset"] for one in saved["overlaps"]] == ["none", "int8", "int8-int4", "int4-delta"]
    for one in saved["overlaps"]:
        assert one["beside_ms"] == one["share_beside"] == 0
        assert 0 < one["gather_ms"] + one["reduce_ms"] == pytest.approx(one["collective_ms"])
        assert 0 < one["compute_ms"] < one["step_ms"] - one["collective_ms"]
        assert (one["codec_ms"] > 0) == (one["preset"] != "none")


def test_an_overlap_of_one_rank_is_refused() -> None:
    done = run_python("-m", "benchmarks.scale.overlap", "--ranks", "1", check=False)
    assert done.returncode == 2
    assert "ranks 2 or more" in done.stderr
