"""The [attention] table of a run."""

import pytest

from dtrain.config import ConfigError, from_table
from dtrain.dryrun import dry_run
from dtrain.swap.attention import AttentionConfig


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
    ("table", "message"),
    [
        ({"backend": "tritn"}, 'attention.backend = "tritn": must be .* did you mean triton'),
        ({"swap": False, "backend": "triton"}, "backend = triton: without effect while swap = false"),
    ],
)
def test_mistakes_in_the_table(table: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_table({"recipe": "tests.dtrain.tiny_dit:recipe", "name": "run", "attention": table})
