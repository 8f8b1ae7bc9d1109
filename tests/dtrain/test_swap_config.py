"""The [attention] and [fusion] tables of a run."""

import pytest

from dtrain.config import ConfigError, from_table
from dtrain.dryrun import dry_run
from dtrain.swap.attention import AttentionConfig
from dtrain.swap.fusion import FusionConfig


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "swapped 3 x Block (backend auto)"),
        ({"backend": "reference"}, "swapped 3 x Block (backend reference)"),
        ({"swap": False}, "the model's own"),
    ],
)
def test_the_table_of_a_run(table: dict, said: str) -> None:
    config = from_table({"recipe": "tests.dtrain.tiny_dit:recipe", "name": "run", "attention": table})
    assert config.attention == AttentionConfig(**table)
    assert dict(dry_run(config, 1))["attention"] == said


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "swapped 6 x LayerNorm, 3 x Sequential (backend auto)"),
        ({"backend": "reference"}, "swapped 6 x LayerNorm, 3 x Sequential (backend reference)"),
        ({"swap": False}, "the model's own"),
    ],
)
def test_the_fusion_table_of_a_run(table: dict, said: str) -> None:
    config = from_table({"recipe": "tests.dtrain.tiny_dit:recipe", "name": "run", "fusion": table})
    assert config.fusion == FusionConfig(**table)
    assert dict(dry_run(config, 1))["norms and MLPs"] == said


@pytest.mark.parametrize("name", ["attention", "fusion"])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"backend": "tritn"}, '{name}.backend = "tritn": must be .* did you mean triton'),
        ({"swap": False, "backend": "triton"}, "backend = triton: without effect while swap = false"),
    ],
)
def test_mistakes_in_a_table(name: str, table: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("{name}", name)):
        from_table({"recipe": "tests.dtrain.tiny_dit:recipe", "name": "run", name: table})
