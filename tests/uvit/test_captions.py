"""Byte contexts are frozen; a user's own encoder is found, and checked."""

import logging
import sys

import pytest
import torch

from uvit import captions
from uvit.captions import byte_context, text_encoder


def test_context_is_deterministic_and_tells_captions_apart():
    texts = ["a red circle", "a red circlf", "der rote Kreis", "赤い丸"]
    context = byte_context(texts, 32, 24)
    assert context.shape == (4, 32, 24)
    assert context.dtype == torch.float32
    captions._tables.cache_clear()
    assert torch.equal(context, byte_context(texts, 32, 24))
    assert torch.equal(context[0], byte_context(texts[:1], 32, 24)[0])  # alone or in company
    differing = (context[0] != context[1]).any(-1)
    assert differing.nonzero().flatten().tolist() == [11]


def test_empty_caption_is_zero_and_padding_too():
    context = byte_context(["", "ab", "赤"], 8, 16)
    used = (context != 0).any(-1).sum(-1)
    assert used.tolist() == [0, 2, 3]  # the last is three bytes
    assert byte_context([], 8, 16).shape == (0, 8, 16)


@pytest.mark.parametrize("dim", [64, 65])
def test_values_have_unit_mean_square(dim):
    context = byte_context(["".join(map(chr, range(128)))], 128, dim)
    assert context.square().mean().item() == pytest.approx(1, abs=0.05)


def test_order_of_the_letters_counts():
    context = byte_context(["ab", "ba"], 2, 16)
    assert not torch.allclose(context[0].sum(0), context[1].flip(0)[0])
    assert not torch.allclose(context[0, 0], context[1, 1])


def test_long_captions_are_cut_and_it_is_said_once(caplog):
    captions._say_cut.cache_clear()
    with caplog.at_level(logging.WARNING):
        long = byte_context(["x" * 9, "x" * 10], 4, 8)
    assert torch.equal(long[0], byte_context(["xxxx"], 4, 8)[0])
    assert len(caplog.records) == 1
    assert "more than 4 bytes" in caplog.text


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "my_text_model.py").write_text(
        "import torch\n"
        "def encode(captions):\n"
        "    return torch.tensor([[[len(c), 0.0]] * 3 for c in captions])\n"
        "def wrong(captions):\n"
        "    return torch.zeros(len(captions), 5, 2)\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_text_model", None)


def test_encoders_are_found_by_name(plugin):
    assert torch.equal(text_encoder("bytes", 8, 4)(["ab"]), byte_context(["ab"], 8, 4))
    assert text_encoder("my_text_model:encode", 3, 2)(["ab", ""])[:, 0, 0].tolist() == [2, 0]


def test_wrong_encoders_are_named(plugin):
    with pytest.raises(ValueError, match=r"gave \(2, 5, 2\) where the model reads \(2, 3, 2\)"):
        text_encoder("my_text_model:wrong", 3, 2)(["a", "b"])
    for name, message in [
        ("clip", 'neither "bytes" nor "module:function"'),
        ("no_such_module_here:f", "No module named"),
        ("my_text_model:missing", "no attribute 'missing'"),
        ("my_text_model:number", "not a function"),
    ]:
        with pytest.raises(ValueError, match=message):
            text_encoder(name, 3, 2)
