"""Tables about a config on the terminal: every field, or the rows of a plan."""

import itertools
from collections.abc import Iterable
from dataclasses import MISSING
from typing import Any

import rich
from rich.markup import escape
from rich.table import Table

from dtrain.config.run import ConfigError, config_type, document_type, find_factory
from dtrain.config.schema import Field, hints, leaves, nearest
from dtrain.config.tables import did_you_mean
from dtrain.config.toml import emit_value


def fields(section: str | None = None, recipe: str | None = None) -> list[Field]:
    """The config's fields, in order.

    Args:
        section: only those of this table, or this one field; all when absent.
        recipe: "package.module:factory" whose tables are listed too.

    Raises:
        ConfigError: there is no such section.
    """
    document = document_type(config_type(find_factory(recipe)) if recipe else None)
    found = list(leaves(document))
    if section is None:
        return found
    chosen = [f for f in found if f.path == section or f.path.startswith(f"{section}.")]
    if not chosen:
        names = list(hints(document))
        hint = did_you_mean(nearest(section, names)) or f" (there are {', '.join(names)})"
        raise ConfigError(f"{section}: no such section or field{hint}")
    return chosen


def show_fields(section: str | None = None, recipe: str | None = None) -> None:
    """Print `fields` as a table."""
    table = Table("field", "what it is", header_style="bold")
    table.columns[0].no_wrap = True
    listed = fields(section, recipe)
    for _, group in itertools.groupby(listed, key=lambda entry: entry.path.partition(".")[0]):
        for entry in group:
            kind = escape(f"{entry.type}; {_default(entry.default)}")
            table.add_row(escape(entry.path), f"{escape(entry.help)}\n[dim]{kind}[/dim]".strip())
        table.add_section()
    rich.print(table)
    if recipe is None and section is None:
        rich.print("A recipe adds its own tables: list them with --recipe package.module:factory.")


def show_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print (what, value) rows as a table."""
    table = Table(title=title, show_header=False, title_justify="left")
    for what, value in rows:
        table.add_row(what, escape(value))
    rich.print(table)


def _default(value: Any) -> str:
    if value is MISSING:
        return "required"
    return "default " + ("none" if value is None else emit_value(value))
