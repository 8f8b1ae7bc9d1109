"""The command line: `python -m dtrain`, or `dtrain` when installed.

Commands import what they need when they run, so that --help is quick; each calls one function of the library.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train U-ViT video diffusion models, and other transformers, with torchrun and FSDP2.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: section.field=value (TOML, or a bare word). Repeatable."),
]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run: output/name of its config.")]
Step = Annotated[int | None, typer.Option(help="Which checkpoint; the newest when absent.")]
Averaged = Annotated[bool, typer.Option("--ema/--no-ema", help="Averaged weights, or the trained ones.")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.")],
    sets: Sets = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it and say what it would be.")] = False,
    ranks: Annotated[
        int | None, typer.Option(help="With --dry-run: the number of ranks to plan for.")
    ] = None,
) -> None:
    """Train, or resume the run of that name.

    One process:

        python -m dtrain train configs/demo.toml

    Eight GPUs of one machine, another learning rate:

        torchrun --nproc-per-node 8 -m dtrain train run.toml --set optim.lr=1e-4

    Two machines, the same line on both:

        torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
            -m dtrain train run.toml

    What would it be on 64 ranks, without running it:

        python -m dtrain train run.toml --dry-run --ranks 64
    """
    from dtrain.config import load

    if ranks is not None and not dry_run:
        raise typer.BadParameter("--ranks plans a --dry-run; torchrun --nproc-per-node starts ranks")
    with _reported(ValueError):
        loaded = load(config, sets or [])
    package = loaded.recipe.partition(":")[0].partition(".")[0]
    _set_up_logging("dtrain", package)
    if dry_run:
        from dtrain.config.describe import show_rows
        from dtrain.dist import environment_world_size
        from dtrain.dryrun import dry_run as plan

        with _reported(ValueError):
            show_rows("dry run: nothing was trained", plan(loaded, ranks or environment_world_size()))
    else:
        from dtrain.trainer import train as run

        with _mistakes_reported("dtrain", package):
            run(loaded)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.")],
    gpus: Annotated[int, typer.Option(min=1, help="Ranks, a GPU each.")],
    device: Annotated[str, typer.Option(help="a100, l40s, h100, h200 or b200.")] = "h100",
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option(help="Folder for timeline.png and plan.json.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Look for the fastest settings that fit.")] = False,
    per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    link_gbyte: Annotated[float, typer.Option(help="GB/s that a GPU sends within its node.")] = 350.0,
    port_gbit: Annotated[float, typer.Option(help="Gbit/s that a GPU sends to other nodes.")] = 400.0,
) -> None:
    """Say what a run would hold, send and compute, without a GPU.

    A step of rank 0 runs on tensors without data: the run's own model, sharding and policies, any number of
    ranks. Memory is counted, time is estimated. Exit status 1: it does not fit.

        python -m dtrain plan run.toml --gpus 64 --device h100 --out plan/

        python -m dtrain plan run.toml --gpus 8 --set activations.policy=full --fit
    """
    from dtrain.config import load
    from dtrain.config.describe import show_rows
    from dtrain.plan.command import plan as make

    with _reported(ValueError):
        loaded = load(config, sets or [])
        links = {
            "per_node": per_node,
            "link_bytes_per_s": 1e9 * link_gbyte,
            "port_bytes_per_s": port_gbit / 8e-9,
        }
        title, found, fits = make(loaded, gpus, device, links, out, fit)
    show_rows(title, found)
    raise typer.Exit(0 if fits else 1)


@app.command()
def sample(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the clips; RUN/samples/cli when absent.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of clips.")] = 4,
    step: Step = None,
    ema: Averaged = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise: the same seed, the same clips.")] = 0,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="The recipe's sampling settings: name=value. Repeatable."),
    ] = None,
) -> None:
    """Generate clips from a run's checkpoint.

    python -m dtrain sample runs/demo --count 8 --option steps=50
    """
    from dtrain.config.toml import parse_value
    from dtrain.sampling import sample as draw

    with _reported(ValueError, FileNotFoundError):
        settings = {name: parse_value(value) for name, value in map(_pair, options or [])}
        for path in draw(run, out or run / "samples" / "cli", count, step, ema, seed, settings):
            typer.echo(path)


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    step: Step = None,
    ema: Averaged = True,
) -> None:
    """Write a checkpoint's weights to one safetensors file.

    python -m dtrain export runs/demo demo.safetensors
    """
    from dtrain.export import export as write

    with _reported(ValueError, FileNotFoundError):
        typer.echo(write(run, out, step, ema))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A run, its checkpoints, or one of them.")],
) -> None:
    """Say which checkpoints are as they were written; exit status 1 if one is not.

    python -m dtrain verify runs/demo
    """
    from dtrain.checkpoint.verify import verify as check
    from dtrain.config.describe import show_rows

    with _reported(FileNotFoundError):
        rows, intact = check(folder)
    show_rows(str(folder), rows)
    raise typer.Exit(0 if intact else 1)


@app.command()
def doctor() -> None:
    """Check this machine: versions, devices, and two ranks that talk to each other."""
    from dtrain.doctor import examine, show

    checks = examine()
    show(checks)
    raise typer.Exit(1 if any(check.failed for check in checks) else 0)


@app.command()
def config(
    target: Annotated[
        str | None,
        typer.Argument(help="Section to list, or .toml file to check.", metavar="[SECTION|RUN.toml]"),
    ] = None,
    toml: Annotated[Path | None, typer.Option(help="Print this file's config with all defaults.")] = None,
    recipe: Annotated[str | None, typer.Option(help='List its tables too: "package.module:factory".')] = None,
    sets: Sets = None,
) -> None:
    """List every field with type, default and help, or check a file.

    python -m dtrain config optim

    python -m dtrain config run.toml --set mesh.shard=8

    python -m dtrain config --toml run.toml
    """
    from dtrain.config import load, to_toml
    from dtrain.config.describe import show_fields

    with _reported(ValueError):
        if toml is not None:
            typer.echo(to_toml(load(toml, sets or [])), nl=False)
        elif target is not None and target.endswith(".toml"):
            typer.echo(f"{target}: valid (recipe {load(target, sets or []).recipe})")
        else:
            show_fields(target, recipe)


def main() -> None:
    """Entry point of `python -m dtrain` and of the installed script."""
    # `python -m` looks for recipes in the current folder; the installed script should find the same ones.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    _set_up_logging("dtrain")
    app()


@contextmanager
def _reported(*kinds: type[Exception]) -> Iterator[None]:
    """Turn a user's mistake into one message, on rank 0 only, and exit code 2 on every rank."""
    try:
        yield
    except kinds as error:
        if _is_main():
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def _mistakes_reported(*packages: str) -> Iterator[None]:
    """Turn a ValueError that one of these packages raised itself into one message and exit code 2.

    That is how they tell of a user's mistake. A fault that ends the run and says all of itself is one message
    and exit code 1; any other exception keeps its traceback. Every rank speaks where the mistake or the fault
    (a folder that one host lacks) may be on one of them only.
    """
    from dtrain.config import ConfigError
    from dtrain.faults.errors import RunFault

    try:
        yield
    except ConfigError as error:  # before the process group, and so the same on every rank
        if _is_main():
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except RunFault as error:
        if not error.alike or _is_main():
            typer.echo(f"[rank {os.environ.get('RANK', '0')}] error: {error}", err=True)
        raise typer.Exit(1) from None
    except ValueError as error:
        if _raised_in(error).partition(".")[0] not in packages:
            raise
        typer.echo(f"[rank {os.environ.get('RANK', '0')}] error: {error}", err=True)
        raise typer.Exit(2) from None


def _raised_in(error: Exception) -> str:
    """Name of the module whose code raised the exception."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return str(frame.tb_frame.f_globals.get("__name__", "")) if frame else ""


def _pair(option: str) -> tuple[str, str]:
    name, equals, value = option.partition("=")
    if not equals:
        raise ValueError(f'--option {option}: write it as name=value, as in "steps=50"')
    return name.strip(), value.strip()


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _set_up_logging(*packages: str) -> None:
    """Let these packages tell what they do: on rank 0 everything, on the others errors."""
    from rich.logging import RichHandler

    if not logging.root.handlers:
        # A live progress bar stays whole only if lines are printed through its console.
        live = RichHandler(show_path=False, markup=False) if sys.stderr.isatty() else logging.StreamHandler()
        logging.basicConfig(handlers=[live], format="%(message)s", datefmt="[%X]")
    for package in packages:
        logging.getLogger(package).setLevel(logging.INFO if _is_main() else logging.ERROR)


if __name__ == "__main__":
    main()
