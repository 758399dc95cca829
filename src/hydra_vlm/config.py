"""One configuration for every command: a YAML file plus dotted overrides, checked against typed fields. No torch.

    load_config("my.yaml", ["budget.rank=8", "training.learning_rate=1e-3"])

An unknown key is an error that names the nearest known one.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from hydra_vlm.errors import ConfigError, FileError
from hydra_vlm.names import name_fault, require_distinct, shown
from hydra_vlm.ranges import (
    Amount,
    Batch,
    Count,
    Distinct,
    Gigabytes,
    Listed,
    NotNegative,
    Parameters,
    Pixels,
    Place,
    Positive,
    Rate,
    Seconds,
    Seed,
    Seeds,
    Share,
    Span,
    Text,
    Workers,
)
from hydra_vlm.reading import read_yaml
from hydra_vlm.signals import GRADIENT_NORM, require_kind
from hydra_vlm.strict import dump_yaml, parse_yaml
from hydra_vlm.synonyms import OTHERWISE, SYNONYMS, bare


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


RECIPES = Path(__file__).parent / "recipes"

BENCHMARKS = ("mme", "mmbench", "textvqa", "pope", "gqa", "scienceqa")
"""Names that a plain test file may not have: answers filed under them are scored as the benchmark's."""


def _test_name(name: str) -> str:
    if fault := name_fault(name):
        raise ValueError(f"gives a file its name, but {fault}: choose another name")
    return name


def _tests_apart(tests: dict[str, Path]) -> dict[str, Path]:
    try:
        require_distinct(tests, "test", BENCHMARKS)
    except ConfigError as problem:
        raise ValueError(str(problem)) from None
    return tests


def _kind(value: str) -> str:
    try:
        return require_kind(value)
    except ConfigError as problem:
        raise ValueError(str(problem)) from None


Kind = Annotated[Text, AfterValidator(_kind)]
"""Of signal: the name of a file in `training/signals/`."""

BEST = "best"
"""Of `training.keep`."""


class DataConfig(_Section):
    """Where the records come from: a built-in set, or LLaVA-format files of your own."""

    train: Text = Field(
        "demo",
        description="`demo`, `easy-vqa`, `worlds`, `nicknames`, for stage I `captions`, `easy-vqa-captions`, "
        "`scene-captions`, or a LLaVA-format JSON file",
    )
    validation: Place | None = Field(None, description="a file like `train`, for the validation loss")
    tests: Annotated[dict[Annotated[str, AfterValidator(_test_name)], Place], AfterValidator(_tests_apart)] = Field(
        {}, description="name: a file like `train`, for the short-answer accuracy; the name is that of files, too"
    )
    benchmarks: Place | None = Field(
        None,
        description="a folder of benchmarks (mme, mmbench, textvqa, pope, gqa, sqa): all that are there are scored",
    )
    images: Place | None = Field(None, description="the image folder (default: each file's own folder)")
    template: Text = Field(
        "auto", description="auto (the model's own chat template; MobileVLM without one: v1), chat, v1, v1-short, plain"
    )
    max_length: Count = Field(1024, description="longest conversation in tokens, image tokens counted")
    validation_limit: Count | None = Field(1000, description="use at most so many validation records")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="training and validation records that cannot be used: stop, or leave them out and say so"
    )
    max_image_pixels: Pixels = Field(
        89_478_485, description="an image that has more once it is made square is refused unread"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value  # --data worlds


class BudgetConfig(_Section):
    """C: what uniform LoRA at `rank` would cost, or a number of `parameters`."""

    rank: Count | None = 4
    parameters: Parameters | None = Field(None, description="where it is given, `rank` does not count")

    @model_validator(mode="after")
    def _says_something(self) -> "BudgetConfig":
        if self.rank is None and self.parameters is None:
            raise ValueError("the budget is empty: give budget.rank or budget.parameters")
        return self


class ProfileConfig(_Section):
    """The short LoRA run that measures gradient norms, or another signal."""

    signal: Kind = Field(
        GRADIENT_NORM,
        description="what `hydra-vlm profile` measures: gradient_norm (the paper's, of which stages are made), "
        "sensitivity, activation_spectrum, effective_rank",
    )

    steps: Count = Field(40, gt=1)
    skip: Count = Field(
        5, description="first steps left out, at least those before B has moved from zero: A has no gradient in them"
    )
    rank: Count | None = Field(None, description="rank of the measuring LoRA (default: the budget's)")
    seed: Seed = 0

    @model_validator(mode="after")
    def _keeps_steps(self) -> "ProfileConfig":
        if self.skip >= self.steps:
            raise ValueError(
                f"profile.skip {self.skip} leaves none of profile.steps {self.steps}: skip {self.steps - 1} or fewer, "
                f"or measure {self.skip + 1} steps or more"
            )
        return self


class AllocationConfig(_Section):
    """How ranks follow from the profile (Eq. 5-10)."""

    n_stages: Count = 3
    delta: Count = Field(1, description="Δd, the step between stages")
    step: Count | None = Field(None, description="step of R_1 (default Δd)")
    setting: Count = Field(1, le=5, description="Table VI's setting for fine ranks, rule `paper`")
    rule: Literal["paper", "profile"] = "paper"
    signal: Kind = Field(
        GRADIENT_NORM, description="what the ranks of the schedule `proportional` are in proportion to"
    )
    seed: Seed = 0


class ScalingConfig(_Section):
    """LoRA's update is scaled by α/r: `constant` keeps α/r at `value`; `fixed` keeps α; `rslora` uses value/√r.

    `balanced` uses value · √(r_0/r), r_0 being the uniform rank of the budget: no module steps further for its rank.
    """

    rule: Literal["balanced", "constant", "fixed", "rslora"] = "balanced"
    value: Positive = 2.0


class TrainingConfig(_Section):
    """Stage II: LoRA in the decoder plus the projector, frozen tower, AdamW, cosine with warm-up."""

    start_from: Place | None = Field(
        None,
        description="the folder of an adapter to go on from, ours or PEFT's plain LoRA of the same base; its updates "
        "are resized to each schedule's ranks, or keep their own with the schedule `adapter`",
    )
    steps: Count | None = Field(180, description="optimizer steps (null: as many as `epochs` take)")
    epochs: Positive = 1.0
    learning_rate: Rate = 4e-3
    full_learning_rate: Rate = Field(1e-3, description="of the baseline that trains the whole decoder")
    rates: Literal["by-part", "single"] = Field(
        "by-part",
        description="by-part: `learning_rate` is that of LoRA's A, B and the projector have their own; single: it is "
        "that of all that is trained, as in the paper",
    )
    b_ratio: Positive = Field(4.0, description="by-part: learning rate of LoRA's B over that of A (LoRA+)")
    projector_learning_rate: Rate | None = Field(
        None, description="default: by-part a quarter of the learning rate, single the learning rate"
    )
    tower_learning_rate: Rate | None = Field(
        None, description="of LoRA's A in the vision tower, where it is adapted (default: the learning rate)"
    )
    pilot: bool = Field(
        True, description="`tune` chooses rates by short beginnings of the run; the ones given are its first guess"
    )
    ranks: Literal["fixed", "squeeze", "dynamic"] = Field(
        "squeeze",
        description="of `tune` and the schedule `moving`: squeeze starts `width` times as wide as the budget and "
        "decides once, dynamic three times; fixed stays at the budget's uniform rank",
    )
    width: Positive = Field(2.0, ge=1, le=64, description="the first ranks over the budget's uniform rank")
    decide: Literal["uniform", "spectral", "hydra", "phi"] = Field(
        "spectral", description="who decides the ranks that a wider adapter is squeezed to"
    )
    moments: Literal["carry", "restart"] = Field(
        "carry", description="of the optimizer, where ranks move: taken along, or begun anew with a short ramp"
    )
    batch_size: Batch = Field(32, description="global batch: per-device batch x accumulation x devices")
    device_batch_size: Batch | None = Field(None, description="what fits on one device (default: the global batch)")
    group_by_length: bool = Field(False, description="batches of records of about the same length: less padding")
    warmup_ratio: Share = Field(0.03, description="share of the steps; its first has rate 0, so a single step has none")
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = Field(1.0, description="0: no clipping")
    dropout: Share = Field(0.0, description="LoRA dropout")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = Field(
        False, description="keep each layer's input alone and compute the layer again for its gradients: a third slower"
    )
    offload_activations: bool = Field(
        False, description="what gradient checkpointing keeps waits in the CPU's memory, not the device's"
    )
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = Field(
        "adamw", description="8-bit states need bitsandbytes; paged ones move to the CPU's memory when CUDA's is full"
    )
    skip_spikes: Amount = Field(
        0, description="so many steps in a row may be left out when their loss is no number; one more stops"
    )
    save_steps: Count = 50
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Listed, Distinct] = Field(
        (), description="who is told of losses, learning rate and gradient norm (extra `trackers`)"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="weights after the last step, or those of the lowest validation loss, every `watch_steps`"
    )
    watch_steps: Count = Field(
        30, description="steps between validation losses, where `keep` is best or a search prunes by them"
    )
    patience: Count | None = Field(
        None, description="where `keep` is best: stop after so many validation losses without a new lowest"
    )
    cache_gigabytes: Gigabytes = Field(2.0, description="keep tower features in memory if they take no more than this")
    disk_cache_gigabytes: Gigabytes = Field(
        8.0, description="keep tower features in the run folder if they take no more than this (0: do not)"
    )
    supervised_only: bool = Field(True, description="logits, and the last layer's end, at supervised positions alone")
    packed_rows: bool = Field(
        True,
        description="no padding in the decoder, nothing behind the last answer, a beginning that all rows share once "
        "(needs supervised_only; not with dropout or compile)",
    )
    fused_layers: bool = Field(
        True, description="LoRA, norms, rotary positions, eager attention as one operation each (float32)"
    )
    workers: Workers | None = Field(
        None, description="processes that read and decode images ahead (null: up to 4 beside a GPU, else none)"
    )
    compile: bool = Field(False, description="torch.compile the model (in place of fused_layers)")
    liger: bool = Field(False, description="Liger kernels, on a GPU (extra `liger`; in place of fused_layers)")

    def total_steps(self, records: int) -> int:
        """Optimizer steps of a run over so many records, whose last global batch may be short."""
        return self.steps or math.ceil(self.epochs * -(-records // self.batch_size))

    @model_validator(mode="after")
    def _waits_for_the_best(self) -> "TrainingConfig":
        if self.patience is not None and self.keep != BEST:
            raise ValueError("patience waits for a lower validation loss: set training.keep=best as well, or neither")
        return self

    @model_validator(mode="after")
    def _offloads_checkpoints(self) -> "TrainingConfig":
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError("offload_activations moves what gradient checkpointing keeps: set both, or neither")
        return self


class EvaluationConfig(_Section):
    """Greedy short answers on the test file."""

    limit: Count | None = Field(1000, description="a seeded sample of each test file (null: all)")
    batch_size: Batch = 200
    max_new_tokens: Count = 8
    zero_shot: bool = Field(True, description="score the model as it came, too")


class SearchConfig(_Section):
    """`hydra-vlm search`: which schedules may be tried, who proposes them, and how the search ends."""

    trials: Count = Field(16, description="finished trials, uniform LoRA among them; a later search may ask more")
    sampler: Text = Field("phi", description="phi (a performance model proposes), tpe, gp, random, evolution")
    model: Text = Field(
        "gaussian-process",
        description="of phi: gaussian-process, transformer (the paper's), transformer-ensemble, mlp, random-forest, "
        "lightgbm, ridge",
    )
    objective: Text = Field(
        "relative",
        description="relative (mean of scores over uniform LoRA's), loss, a benchmark's name, weights such as "
        "gqa=2,pope=1, or pareto:gqa,pope",
    )
    open: bool = Field(False, description="beyond the paper: a rank for every projection, 0 meaning not adapted")
    tuned: bool = Field(False, description="search the learning rate and the scale as well, a fourth to four times")
    n_stages: Span | None = Field(None, description="fewest and most stages (null: as the profile allows)")
    deltas: Span | None = Field(None, description="least and greatest Δd (null: 1 to an eighth of the rank)")
    startup: Amount = Field(8, description="trials that fill the space before a model proposes")
    seed: Seed = Field(0, description="of the proposals")
    parallel: Count = Field(
        1,
        description="how many trials run at once: a proposal knows the scores of all trials but so many less one "
        "before it, whoever is fast, so that the same ones are tried each time; --workers raises it",
    )
    trial_seed: Seed = Field(0, description="of every trial's training")
    final_seeds: Seeds = Field(
        (101, 102, 103, 104, 105), description="seeds with which the best schedule and uniform LoRA are trained again"
    )
    pruner: Literal["none", "median", "hyperband"] = Field(
        "none", description="ends hopeless trials by their validation loss, every training.watch_steps"
    )
    grace_seconds: Seconds = Field(60.0, description="a worker that is silent for so long is taken for dead")
    storage: Text | None = Field(
        None,
        description="postgresql+psycopg://user@host/database for several machines (null: a file in the run folder)",
    )


class Config(_Section):
    """A whole run: `hydra-vlm tune` reads all of it, the other commands the parts that they need."""

    model: Text = Field("embedded", description="`embedded`, or the folder of a saved model")
    adapt: Annotated[tuple[Text, ...], Listed, Distinct] = Field(
        ("decoder",), min_length=1, description="parts that LoRA may reach: decoder, tower, projector"
    )
    decoder_pattern: Text | None = Field(
        None,
        description="only where the decoder is not found: a regular expression that the full names of its layers "
        r"match and no other module's, such as 'model\.language_model\.layers\.\d+'",
    )
    data: DataConfig = DataConfig()
    budget: BudgetConfig = BudgetConfig()
    profile: ProfileConfig = ProfileConfig()
    allocation: AllocationConfig = AllocationConfig()
    schedules: Annotated[tuple[Text, ...], Listed, Distinct] = ("uniform", "coarse", "fine")
    baseline: bool = Field(True, description="`tune` trains uniform LoRA beside the run, with a pilot of its own")
    seeds: Seeds = Field((0,), min_length=1)
    scaling: ScalingConfig = ScalingConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    search: SearchConfig = SearchConfig()
    device: Text = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen weights; auto: bfloat16 on a CUDA device that computes in it, else float32"
    )
    quantization: Literal["none", "nf4"] = Field(
        "none", description="nf4: the frozen decoder in four bits (QLoRA), through bitsandbytes"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = Field(
        "auto",
        description="auto: eager on a CPU (sdpa in a tower that is not adapted), else sdpa; "
        "flash attention needs its package",
    )

    @model_validator(mode="after")
    def _profile_sees_a(self) -> "Config":
        least = steps_without_a(self.training.warmup_ratio)
        if self.profile.steps <= least and self.training.start_from is None:
            raise ValueError(
                f"profile.steps {self.profile.steps} is too few: LoRA's A has no gradient in the first {least}, as B "
                f"is zero until a step with a learning rate above 0 is done: measure {least + 1} steps or more"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved configuration, every key written out."""
        return dump_yaml(self.model_dump(mode="json"))


def steps_without_a(warmup_ratio: float) -> int:
    """The first steps in which LoRA's A has no gradient: B starts at zero, and a warm-up's first rate is 0, too."""
    return 2 if warmup_ratio > 0 else 1


@dataclass(frozen=True)
class Override:
    """One key and its value as text, and how the user wrote it, for messages."""

    key: str
    text: str
    written: str

    @classmethod
    def of(cls, word: str) -> "Override":
        """From `key.sub=value`."""
        key, _, text = word.partition("=")
        return cls(key, text, f"override {shown(word)}")


def load_config(path: Path | None, overrides: Sequence[str | Override] = ()) -> Config:
    """Read a YAML file (none: the embedded default) and apply overrides such as `training.steps=50`.

    A path that is no file may be the name of a shipped recipe, such as `stage2-1.4b`.

    Raises:
        ConfigError: naming the key, the value, the place and, for an unknown key, the nearest known one.
    """
    values: dict[str, Any] = {}
    place = "the defaults"
    if path is not None:
        place, path = str(path), _file_or_recipe(Path(path))
        try:
            values = read_yaml(path) or {}
        except FileError as problem:
            raise ConfigError(f"configuration file {problem}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold keys and values, found {type(values).__name__}")
    asked = [override if isinstance(override, Override) else Override.of(override) for override in overrides]
    for override in asked:
        _assign(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as problem:
        raise ConfigError(_explain(problem, place, asked)) from None


def recipe_names() -> tuple[str, ...]:
    """The shipped recipes, by the names that stand in for a configuration file."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def _file_or_recipe(path: Path) -> Path:
    """The file itself, or the shipped recipe of that bare name (a name such as `stage2-1.4b` has no .yaml)."""
    if path.is_file() or path.suffix in (".yaml", ".yml") or path.name != str(path):
        return path
    names = recipe_names()
    if path.name in names:
        return RECIPES / f"{path.name}.yaml"
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}?" if close else f"shipped recipes are {', '.join(names)}"
    raise ConfigError(f"{path} is neither a configuration file nor a shipped recipe: {meant}")


def split_overrides(words: Sequence[str]) -> list[Override]:
    """`key.sub=value` and `--key.sub value` (or `--key.sub=value`) alike.

    Raises:
        ConfigError: a word is neither.
    """
    overrides: list[Override] = []
    waiting = iter(words)
    for word in waiting:
        name, sign, value = word.removeprefix("--").partition("=")
        key = _underscored(name)
        if sign:
            overrides.append(Override(key, value, f"{'option' if word[:2] == '--' else 'override'} {shown(word)}"))
        elif word.startswith("--"):
            value = next(waiting, "")
            if not value:
                raise ConfigError(f"option {word} lacks its value: write {word} VALUE or {key}=VALUE")
            overrides.append(Override(key, value, f"option {shown(f'{word} {value}')}"))
        else:
            raise ConfigError(f"argument {word!r} is neither a configuration file nor key.sub=value")
    return overrides


def _underscored(key: str) -> str:
    """`training.batch-size` as our keys are written; what stands below a key, such as a test's name, stays as it is."""
    parts = key.split(".")
    return ".".join([*(part.replace("-", "_") for part in parts[:2]), *parts[2:]])


def _assign(values: dict[str, Any], override: Override) -> None:
    *sections, leaf = override.key.split(".")
    target = values
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise ConfigError(f"{override.written}: {section!r} is a value, not a section")
    try:
        target[leaf] = parse_yaml(override.text, override.written) if override.text else None
    except FileError as problem:
        raise ConfigError(str(problem)) from None


def _explain(problem: ValidationError, file: str, overrides: Sequence[Override]) -> str:
    """What is wrong, key by key; the first five."""
    errors = problem.errors(include_url=False)
    within = {error["loc"][:-1] for error in errors}
    errors = [error for error in errors if not (error["type"] == "too_short" and error["loc"] in within)]
    lines = [_fault(error, file, overrides) for error in errors[:5]]
    return "; ".join(lines + ([f"and {len(errors) - 5} more"] if len(errors) > 5 else []))


def _fault(error: ErrorDetails, file: str, overrides: Sequence[Override]) -> str:
    parts = [str(part) for part in error["loc"] if part != "[key]"]
    key, found = ".".join(parts), error["input"]
    place = _place(parts, file, overrides)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r} in {place}{nearest_key(key)}"
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"key {key!r} in {place} is a section, found {_brief(found)}: write {key}.KEY=VALUE for one of its keys"
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(found, BaseModel | dict):
        return f"{place}: {said}"  # of several keys together, which the sentence names
    return f"key {key!r} in {place}: {said} (found {_brief(found)})"


def _place(parts: Sequence[str], file: str, overrides: Sequence[Override]) -> str:
    """Where a key got its value: the last override of it, of a section around it, or of a key within it; the file."""

    def concerns(override: Override) -> bool:
        theirs = override.key.split(".")
        shared = min(len(theirs), len(parts))
        return theirs[:shared] == list(parts[:shared])

    found = [override.written for override in overrides if concerns(override)]
    return found[-1] if found else file


def _brief(value: Any) -> str:
    try:
        return shown(value) if isinstance(value, str) else str(value)[:200]
    except ValueError:  # a number of more digits than Python writes out
        return "a number of thousands of digits"


def nearest_key(key: str) -> str:
    """What the writer of an unknown key probably meant: by meaning, then by spelling."""
    known = _keys(Config)
    word = bare(key)
    if word in SYNONYMS:
        return f": did you mean {SYNONYMS[word]!r}?"
    if word in OTHERWISE:
        return f": {OTHERWISE[word]}"
    leaves = {path.rsplit(".", 1)[-1]: path for path in reversed(known)}
    if word in leaves:
        return f": did you mean {leaves[word]!r}?"
    alike = difflib.get_close_matches(word, [*leaves, *SYNONYMS], n=1, cutoff=0.75)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7) or [
        leaves.get(name) or SYNONYMS[name] for name in alike
    ]
    return f": did you mean {close[0]!r}?" if close else f": known keys are {', '.join(Config.model_fields)}"


def _keys(section: type[BaseModel], prefix: str = "") -> Sequence[str]:
    found: list[str] = []
    for name, field in section.model_fields.items():
        found.append(prefix + name)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += _keys(inner, f"{prefix}{name}.")
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
