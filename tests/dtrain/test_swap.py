"""Third-party models with their attention swapped compute what they computed, through our attention."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dtrain.activations.policy import ActivationConfig
from dtrain.kernels.attention import attention
from dtrain.parallelize import ParallelConfig, parallelize
from dtrain.sharding.mesh import MeshConfig, build_mesh
from dtrain.swap import calls as swap_calls
from dtrain.swap import packed
from dtrain.swap.attention import AttentionConfig, swap_attention
from dtrain.swap.report import Swap
from tests.dtrain import third_party as made
from tests.dtrain.sharded_worker import tiny_dit
from tests.dtrain.third_party import Fused, Packed, assert_same, filled, loss

NO_PADDING = "a mask that is no key padding, or that cannot be read while compiling"

# model, layers swapped, calls of our attention in a forward pass, what keeps some of its calls
MODELS: list[tuple[Callable[[], made.Made], int, int, dict[str, set[str]]]] = [
    (made.dit, 2, 2, {}),
    (made.wan, 4, 4, {}),
    (made.wan_image, 4, 6, {}),
    (made.cogvideox, 2, 2, {}),
    # one block of two streams and two of one, each sample with keys of its own; one text refiner
    (made.hunyuan_video, 4, 6, {"AttnProcessor2_0": {NO_PADDING}}),
    (made.pixart, 4, 2, {"AttnProcessor2_0": {NO_PADDING}}),
    (made.packed, 2, 2, {}),
    (made.fused, 2, 2, {}),
]
NAMES = [row[0].__name__ for row in MODELS]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], ...]]:
    """Sizes of q and k in every call of our attention from a swapped layer."""
    seen: list[tuple[tuple[int, ...], ...]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((tuple(q.shape), tuple(k.shape)))
        return attention(q, k, v, **options)

    for module in (swap_calls, packed):
        monkeypatch.setattr(module, "attention", spy)
    return seen


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(("make", "layers", "count", "kept"), MODELS, ids=NAMES)
def test_loss_and_every_gradient_equal(
    calls: list, backend: Any, make: Callable, layers: int, count: int, kept: dict
) -> None:
    model, inputs = filled(make)
    swapped = copy.deepcopy(model)
    done = swap_attention(swapped, backend)
    calls.clear()  # those of probes
    assert_same(model, swapped, inputs)
    assert (len(done.swapped), done.left, done.kept) == (layers, {}, kept)
    assert len(calls) == count
    assert list(swapped.state_dict()) == list(model.state_dict())


def test_names_say_what_was_swapped() -> None:
    done = swap_attention(made.wan()[0])
    layers = [f"blocks.{i}.attn{j}" for i in (0, 1) for j in (1, 2)]
    assert done == Swap(dict.fromkeys(layers, "WanAttnProcessor"))
    assert str(done) == "swapped 4 x WanAttnProcessor"


def test_other_models_keep_their_attention(calls: list) -> None:
    (model, inputs), (other, _) = filled(made.dit), filled(made.dit)
    shared = model.transformer_blocks[0].attn1.processor
    for block in (*model.transformer_blocks, *other.transformer_blocks):
        block.attn1.set_processor(shared)
    swap_attention(model)
    other(**inputs)
    assert not calls
    model(**inputs)
    assert len(calls) == 2


@pytest.mark.parametrize("make", [made.wan, made.packed, made.fused])
def test_a_second_swap_changes_the_backend(calls: list, make: Callable) -> None:
    model, inputs = filled(make)
    swap_attention(model, "reference")
    count = len(swap_attention(model, "triton").swapped)
    with pytest.raises(ValueError, match="backend = 'triton'"):
        loss(model, inputs)
    assert swap_attention(model, "sdpa").left == {}
    calls.clear()
    loss(model, inputs)
    assert len(calls) == count


def test_a_meta_model_is_swapped_and_filled_later(calls: list) -> None:
    model, inputs = filled(made.packed)
    with torch.device("meta"):
        swapped, _ = made.packed()
    swap_attention(swapped, "reference")
    swapped.to_empty(device="cpu").load_state_dict(model.state_dict())
    calls.clear()  # those of probes
    assert_same(model, swapped, inputs)
    assert len(calls) == 2


def test_queries_keys_and_values_are_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of DiT's projections: tokens of a head are a row of all heads apart."""
    strides = set()

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        strides.update(x.stride()[1:] for x in (q, k, v))
        return attention(q, k, v, **options)

    monkeypatch.setattr(swap_calls, "attention", spy)
    model, inputs = filled(made.dit)
    swap_attention(model)
    loss(model, inputs)
    assert strides == {(8, 16, 1)}


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ((7, 7), [(2, 19)]),  # nothing is hidden
        ((4, 4), [(2, 16)]),
        ((3,), [(1, 15)]),
        ((3, 7, 3), [(1, 15), (1, 19), (1, 15)]),
    ],
)
def test_padding_at_the_end_is_served_by_fewer_keys(calls: list, lengths: tuple, sizes: list) -> None:
    """12 tokens of video, then 7 of text of which some are padding; three blocks attend to both."""
    model, inputs = filled(lambda: made.hunyuan_video(lengths))
    swapped = copy.deepcopy(model)
    swap_attention(swapped, "reference")
    assert_same(model, swapped, inputs)
    assert [(k[0], k[2]) for _, k in calls] == 3 * sizes
    assert {q[2] for q, _ in calls} == {19}


def test_key_lengths() -> None:
    seen = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()[:, None, None]
    assert swap_calls.key_lengths(seen, 3) == (2, 3)
    seen[0, ..., 1] = False  # the same tensor, changed
    assert swap_calls.key_lengths(seen, 3) == (1, 3)
    seen[0, ..., 0] = False
    assert swap_calls.key_lengths(seen, 3) is None  # nothing is seen
    seen[0, ..., 2] = True
    assert swap_calls.key_lengths(seen, 3) is None  # not the first keys
    assert swap_calls.key_lengths(seen.float(), 3) is None
    assert swap_calls.key_lengths(seen.expand(-1, 2, -1, -1), 3) is None
    assert swap_calls.key_lengths(seen.to("meta"), 3) is None


def test_lengths_are_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = swap_calls._read_lengths
    monkeypatch.setattr(swap_calls, "_read_lengths", lambda mask: reads.append(1) or read(mask))
    model, inputs = filled(made.hunyuan_video)
    swap_attention(model)
    loss(model, inputs)
    assert len(reads) == 1


def test_what_ours_cannot_serve_is_said_once(calls: list, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Fused(24, 2, attn_drop=0.5) for _ in range(2))).train()
    with caplog.at_level(logging.WARNING, logger="dtrain.swap.attention"):
        done = swap_attention(model)
        for _ in range(2):
            model(torch.randn(2, 9, 24))
    assert not calls
    assert done.kept == {"Fused": {"dropout of attention weights"}}
    (record,) = caplog.records
    assert record.getMessage() == (
        "attention: calls of Fused with dropout of attention weights stay with PyTorch's attention"
    )
    assert "Fused keeps calls with dropout of attention weights" in str(done)
    model.eval()(torch.randn(2, 9, 24))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("why", "options"),
    [
        ("causal attention", {"is_causal": True}),
        ("queries that share heads of keys", {"heads": 1, "enable_gqa": True}),
        ("tensors that are not 4-dimensional", {"flat": True}),
        ("keys and values of different sizes", {"wide": 16}),
        (NO_PADDING, {"attn_mask": torch.ones(5, 6).tril().bool()}),
        (NO_PADDING, {"attn_mask": torch.zeros(1, 1, 1, 6)}),
    ],
)
def test_other_calls_stay_as_they_were(calls: list, why: str, options: dict) -> None:
    heads, wide = options.pop("heads", 2), options.pop("wide", 8)
    q, k, v = (torch.randn(2, h, n, d) for h, n, d in ((2, 5, 8), (heads, 6, 8), (heads, 6, wide)))
    if options.pop("flat", False):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    said: list[str] = []
    sdpa = nn.functional.scaled_dot_product_attention
    found = swap_calls.stand_in("reference", said.append)(sdpa, 2)(q, k, v, scale=0.3, **options)
    assert torch.equal(found, sdpa(q, k, v, scale=0.3, **options))
    assert (said, calls) == ([why], [])


def test_a_backend_of_diffusers_that_was_chosen_stays(calls: list) -> None:
    model, inputs = filled(made.wan)
    done = swap_attention(model)
    for layer in (f"blocks.{i}.attn{j}" for i in (0, 1) for j in (1, 2)):
        model.get_submodule(layer).set_attention_backend("_native_math")
    loss(model, inputs)
    assert done.kept == {"WanAttnProcessor": {"backend, set on the model"}}
    assert not calls


class Cosine(Packed):
    """Looks like timm's attention and is not."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-2, -1)


class Biased(Packed):
    def __init__(self) -> None:
        super().__init__(24, 2)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(1))


class Rotated(Packed):
    def forward(self, x: Tensor, rope: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * rope)


class SlotAttention(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Cosine(24, 2), "it computes something else than its parts suggest"),
        (Biased, "relative_position_bias_table may change what it computes"),
        (lambda: Rotated(24, 2), "called with tokens alone it raises TypeError"),
        (lambda: Packed(24, 2, attn_drop=0.1), "dropout of attention weights"),
        (lambda: SlotAttention(24, 24), "SlotAttention does not call PyTorch's scaled_dot_product_attention"),
        (
            lambda: nn.MultiheadAttention(24, 2),
            "MultiheadAttention does not call PyTorch's scaled_dot_product_attention",
        ),
    ],
)
def test_what_is_not_recognised_is_left_and_listed(make: Callable, why: str, caplog: Any) -> None:
    model = nn.Sequential(Packed(24, 2), make())
    forward = model[1].forward
    with caplog.at_level(logging.WARNING, logger="dtrain.swap.attention"):
        done = swap_attention(model)
    assert (done.swapped, done.left) == ({"0": "Packed"}, {"1": why})
    assert model[1].forward == forward
    assert caplog.records[0].getMessage() == f"attention: swapped 1 x Packed; left 1 (1): {why}"


def test_a_processor_of_another_kind_is_left_and_listed() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model, _ = made.dit()
    model.transformer_blocks[1].attn1.set_processor(AttnProcessor())
    done = swap_attention(model)
    assert done.swapped == {"transformer_blocks.0.attn1": "AttnProcessor2_0"}
    why = "AttnProcessor does not call PyTorch's scaled_dot_product_attention"
    assert done.left == {"transformer_blocks.1.attn1": why}


def test_a_mask_goes_to_the_original_forward(calls: list) -> None:
    model, inputs = filled(made.packed)
    mask = torch.ones(9, 9).tril().bool()
    wanted = model[0](inputs["input"], mask)
    done = swap_attention(model)
    calls.clear()  # those of probes
    assert torch.equal(model[0](inputs["input"], mask), wanted)
    assert done.kept == {"Packed": {"arguments beyond the tokens, such as a mask"}}
    assert not calls


def test_timm_without_its_fused_form(calls: list) -> None:
    model, inputs = filled(made.fused)
    for layer in model:
        layer.fused_attn = False
    swapped = copy.deepcopy(model)
    swap_attention(swapped, "reference")
    calls.clear()  # those of probes
    assert_same(model, swapped, inputs)
    assert len(calls) == 2


def test_a_forward_that_was_replaced_before_is_left() -> None:
    model, _ = made.fused()
    model[0].forward = model[0].forward
    done = swap_attention(model)
    assert done.left == {"0": "its forward was replaced before: swap the attention first"}


def test_modules_made_for_it_are_told_the_backend() -> None:
    class Ours(nn.Module):
        attention_backend = "auto"

    model = nn.Sequential(Ours())
    assert swap_attention(model, "reference").swapped == {"0": "Ours"}
    assert model[0].attention_backend == "reference"


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("make", [made.dit, made.wan, made.cogvideox, made.packed, made.fused])
def test_compiled_blocks_are_whole_graphs_and_as_many_as_before(fresh_compiler: None, make: Callable) -> None:
    model, inputs = filled(make)
    graphs, swapped = {}, copy.deepcopy(model)
    done = swap_attention(swapped, "reference")
    for net in (model, swapped):
        counter = graphs[net is swapped] = CompileCounter()
        for block in next((m for m in net.children() if isinstance(m, nn.ModuleList)), net):
            block.forward = torch.compile(block.forward, fullgraph=True, backend=counter)
    for _ in range(2):
        assert_same(model, swapped, inputs)
        model.zero_grad()
        swapped.zero_grad()
    assert graphs[True].frame_count == graphs[False].frame_count
    assert done.kept == {}


def test_a_mask_under_compile_is_said(fresh_compiler: None) -> None:
    model, inputs = filled(made.hunyuan_video)
    swapped = copy.deepcopy(model)
    done = swap_attention(swapped, "reference")
    for block in (*swapped.transformer_blocks, *swapped.single_transformer_blocks):
        block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")
    assert_same(model, swapped, inputs)
    assert done.kept["HunyuanVideoAttnProcessor2_0"] == {NO_PADDING}


@pytest.mark.parametrize(("swap", "count"), [(True, 3), (False, 0)])
def test_parallelize_swaps_first(single_process_group: None, calls: list, swap: bool, count: int) -> None:
    model, inputs = tiny_dit()
    config = ParallelConfig(AttentionConfig(swap), activations=ActivationConfig("full"))
    parallelize(model, build_mesh(MeshConfig(), 1, "cpu"), config)
    model(**inputs).sum()
    assert len(calls) == count
