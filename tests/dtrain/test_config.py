"""Config files: strict types, one message for all mistakes, presets, and the round trip through TOML."""

import re
import tomllib
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import nn

from dtrain.config import ConfigError, build_recipe, check_world, from_table, load, to_toml
from dtrain.config.describe import fields
from dtrain.config.schema import words
from dtrain.config.toml import emit_value, parse_value
from dtrain.optim import OptimConfig, ParamGroup
from dtrain.recipe import Recipe
from dtrain.sharding.mesh import MeshConfig


@dataclass(frozen=True)
class Noise:
    scale: float = field(default=1.0, metadata={"help": "Standard deviation."})


@dataclass(frozen=True)
class Model:
    width: int = field(default=64, metadata={"help": "Channels."})
    heads: int = 4
    patch: tuple[int, int] = (2, 2)
    positions: Literal["learned", "rope"] = "learned"
    length: int | None = 5
    noise: Noise = field(default_factory=Noise)
    rates: dict[str, float] = field(default_factory=dict)
    folder: Path = Path("data")
    size: tuple[int, ...] | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"model.heads = {self.heads}: does not divide model.width = {self.width}.")

    @staticmethod
    def presets() -> dict[str, "Model"]:
        return {"small": Model(32, 2), "large": Model(128, 8, noise=Noise(0.5), size=(1, 2))}


@dataclass(frozen=True)
class Tables:
    model: Model = field(default_factory=Model)
    frames: int = 16

    def __post_init__(self) -> None:
        if self.frames % self.model.patch[0]:
            raise ValueError(
                f"frames = {self.frames}: model.patch[0] = {self.model.patch[0]} does not divide it."
            )


@dataclass(frozen=True)
class Source:
    path: str
    classes: int = 0


@dataclass(frozen=True)
class Required:
    source: Source


def recipe_of(model: Model) -> Recipe:
    return Recipe(
        build=lambda: nn.Linear(model.width, model.heads),
        init=lambda _: None,
        loss=lambda *_: torch.zeros(()),
        data=lambda *_: [],
        flops=lambda _: 0,
    )


@pytest.fixture(autouse=True)
def _recipe_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """An importable module of recipes, as a user's own would be."""
    module = ModuleType("my_recipes")

    def video(config: Tables) -> Recipe:
        return recipe_of(config.model)

    def plain() -> Recipe:
        return recipe_of(Model())

    def needy(config: Required) -> Recipe:
        return recipe_of(Model())

    def untyped(config: int) -> Recipe:
        raise AssertionError

    @dataclass(frozen=True)
    class Clash:
        optim: int = 1

    def clashing(config: Clash) -> Recipe:
        raise AssertionError

    def failing() -> Recipe:
        raise ValueError("data.path = x: no such folder")

    clashing.__annotations__["config"] = Clash
    for factory in (video, plain, needy, untyped, clashing, failing):
        setattr(module, factory.__name__, factory)
    monkeypatch.setitem(__import__("sys").modules, "my_recipes", module)


def table(**more: Any) -> dict[str, Any]:
    return {"recipe": "my_recipes:video", "name": "run"} | more


def problems(**more: Any) -> list[str]:
    """The lines of the one message about a config."""
    with pytest.raises(ConfigError) as caught:
        from_table(table(**more), "run.toml")
    head, *lines = str(caught.value).splitlines()
    assert re.fullmatch(r"run\.toml has (a problem|\d+ problems):", head)
    return [line.strip() for line in lines]


def test_a_file_and_its_overrides(tmp_path: Path) -> None:
    path = tmp_path / "first.toml"
    path.write_text(
        'recipe = "my_recipes:video"\nframes = 8\n[optim]\nlr = 1\nbetas = [0.9, 0.99]\n[model]\nwidth=128\n'
    )
    sets = [
        "optim.lr=1e-4",
        "shard.param_dtype=bfloat16",
        "model.noise.scale = 2",
        "output=some folder/a b",
        "mesh.shard=2",
    ]
    config = load(path, sets)
    assert config.name == "first"
    assert config.run_dir == Path("some folder/a b/first")
    assert (config.optim.lr, config.optim.betas) == (1e-4, (0.9, 0.99))
    assert (config.shard.param_dtype, config.mesh) == ("bfloat16", MeshConfig(shard=2))
    assert config.recipe_config == Tables(Model(width=128, noise=Noise(2.0)), frames=8)
    assert type(config.recipe_config.model.noise.scale) is float
    assert load(path, [*sets, "name=second", "optim.lr=3"]).optim.lr == 3.0
    assert isinstance(build_recipe(config).build(), nn.Linear)


def test_a_recipe_may_take_no_config() -> None:
    config = from_table({"recipe": "my_recipes:plain", "name": "x"})
    assert config.recipe_config is None
    assert isinstance(build_recipe(config).build(), nn.Linear)


def test_presets_and_overrides() -> None:
    model = from_table(
        table(model={"preset": "large", "heads": 4, "noise": {"scale": 3}})
    ).recipe_config.model
    assert model == Model(128, 4, noise=Noise(3.0), size=(1, 2))
    assert problems(model={"preset": "larg"}) == [
        'model.preset = "larg": no such preset; did you mean large? (there are small, large)'
    ]
    assert problems(frames={"preset": "large"}) == ['frames = {preset = "large"}: must be an integer']


def test_none_is_written_as_a_word() -> None:
    assert from_table(table(model={"length": "none"})).recipe_config.model.length is None
    assert problems(model={"width": "none"}) == ['model.width = "none": must be an integer']


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"optim": {"lr": "1"}}, 'optim.lr = "1": must be a number'),
        ({"optim": {"warmup_steps": 1.0}}, "optim.warmup_steps = 1.0: must be an integer"),
        ({"optim": {"warmup_steps": True}}, "optim.warmup_steps = true: must be an integer"),
        ({"ema": {"enabled": 1}}, "ema.enabled = 1: must be true or false"),
        ({"optim": {"betas": [0.9]}}, "optim.betas = [0.9]: must be [a number, a number]"),
        ({"optim": {"betas": [0.9, "x"]}}, 'optim.betas[1] = "x": must be a number'),
        ({"optim": 3}, "optim = 3: must be a table"),
        ({"optim": {"groups": [{}, {"lr_scale": "x"}]}}, 'optim.groups[1].lr_scale = "x": must be a number'),
        (
            {"optim": {"groups": [{"lr_scal": 1}]}},
            "optim.groups[0].lr_scal = 1: no such field; did you mean optim.groups[0].lr_scale?",
        ),
        ({"optim": {"lrr": 0.1}}, "optim.lrr = 0.1: no such field; did you mean optim.lr?"),
        ({"lr": 0.1}, "lr = 0.1: no such field; did you mean optim.lr?"),
        ({"width": 3}, "width = 3: no such field; did you mean model.width?"),
        ({"train": {"width": 3}}, "train.width = 3: no such field; did you mean model.width?"),
        ({"mesh": {"zzz": 1}}, "mesh.zzz = 1: no such field (there are replicate, shard)"),
        ({"optm": {"lr": 1.0}}, "[optm]: no such table; did you mean optim?"),
        ({"modle": {}}, "[modle]: no such table; did you mean model?"),
        (
            {"optim": {"schedule": "cosin"}},
            'optim.schedule = "cosin": must be one of "constant", "linear", "cosine"; did you mean cosine?',
        ),
        ({"model": {"length": "x"}}, 'model.length = "x": must be an integer or "none"'),
        (
            {"model": {"size": "aut"}},
            'model.size = "aut": must be a list, each item an integer or one of "auto"; did you mean auto?',
        ),
        ({"model": {"rates": {"a": "b"}}}, 'model.rates.a = "b": must be a number'),
        ({"model": {"heads": 5}}, "model.heads = 5: does not divide model.width = 64."),
        ({"mesh": {"replicate": 0}}, "mesh.replicate = 0: must be 1 or more."),
        ({"frames": 15}, "frames = 15: model.patch[0] = 2 does not divide it."),
        ({"seed": -1}, "seed = -1: must be 0 or more."),
        ({"name": ""}, 'name = "": a run needs a name, its folder is output/name.'),
    ],
)
def test_one_line_says_field_value_and_fix(more: dict[str, Any], line: str) -> None:
    assert problems(**more) == [line]


def test_what_must_be_given() -> None:
    assert problems(recipe="my_recipes:needy") == ["source is missing: it must be a table"]
    missing = ["source.path is missing: it must be a string"]
    assert problems(recipe="my_recipes:needy", source={"classes": 2}) == missing
    config = from_table(table(recipe="my_recipes:needy", source={"path": "x"}))
    assert config.recipe_config == Required(Source("x"))
    assert [f.default for f in fields("source.path", "my_recipes:needy")] == [MISSING]


def test_all_problems_are_listed_at_once() -> None:
    assert len(problems(optm={}, ema={"decay": "x"}, mesh={"replicate": 0}, frames=1.5)) == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "recipe is missing"),
        ("my_recipes", 'recipe = "my_recipes": it must name a factory'),
        ("my_recipes:vide", 'my_recipes has no factory "vide"; did you mean video?'),
        ("dtrain.recip:x", "No module named 'dtrain.recip'; did you mean dtrain.recipe?"),
        ("my_recipes:untyped", "must be annotated with a dataclass"),
        ("my_recipes:clashing", "which are dtrain's own"),
    ],
)
def test_recipes_that_cannot_be_found(spec: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_table({"recipe": spec} if spec else {})


def test_a_factory_may_refuse_its_config() -> None:
    with pytest.raises(ConfigError, match=r"run: data\.path = x: no such folder"):
        build_recipe(from_table({"recipe": "my_recipes:failing", "name": "run"}))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read: No such file"):
        load(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml: not a TOML file: .*line 1"):
        load(tmp_path / "bad.toml")
    (tmp_path / "good.toml").write_text('recipe = "my_recipes:video"\nseed = 1\n')
    for setting in ("optim.lr", "=3", "optim.=3"):
        with pytest.raises(ConfigError, match=r"write it as section\.field=value"):
            load(tmp_path / "good.toml", [setting])
    with pytest.raises(ConfigError, match="seed is a value, not a table"):
        load(tmp_path / "good.toml", ["seed.x=3"])


def test_toml_round_trip() -> None:
    config = from_table(
        table(
            output='a "quoted" \\ path\twith ü and \x7f',
            model={"preset": "large", "length": "none", "rates": {"a b": 1e-7, "c": float("inf")}},
            optim={"groups": [{"match": "*.norm*", "lr_scale": 0.5}, {"weight_decay": 0.0}], "lr": 1e-5},
            frames=4,
        )
    )
    assert config.optim.groups == (ParamGroup("*.norm*", 0.5), ParamGroup(weight_decay=0.0))
    text = to_toml(config)
    assert from_table(tomllib.loads(text)) == config
    assert to_toml(from_table(tomllib.loads(text))) == text
    assert to_toml(from_table(table())) == to_toml(from_table(tomllib.loads(to_toml(from_table(table())))))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1e-4", 1e-4),
        ("true", True),
        ('"1"', "1"),
        ("a b", "a b"),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("x\ny = 1", "x\ny = 1"),
        ("1\ny = 1", "1\ny = 1"),
        ("", ""),
    ],
)
def test_values_of_set(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_what_toml_cannot_hold() -> None:
    with pytest.raises(ValueError, match="cannot be written as TOML"):
        emit_value([object()])


def test_the_world_must_fit() -> None:
    config = from_table(table(mesh={"replicate": 2}, train={"global_batch": 20, "micro_batch": 2}))
    check_world(config, 2)
    with pytest.raises(ConfigError) as caught:
        check_world(config, 3)
    message = str(caught.value)
    assert message.startswith("run on 3 ranks has 2 problems:")
    assert "mesh.replicate = 2 does not divide the world size 3: use one of [1, 3]" in message
    assert "2 x 3 = 6: use 18 or 24" in message


def test_every_field_is_described() -> None:
    described = {f.path: f for f in fields(None, "my_recipes:video")}
    assert described["optim.lr"].type == "a number"
    assert described["optim.lr"].default == OptimConfig().lr
    assert described["optim.groups[].lr_scale"].help == "Multiplies the learning rate."
    assert described["model.preset"].type == "one of small large"
    assert described["model.noise.scale"].help == "Standard deviation."
    assert [f.path for f in fields("mesh")] == ["mesh.replicate", "mesh.shard"]
    assert all(f.help for f in fields())
    with pytest.raises(ConfigError, match="optm: no such section or field; did you mean optim"):
        fields("optm")


def test_types_in_words() -> None:
    assert words(tuple[float, ...] | None) == 'a list, each item a number or "none"'
    assert words(dict[str, Path]) == "a table, each value a path"
