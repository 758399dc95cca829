"""`python -m hydra_vlm.rankbench`: one command for each comparison, printing Markdown. Each is one library call."""

import time
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_type_hints

import typer

from hydra_vlm.door import enter
from hydra_vlm.errors import ConfigError
from hydra_vlm.ranges import most_workers
from hydra_vlm.streams import show

app = typer.Typer(
    help="RankBench: a table of real fine-tuning trials, on which performance models and searches are compared in "
    "minutes. Settings are chosen on its development half; what is reported comes from the held-out half.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
PartName = Literal["development", "held-out", "all"]
TableOption = Annotated[
    Path | None, typer.Option("--table", help="The table's folder (default: the packaged one).", show_default=False)
]
PartOption = Annotated[PartName, typer.Option(help="Which schedules; uniform LoRA is in every part.")]
OutOption = Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file, too.", show_default=False)]


@app.command()
def models(
    part: PartOption = "all",
    table: TableOption = None,
    names: Annotated[str, typer.Option("--models", help="all, or names with commas between.")] = "all",
    inputs: Annotated[
        Literal["ranks", "profile", "early-loss"],
        typer.Option(help="What models see: ranks; gradient norms, too; or losses of the run's first tenth, too."),
    ] = "ranks",
    target: Annotated[Literal["scores", "loss"], typer.Option(help="What models predict.")] = "scores",
    folds: Annotated[int, typer.Option(min=2, max=1000, help="Folds of the cross-validation.")] = 10,
    draws: Annotated[int, typer.Option(min=1, max=1000, help="How often folds are drawn anew.")] = 1,
    curve: Annotated[bool, typer.Option(help="Learning curves, from 8 schedules on.")] = True,
    out: OutOption = None,
) -> None:
    """Cross-validate performance models (Table VIII) and draw their learning curves."""
    _check(out)
    from hydra_vlm.performance_model.cross_validation import Plan
    from hydra_vlm.rankbench.models import compare_models, curve_sizes, known_models, report
    from hydra_vlm.rankbench.spread import paired
    from hydra_vlm.rankbench.table import load

    bench = paired(load(table)).part(part)
    plan = Plan(folds, tuple(range(draws)), curve_sizes(bench) if curve else ())
    chosen = known_models() if names == "all" else tuple(name.strip() for name in names.split(","))
    found = compare_models(bench, chosen, plan, inputs, target)
    show(f"part {part}, inputs {inputs}, target {target}: {report(bench, found, target)}")
    _keep(out, found.to_json())


@app.command()
def samplers(
    part: PartOption = "held-out",
    table: TableOption = None,
    names: Annotated[str, typer.Option("--samplers", help="all, or names with commas between.")] = "all",
    ground: Annotated[
        Literal["table", "surrogate"],
        typer.Option(
            help="table: pick among its schedules not yet seen. surrogate: propose freely, against a model of its "
            "runs and their noise."
        ),
    ] = "table",
    space: Annotated[
        Literal["all", "closed", "open"],
        typer.Option(help="On the table all schedules, or those of one space; of a surrogate, all means open."),
    ] = "all",
    objective: Annotated[
        Literal["relative", "loss"],
        typer.Option(help="relative: the mean of scores over uniform LoRA's. loss: minus the validation loss."),
    ] = "relative",
    noise: Annotated[
        bool, typer.Option(help="On the table: see single runs, or (--no-noise) the shrunk mean of a schedule's runs.")
    ] = True,
    repetitions: Annotated[int, typer.Option(min=1, max=10_000, help="How often each search is repeated.")] = 30,
    trials: Annotated[int, typer.Option(min=2, max=10_000, help="Trials of a search, uniform LoRA's included.")] = 32,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Everything follows from it.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, max=most_workers(), help="Processes side by side.")] = 1,
    phi: Annotated[
        list[str] | None,
        typer.Option(help="A setting of Φ, such as model=gaussian-process or n_startup=6.", show_default=False),
    ] = None,
    out: OutOption = None,
) -> None:
    """Compare searches by regret after 8, 16 and 32 trials."""
    _check(out)
    from hydra_vlm.rankbench.ground import surrogate_ground, table_ground
    from hydra_vlm.rankbench.samplers import Contest, contest, report, to_json
    from hydra_vlm.rankbench.table import load
    from hydra_vlm.search.samplers import SAMPLERS

    chosen = SAMPLERS if names == "all" else tuple(name.strip() for name in names.split(","))
    asked = Contest(chosen, repetitions, trials, seed, _settings(phi or []))
    bench, start = load(table), time.perf_counter()
    if ground == "table":
        picked = table_ground(bench, space, part, objective, noise)
        kind = "single runs" if noise else "shrunk means"
        said, courses = f"{kind} of {len(picked.names)} schedules of part {part}", contest(picked, asked, jobs)
    else:
        modelled = surrogate_ground(bench, space, seed, objective, part)
        said, courses = f"surrogate of part {part}", contest(modelled, asked, jobs)
    show(f"{said}, space {space}, objective {objective}: {report(courses, asked)}")
    show(f"\n{time.perf_counter() - start:.0f} s with {jobs} job{'s' * (jobs > 1)}.")
    _keep(out, to_json(courses))


@app.command()
def spread(part: PartOption = "all", table: TableOption = None) -> None:
    """Spread between schedules against spread between seeds, and the best gain over uniform LoRA."""
    from hydra_vlm.rankbench.spread import report
    from hydra_vlm.rankbench.table import load

    show(f"part {part}\n\n{report(load(table).part(part))}")


@app.command()
def datasheet(table: TableOption = None) -> None:
    """Facts about the table: how it was made, what it holds, cost, noise."""
    from hydra_vlm.rankbench.datasheet import datasheet as sheet
    from hydra_vlm.rankbench.table import load

    show(sheet(load(table)))


@app.command()
def collect(
    work: Annotated[Path, typer.Argument(help="A folder of RankBench trials; those that have finished count.")],
    out: Annotated[
        Path | None, typer.Option(help="The table's folder to write (default: the packaged one).", show_default=False)
    ] = None,
    fact: Annotated[
        list[str] | None,
        typer.Option(help="A fact for the datasheet, such as made=2026-11-22.", show_default=False),
    ] = None,
) -> None:
    """Make the table from trials."""
    from hydra_vlm.rankbench.collect import collect as table_of
    from hydra_vlm.rankbench.table import PACKAGED

    bench = table_of(work, dict(map(_pair, fact or [])))
    bench.save(PACKAGED if out is None else out)
    show(f"{PACKAGED if out is None else out}: {bench!r}")


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"{text!r} is not of the form name=value.")
    return name.strip(), value.strip()


def _settings(pairs: list[str]) -> Any:
    """Φ's settings with these changed; raises ConfigError for an unknown name or a value of another kind."""
    from pydantic import TypeAdapter, ValidationError

    from hydra_vlm.performance_model.protocol import performance_model
    from hydra_vlm.search.phi import PhiSettings

    kinds = {**get_type_hints(PhiSettings), "model": str}
    changed: dict[str, Any] = {}
    for name, value in map(_pair, pairs):
        if name not in kinds:
            raise ConfigError(f"Φ has no setting {name!r}: use one of {', '.join(kinds)}.")
        try:
            changed[name] = TypeAdapter(kinds[name]).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"setting {name}={value} of Φ: {error.errors()[0]['msg']}.") from error
    if "model" in changed:
        performance_model(changed["model"])
    return PhiSettings(**changed)


def _check(path: Path | None) -> None:
    if path is not None:
        from hydra_vlm.files import require_file_place

        require_file_place(path)


def _keep(path: Path | None, value: object) -> None:
    if path is not None:
        from hydra_vlm.files import write_json

        write_json(path, value)


def main() -> NoReturn:
    """Run a command; how it ends is `door`'s."""
    enter(app)


if __name__ == "__main__":
    main()
