"""The command line: each command is one call into the library. torch is imported only where a model is needed."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hydra_vlm.errors import HydraError

app = typer.Typer(
    help="Hierarchical and dynamic rank adaptation for vision-language models: measure where low-rank capacity is "
    "worth having, spend a parameter budget there, and get a standard PEFT adapter with the evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_OVERRIDABLE = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [key.sub=value ...]",
        help="A YAML configuration (none: the embedded default), then overrides: key.sub=value or --key.sub value.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the adapter's start and of the data order.")]


@app.command()
def schedule(
    graph: Annotated[str | None, typer.Option(help="mobilellama-1.4b, mobilellama-2.7b, or a graph.json file.")] = None,
    rank: Annotated[int | None, typer.Option(help="Budget: what uniform LoRA of this rank costs.")] = None,
    budget_parameters: Annotated[int | None, typer.Option(help="Budget: a number of LoRA parameters.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(help="Layers by stage, lowest norm first: 1-8,9-12,13-24 ('+' joins ranges)."),
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="A measured profile.json, in place of --stages.")] = None,
    n_stages: Annotated[int, typer.Option(help="Stages to partition the profile's layers into.")] = 3,
    delta: Annotated[int, typer.Option(help="Δd, the step between stages.")] = 2,
    step: Annotated[int | None, typer.Option(help="Step of R_1 (default Δd; the paper's text says 1).")] = None,
    grain: Annotated[
        str, typer.Option(help="coarse, fine, or a rival: uniform, linear, exponential, decreasing, random.")
    ] = "coarse",
    setting: Annotated[int, typer.Option(help="Setting of Table VI for fine ranks.")] = 1,
    rule: Annotated[
        Literal["paper", "profile"], typer.Option(help="Fine ranks by the paper's rule or by measured norms.")
    ] = "paper",
    seed: Annotated[int, typer.Option(help="For the random schedule.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the schedule to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a budget and stages (or a measured profile) into ranks. Loads no torch."""
    from hydra_vlm.commands.schedule import make_schedule

    made = make_schedule(
        graph=graph,
        rank=rank,
        budget_parameters=budget_parameters,
        profile=profile,
        allocator=grain,
        stages=stages,
        n_stages=n_stages,
        delta=delta,
        step=step,
        setting=setting,
        rule=rule,
        seed=seed,
    )
    if out is not None:
        from hydra_vlm.files import write_json

        write_json(out, made.to_json())
    print(json.dumps(made.to_json()) if as_json else made.table())


@app.command(context_settings=_OVERRIDABLE)
def profile(
    context: typer.Context,
    config: ConfigArgument = None,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/profile"),
    as_json: JsonOption = False,
) -> None:
    """Measure gradient norms by layer and component in a short LoRA run."""
    settings = _config(config, context.args)
    from hydra_vlm.tune import measure_profile, prepare_study

    study = prepare_study(settings, out, _say)
    measured = measure_profile(study, _say)
    print(json.dumps(measured.to_json()) if as_json else measured.table())
    _say(f"profile: {study.folder.profile}")


@app.command(context_settings=_OVERRIDABLE)
def train(
    context: typer.Context,
    config: ConfigArgument = None,
    schedule: Annotated[
        str, typer.Option(help="A schedule.json, an allocator's name (uniform needs no profile), or full.")
    ] = "uniform",
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/train"),
    as_json: JsonOption = False,
) -> None:
    """Fine-tune with one schedule, answer the test questions, keep adapter and record."""
    settings = _config(config, context.args)
    from hydra_vlm.tune import prepare_study, run_trial, schedule_for

    study = prepare_study(settings, out, _say)
    name, ranks = schedule_for(study, schedule, _say)
    record = run_trial(study, name, ranks, seed, _say)
    folder = study.folder.trial(record.key)
    print(json.dumps(record.to_json()) if as_json else record.summary())
    _say(f"adapter and record: {folder}")


@app.command(context_settings=_OVERRIDABLE)
def evaluate(
    context: typer.Context,
    config: ConfigArgument = None,
    adapter: Annotated[Path | None, typer.Option(help="An adapter folder (none: the model as it is).")] = None,
    out: Annotated[Path, typer.Option(help="The folder for predictions and scores.")] = Path("runs/evaluate"),
    as_json: JsonOption = False,
) -> None:
    """Answer the test questions with a model or an adapter and score them."""
    settings = _config(config, context.args)
    from hydra_vlm.tune import evaluate_adapter, prepare_study

    study = prepare_study(settings, out, _say)
    scores = evaluate_adapter(study, adapter, _say)
    print(json.dumps([s.to_json() for s in scores]) if as_json else "\n".join(s.summary() for s in scores))
    _say(f"predictions and scores: {out}")


@app.command(context_settings=_OVERRIDABLE)
def tune(
    context: typer.Context,
    config: ConfigArgument = None,
    out: Annotated[Path, typer.Option(help="The run folder; an unfinished run in it goes on.")] = Path("runs/tune"),
    as_json: JsonOption = False,
) -> None:
    """Profile, allocate, fine-tune every schedule, score, compare, report."""
    settings = _config(config, context.args)
    from hydra_vlm.tune import tune as run

    _report(run(settings, out, _say).path, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    as_json: JsonOption = False,
) -> None:
    """Write report.html from a run folder's records and print the comparison. Loads no torch."""
    _report(run, as_json)


def _report(run: Path, as_json: bool) -> None:
    """results.json, report.html, and the comparison on standard output."""
    from hydra_vlm.files import write_json
    from hydra_vlm.report.comparison import compare
    from hydra_vlm.report.page import write_report
    from hydra_vlm.report.run import load_run

    comparison = compare(load_run(run))
    write_json(run / "results.json", comparison.to_json())
    page = write_report(run)
    print(json.dumps(comparison.to_json()) if as_json else comparison.table())
    _say(f"report: {page}")


def _config(first: str | None, rest: list[str]) -> Any:
    """The configuration of a command that loads a model; transformers' own bars and notices are turned off."""
    from hydra_vlm.config import load_config, split_overrides

    words = [first, *rest] if first else rest
    path = None
    if first and "=" not in first and not first.startswith("--"):
        path, words = Path(first), rest
    config = load_config(path, split_overrides(words))
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return config


def _say(line: str) -> None:
    """Progress goes to standard error, results to standard output."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line; an error the user can put right is one line, without a traceback."""
    try:
        app()
    except HydraError as problem:
        _say(f"error: {problem}")
        sys.exit(2)


if __name__ == "__main__":
    main()
