"""A run's config: a TOML file and `--set` overrides, checked before any process group starts.

The tables of the file are the config dataclasses of dtrain's parts, each defined beside the code that reads
it, plus those of the recipe: the factory named by `recipe = "package.module:factory"` takes a dataclass whose
fields are its tables. Types are checked strictly: "1" is no integer, 1 is a number, an array is a tuple, and
a name that nobody reads is an error (https://docs.pydantic.dev/latest/concepts/strict_mode/).
"""

import dataclasses
import importlib
import inspect
import json
import pkgutil
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from dtrain.activations.policy import ActivationConfig
from dtrain.checkpoint import CheckpointConfig
from dtrain.comm import CommConfig
from dtrain.config.schema import child, choices, hints, nearest, words
from dtrain.config.tables import TableReader, did_you_mean
from dtrain.config.toml import emit_table, emit_value, entries_of, parse_value
from dtrain.faults.config import FaultConfig
from dtrain.metrics import MetricsConfig
from dtrain.optim import EMAConfig, OptimConfig
from dtrain.parallelize import CompileConfig
from dtrain.recipe import Recipe
from dtrain.sharding.mesh import MeshConfig
from dtrain.sharding.shard import ShardConfig
from dtrain.step import TrainConfig
from dtrain.swap.attention import AttentionConfig
from dtrain.swap.fusion import FusionConfig

# Imported where a file's values are checked: what makes its `RunConfig` in Python runs without pydantic.
if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import ValidationError


T = TypeVar("T", bound="DataclassInstance")


class ConfigError(ValueError):
    """What is wrong with a run's config, one line a problem, for people to read."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. Made by `load`."""

    recipe: str = field(metadata={"help": 'The model and its data: "package.module:factory".'})
    name: str = field(default="", metadata={"help": "The run's name; the config file's name when not given."})
    output: str = field(default="runs", metadata={"help": "Folder of all runs; this one's is output/name."})
    seed: int = field(
        default=0, metadata={"help": "Decides initial weights, data order, noise and timesteps; 0 or more."}
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    recipe_config: Any = None
    """What the recipe's factory takes: its tables, validated. None when it takes nothing."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}: must be 0 or more.")
        if self.faults.hang_s >= self.train.timeout_s:
            raise ValueError(
                f"faults.hang_s = {self.faults.hang_s}: must be less than train.timeout_s = "
                f"{self.train.timeout_s}, after which collectives fail without a word about who hangs."
            )
        if not self.name:
            raise ValueError('name = "": a run needs a name, its folder is output/name.')

    @property
    def run_dir(self) -> Path:
        """The folder that holds all this run writes."""
        return Path(self.output) / self.name


def load(path: Path | str, sets: Sequence[str] = ()) -> RunConfig:
    """Read and validate a run's config.

    Args:
        path: a TOML file; its stem is the run's name when it gives none.
        sets: overrides "section.field=value", the value in TOML or a bare string; later ones win.

    Raises:
        ConfigError: listing every problem that was found.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    for setting in sets:
        _override(table, setting)
    table.setdefault("name", path.stem)
    return from_table(table, str(path))


def from_table(table: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Validate a config that was read already; see `load`."""
    recipe_type = config_type(find_factory(table.get("recipe"), source))
    document = document_type(recipe_type)
    reader = TableReader(document)
    values = _validate(document, reader, reader.read(table), source)
    try:
        mine = {name: values.pop(name) for name in hints(RunConfig) if name in values}
        return RunConfig(**mine, recipe_config=recipe_type(**values) if recipe_type else None)
    except ValueError as error:
        _fail(source, [str(error)])


def override(config: T, options: Mapping[str, Any], source: str) -> T:
    """A config dataclass with some fields replaced, checked like a file's; ConfigError names every problem.

    Args:
        config: any dataclass that may stand in a config.
        options: new values by field name, as TOML gives them.
        source: what the message calls the place where the options come from.
    """
    reader = TableReader(type(config))
    plain = {**json.loads(json.dumps(dataclasses.asdict(config))), **reader.read(options)}
    return type(config)(**_validate(type(config), reader, plain, source))


def check_world(config: RunConfig, world: int) -> None:
    """Check that mesh and batch sizes fit `world` ranks; ConfigError says what would."""
    problems = []
    for check in (config.mesh.sizes, config.train.accumulation):
        try:
            check(world)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        _fail(f"{config.name} on {world} ranks", problems)


def build_recipe(config: RunConfig) -> Recipe:
    """Call the recipe's factory with its validated config; ConfigError for a ValueError of the factory."""
    factory = find_factory(config.recipe)
    try:
        return factory() if config.recipe_config is None else factory(config.recipe_config)
    except ValueError as error:
        raise ConfigError(f"{config.name}: {error}") from error


def to_toml(config: RunConfig) -> str:
    """The whole effective config as TOML that loads back equal."""
    own = {k: v for k, v in entries_of(config).items() if k != "recipe_config"}
    recipe = entries_of(config.recipe_config) if config.recipe_config is not None else {}
    return emit_table(own | recipe)


def find_factory(spec: Any, source: str = "config") -> Callable[..., Recipe]:
    """Import the factory that "package.module:factory" names; ConfigError when there is none."""
    if not isinstance(spec, str) or spec.count(":") != 1:
        shown = "recipe is missing" if spec is None else f"recipe = {emit_value(spec)}"
        _fail(source, [f'{shown}: it must name a factory, as in recipe = "package.module:factory"'])
    module_name, name = spec.split(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError)
        hint = did_you_mean(nearest(module_name, list(_sibling_modules(module_name))) if absent else None)
        raise ConfigError(f'recipe = "{spec}": {error}{hint}') from error
    factory = getattr(module, name, None)
    if not callable(factory):
        hint = did_you_mean(nearest(name, [n for n, _ in inspect.getmembers(module, inspect.isfunction)]))
        _fail(source, [f'recipe = "{spec}": {module_name} has no factory "{name}"{hint}'])
    return typing.cast(Callable[..., Recipe], factory)


def config_type(factory: Callable[..., Recipe]) -> type | None:
    """The dataclass that a recipe's factory takes; None when it takes nothing."""
    parameters = list(inspect.signature(factory).parameters)
    if not parameters:
        return None
    hint = typing.get_type_hints(factory).get(parameters[0])
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        raise ConfigError(
            f"recipe: the parameter {parameters[0]} of {factory.__module__}:{factory.__qualname__} must be "
            "annotated with a dataclass whose fields are the recipe's tables"
        )
    clash = hints(hint).keys() & hints(RunConfig).keys()
    if clash:
        raise ConfigError(f"recipe: {hint.__qualname__} has fields {sorted(clash)}, which are dtrain's own")
    return hint


def document_type(recipe_type: type | None = None) -> type:
    """The dataclass of a whole config file: dtrain's fields, then the recipe's."""
    classes = (RunConfig, recipe_type) if recipe_type else (RunConfig,)
    fields = [
        (f.name, hints(cls)[f.name], _same_default(f))
        for cls in classes
        for f in dataclasses.fields(cls)
        if f.name in hints(cls) and f.name != "recipe_config"
    ]
    return dataclasses.make_dataclass("Document", fields, frozen=True, kw_only=True)


def _same_default(source: "dataclasses.Field[Any]") -> Any:
    return field(default=source.default, default_factory=source.default_factory, metadata=source.metadata)


def _override(table: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    *parents, last = path.strip().split(".")
    if not equals or not last:
        raise ConfigError(f'--set {setting}: write it as section.field=value, as in "optim.lr=1e-4"')
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {setting}: {parent} is a value, not a table")
    table[last] = parse_value(text.strip())


def _validate(document: type, reader: TableReader, plain: dict[str, Any], source: str) -> dict[str, Any]:
    """Values by field; ConfigError lists what the reader found and what is wrong with them."""
    from pydantic import TypeAdapter, ValidationError

    # Of pydantic's strict modes JSON's is the one that fits TOML: an object may stand for a dataclass and an
    # array for a tuple.
    adapter: TypeAdapter[Any] = TypeAdapter(document)
    try:
        whole = adapter.validate_json(json.dumps(plain, default=str), strict=True)
    except ValidationError as error:
        _fail(source, reader.problems + _explain(error, document, plain))
    if reader.problems:
        _fail(source, reader.problems)
    return {name: getattr(whole, name) for name in hints(document)}


def _explain(error: "ValidationError", document: type, table: dict[str, Any]) -> list[str]:
    """Pydantic's findings in one line each; the alternatives of a union make one finding, not several."""
    lines: dict[str, str] = {}
    for finding in error.errors():
        path, hint, found = _locate(document, table, finding["loc"])
        if finding["type"] == "value_error":
            message = str(finding["ctx"]["error"])
            lines.setdefault(path, message if message.startswith(path) else f"{path}: {message}")
        elif found is _ABSENT:
            lines.setdefault(path, f"{path} is missing: it must be {words(hint)}")
        else:
            near = did_you_mean(nearest(found, choices(hint)) if isinstance(found, str) else None)
            lines.setdefault(path, f"{path} = {_show(found)}: must be {words(hint)}{near}")
    return list(lines.values())


_ABSENT: Any = object()


def _locate(hint: Any, value: Any, location: tuple[int | str, ...]) -> tuple[str, Any, Any]:
    """Follow pydantic's location as far as it names real places: (path, type there, value there)."""
    path = ""
    for key in location:
        below = child(hint, key)
        if below is None or (isinstance(key, int) and key >= len(value)):
            break
        value = value[key] if isinstance(key, int) else value.get(key, _ABSENT)
        path += f"[{key}]" if isinstance(key, int) else f".{key}" if path else key
        hint = below
    return path, hint, value


def _show(value: Any) -> str:
    return '"none"' if value is None else emit_value(value)


def _sibling_modules(module_name: str) -> Iterator[str]:
    parent, _, _ = module_name.rpartition(".")
    try:
        package = importlib.import_module(parent) if parent else None
    except ImportError:
        return
    for module in pkgutil.iter_modules(getattr(package, "__path__", None)):
        yield f"{parent}.{module.name}" if parent else module.name


def _fail(source: str, problems: Sequence[str]) -> NoReturn:
    count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
    raise ConfigError(f"{source} has {count}:\n" + "\n".join(f"  {problem}" for problem in problems))
