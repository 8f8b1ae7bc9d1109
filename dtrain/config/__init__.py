"""A run's config: TOML files to checked dataclasses and back."""

from dtrain.config.run import (
    ConfigError,
    RunConfig,
    build_recipe,
    check_world,
    config_type,
    document_type,
    find_factory,
    from_table,
    load,
    override,
    to_toml,
)

__all__ = [
    "ConfigError", "RunConfig", "build_recipe", "check_world", "config_type", "document_type", "find_factory",
    "from_table", "load", "override", "to_toml",
]  # fmt: skip
