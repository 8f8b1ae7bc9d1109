"""The parts of compressed communication that need one process: messages, codecs, choices, errors."""

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata
from torch.distributed.fsdp import fully_shard

from dtrain.comm import CommConfig, attach, attached
from dtrain.comm.choose import Cost, crossing, pick
from dtrain.comm.codec import Cast, Codec, Quantised
from dtrain.comm.config import PRESETS, scheme_of
from dtrain.comm.feedback import Residual
from dtrain.comm.meter import Meter
from dtrain.comm.packing import Packing, Segment
from dtrain.comm.reference import Reference
from dtrain.kernels.payload import Format
from dtrain.sharding.mesh import MeshConfig, build_mesh

CODECS: dict[str, tuple[Codec, float]] = {
    "fp32": (Cast(torch.float32), 1e-6),
    "bf16": (Cast(torch.bfloat16), 2**-8),
    "int8": (Quantised(Format("int8")), 0.01),
    "fp8": (Quantised(Format("fp8")), 0.04),
    "int4": (Quantised(Format("int4", 128, 32)), 0.2),
}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("n", [1, 31, 128, 1000])
def test_a_codec_sums_rows_within_its_error(name: str, n: int) -> None:
    codec, limit = CODECS[name]
    torch.manual_seed(n)
    rows = torch.randn(3, 2, n)  # of 3 ranks, 2 rows each
    payloads = torch.empty(3, 2, codec.wire_bytes(n), dtype=torch.uint8)
    assert codec.wire_bytes(n) % 16 == 0
    for rank in range(3):
        codec.encode(rows[rank].clone(), payloads[rank])
    out = torch.empty(2, n)
    codec.decode_sum(payloads, out, divide=3)
    assert relative(out, rows.mean(dim=0)) <= limit
    added = torch.ones(2, n)
    codec.decode_add(payloads[0], added)
    assert relative(added - 1, rows[0]) <= limit + 1e-6


def test_a_cast_sums_in_fp32_and_in_the_order_of_ranks() -> None:
    rows = torch.tensor([[1.0], [2.0**-9], [2.0**-9], [-1.0]])  # in bf16, 1 + 2^-9 would be 1
    codec = Cast(torch.bfloat16)
    payloads = torch.empty(4, 1, 16, dtype=torch.uint8)
    codec.encode(rows, payloads[:, 0])
    out = torch.empty(1, 1)
    codec.decode_sum(payloads, out)
    assert float(out) == 2.0**-8
    half = torch.empty(1, 1, dtype=torch.bfloat16)
    codec.decode_sum(payloads, half)
    assert float(half) == 2.0**-8


def test_exact_parameters_travel_as_they_are_and_set_no_scale() -> None:
    torch.manual_seed(0)
    segments = [Segment(100, False), Segment(3, True), Segment(5, True), Segment(60, False), Segment(0, True)]
    packing = Packing(segments, Quantised(Format("int8")), torch.float32)
    assert packing.exact_ranges == [(100, 108)]
    assert packing.message_bytes == Quantised(Format("int8")).wire_bytes(168) + 32
    rows = torch.randn(2, 168)
    rows[:, 100:108] *= 1e6
    expected = rows.clone()
    messages, out = packing.empty(2, rows.device), torch.empty(2, 168)
    packing.pack(rows, messages)
    packing.unpack(messages, out)
    assert torch.equal(out[:, 100:108], expected[:, 100:108])
    others = [*range(100), *range(108, 168)]
    assert relative(out[:, others], expected[:, others]) < 0.01
    packing.unpack_sum(messages[:, None], out[:1], divide=2)
    assert torch.equal(out[0, 100:108], expected[:, 100:108].sum(dim=0) / 2)


def test_what_is_all_exact_has_no_payload() -> None:
    packing = Packing([Segment(7, True)], Quantised(Format("int4")), torch.bfloat16)
    assert packing.all_exact
    assert packing.message_bytes == 16
    rows = torch.arange(7.0)[None]
    messages, out = packing.empty(1, rows.device), torch.empty(1, 7)
    packing.pack(rows.clone(), messages)
    packing.unpack(messages, out)
    assert torch.equal(out, rows)


def test_a_residual_begins_anew_with_other_parameters_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    residual = Residual("blocks.0", Quantised(Format("int4")), "bf16")
    device = torch.device("cpu")
    first = residual.take((0, 1), 2, 100, device)
    assert first is not None
    first.fill_(3)
    assert residual.take((0, 1), 2, 100, device) is first
    with caplog.at_level(logging.WARNING):
        other = residual.take((0,), 2, 60, device)
    assert other is not None
    assert float(other.abs().sum()) == 0
    assert residual.restarts == 1
    assert "blocks.0" in caplog.text
    assert Residual("x", Cast(torch.bfloat16), "bf16").take((0,), 1, 1, device) is None


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_a_restored_residual_is_the_saved_one(storage: str) -> None:
    device, codec = torch.device("cpu"), Quantised(Format("int4"))
    residual = Residual("a", codec, storage)  # type: ignore[arg-type]
    tensor = residual.take((0,), 2, 100, device)
    assert tensor is not None
    tensor.view(torch.uint8).random_(0, 100)
    assert residual.state is not None
    other = Residual("a", codec, storage)  # type: ignore[arg-type]
    other.restore(*(x.clone() if isinstance(x, Tensor) else x for x in residual.state))  # type: ignore[arg-type]
    again = other.take((0,), 2, 100, device)
    assert again is not None
    assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8))
    assert other.restarts == 0


def test_what_was_cut_otherwise_begins_anew(
    caplog: pytest.LogCaptureFixture, single_process_group: None
) -> None:
    """As on as many ranks before, but with a table that was padded."""
    residual = Residual("blocks.0", Quantised(Format("int4")), "bf16")
    residual.restore((0, 1), torch.ones(999, dtype=torch.uint8))
    tensor = residual.take((0, 1), 2, 100, torch.device("cpu"))
    assert tensor is not None
    assert float(tensor.abs().sum()) == 0
    model, mesh = nn.Sequential(nn.Linear(64, 64)), build_mesh(MeshConfig(), 1, "cpu")
    fully_shard(model, mesh=mesh)
    state = attach(model, mesh, CommConfig(preset="int4-delta", reference="int8", exact_below=0)).state
    ((unit, gather),) = state._gathers
    fits = TensorStorageMetadata(TensorProperties(), torch.Size((1, gather.reference.packed_bytes)), [])
    assert list(state.room({f"reference.{unit.name}": fits})) == [f"reference.{unit.name}"]
    padded = TensorStorageMetadata(TensorProperties(), torch.Size((1, 2 * fits.size[1])), [])
    assert state.room({f"reference.{unit.name}": padded}) == {}
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [
        "comm: blocks.0 was cut otherwise: its error feedback begins anew.",
        "comm: (root) was cut otherwise: its reference begins anew.",
    ]


@pytest.mark.parametrize("keep", ["bf16", "int8"])
def test_a_reference_follows_differences_without_piling_up_errors(keep: str) -> None:
    torch.manual_seed(0)
    masters, codec = torch.randn(2, 300), Quantised(Format("int4", 256))
    reference = Reference(keep, 300)  # type: ignore[arg-type]
    reference.begin(reference.pack(masters))
    payloads = torch.empty(2, codec.wire_bytes(300), dtype=torch.uint8)
    errors = []
    for _ in range(30):
        masters = masters + 0.01 * torch.randn_like(masters)
        for rank in range(2):
            codec.encode(masters[rank : rank + 1], payloads[rank : rank + 1], minus=reference.own(rank))
        reference.add(payloads, codec)
        out = torch.empty_like(masters)
        reference.read(out)
        errors.append(relative(out, masters))
    assert max(errors[-5:]) < 1.5 * max(errors[:5])
    assert errors[-1] < {"bf16": 0.004, "int8": 0.01}[keep]


# Costs of one axis: (preset, bytes, seconds). At 1 byte a second compression wins, at 1e9 it does not.
COSTS = [Cost("none", 600, 0.0), Cost("int8", 300, 10.0), Cost("int4-delta", 100, 40.0)]


@pytest.mark.parametrize(("rate", "preset"), [(1.0, "int4-delta"), (10.0, "int8"), (1e9, "none")])
def test_the_cheapest_is_picked(rate: float, preset: str) -> None:
    assert pick(COSTS, rate).preset == preset


def test_a_gain_within_the_margin_is_none() -> None:
    assert pick([Cost("none", 100, 0.0), Cost("int8", 97, 0.0)], 1.0).preset == "none"
    assert pick([Cost("none", 100, 0.0), Cost("int8", 90, 0.0)], 1.0).preset == "int8"


def test_the_rate_at_which_the_choice_changes() -> None:
    found = crossing(COSTS, COSTS[2])
    assert found is not None
    rate, preset = found
    assert preset == "int8"
    assert COSTS[2].at(rate) == pytest.approx(COSTS[1].at(rate))
    assert crossing(COSTS, COSTS[0]) is None


def test_presets_and_their_feedback() -> None:
    assert set(PRESETS) == {"none", "bf16", "int8", "int8-int4", "int4-delta", "auto"}
    assert scheme_of(CommConfig(), "none") is None
    kept = {p: scheme_of(CommConfig(), p).feedback for p in ("bf16", "int8", "int8-int4", "int4-delta")}  # type: ignore[union-attr]
    assert kept == {"bf16": "none", "int8": "none", "int8-int4": "int8", "int4-delta": "int8"}
    off = scheme_of(CommConfig(error_feedback="none"), "int8-int4")
    assert off is not None
    assert off.feedback == "none"


def test_errors_name_the_field_and_the_fix(single_process_group: None) -> None:
    with pytest.raises(ValueError, match=r"comm.exact_below = -1: must be 0 or more"):
        CommConfig(exact_below=-1)
    with pytest.raises(ValueError, match=r"comm.preset = 'int4': must be one of 'none', 'bf16'"):
        CommConfig(preset="int4")  # type: ignore[arg-type]
    model, mesh = nn.Sequential(nn.Linear(4, 4)), build_mesh(MeshConfig(), 1, "cpu")
    with pytest.raises(ValueError, match="apply fully_shard"):
        attach(model, mesh, CommConfig(preset="int8"))
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"comm.exact: 'nrom\*' matches no parameter"):
        attach(model, mesh, CommConfig(preset="int8", exact=("nrom*",)))
    assert attached(model) is None
    comm = attach(model, mesh, CommConfig(preset="int8"))
    assert attached(model) is comm
    assert any("one rank" in line for line in comm.said)
    with pytest.raises(ValueError, match="attach once"):
        attach(model, mesh, CommConfig(preset="int8"))


def test_the_meter_counts_and_begins_anew() -> None:
    meter = Meter()
    meter.expect("a", "gather")
    meter.sent("a", "gather", 2**20, 2**22)
    meter.sent("a", "reduce", 2**20, 2**21)
    meter.error("reduce", torch.tensor([3.0]), torch.tensor([30.0, 40.0]))
    meter.non_finite(torch.tensor(2))
    read = meter.read(steps=2)
    assert read["wire_mib"] == 1
    assert read["wire_mib_gather"] == 0.5
    assert read["wire_ratio"] == 3
    assert read["wire_error_reduce"] == pytest.approx(0.06)
    assert (read["wire_non_finite"], read["wire_uncompressed"]) == (2, 0)
    assert meter.read()["wire_mib"] == 0


def test_the_model_is_freed_with_what_is_attached(single_process_group: None) -> None:
    import gc
    import weakref

    model, mesh = nn.Sequential(nn.Linear(4, 4)), build_mesh(MeshConfig(), 1, "cpu")
    fully_shard(model, mesh=mesh)
    attach(model, mesh, CommConfig(preset="int8-int4"))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
