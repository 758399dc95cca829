"""One configuration for every command: a YAML file plus dotted overrides, checked against typed fields. No torch.

    load_config("my.yaml", ["budget.rank=8", "training.learning_rate=1e-3"])

An unknown key is an error that names the nearest known one.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hydra_vlm.errors import ConfigError, FileError
from hydra_vlm.reading import read_yaml
from hydra_vlm.strict import parse_yaml


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


RECIPES = Path(__file__).parent / "recipes"


class DataConfig(_Section):
    """Where the records come from: a built-in set, or LLaVA-format files of your own."""

    train: str = Field(
        "demo",
        description="`demo`, `easy-vqa`, `worlds`, `nicknames`, for stage I `captions`, `easy-vqa-captions`, "
        "`scene-captions`, or a LLaVA-format JSON file",
    )
    validation: Path | None = Field(None, description="a file like `train`, for the validation loss")
    tests: dict[str, Path] = Field({}, description="name: a file like `train`, for the short-answer accuracy")
    benchmarks: Path | None = Field(
        None,
        description="a folder of benchmarks (mme, mmbench, textvqa, pope, gqa, sqa): all that are there are scored",
    )
    images: Path | None = Field(None, description="the image folder (default: each file's own folder)")
    template: str = Field(
        "auto", description="auto (the model's own chat template; MobileVLM without one: v1), chat, v1, v1-short, plain"
    )
    max_length: int = Field(1024, gt=0, description="longest conversation in tokens, image tokens counted")
    validation_limit: int | None = Field(1000, gt=0, description="use at most so many validation records")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="training and validation records that cannot be used: stop, or leave them out and say so"
    )
    max_image_pixels: int = Field(
        89_478_485, gt=0, le=178_956_970, description="an image that has more once it is made square is refused unread"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value  # --data worlds


class BudgetConfig(_Section):
    """C: what uniform LoRA at `rank` would cost, or a number of `parameters`."""

    rank: int | None = Field(4, ge=1)
    parameters: int | None = Field(None, ge=1)


class ProfileConfig(_Section):
    """The short LoRA run that measures gradient norms."""

    steps: int = Field(40, gt=1)
    skip: int = Field(5, ge=1, description="first steps left out: B starts at zero, so A has no gradient at step 1")
    rank: int | None = Field(None, ge=1, description="rank of the measuring LoRA (default: the budget's)")
    seed: int = 0


class AllocationConfig(_Section):
    """How ranks follow from the profile (Eq. 5-10)."""

    n_stages: int = Field(3, ge=1)
    delta: int = Field(1, ge=1, description="Δd, the step between stages")
    step: int | None = Field(None, ge=1, description="step of R_1 (default Δd)")
    setting: int = Field(1, ge=1, le=5, description="Table VI's setting for fine ranks, rule `paper`")
    rule: Literal["paper", "profile"] = "paper"
    seed: int = 0


class ScalingConfig(_Section):
    """LoRA's update is scaled by α/r: `constant` keeps α/r at `value`; `fixed` keeps α; `rslora` uses value/√r."""

    rule: Literal["constant", "fixed", "rslora"] = "constant"
    value: float = Field(2.0, gt=0)


class TrainingConfig(_Section):
    """Stage II: LoRA in the decoder plus the projector, frozen tower, AdamW, cosine with warm-up."""

    start_from: Path | None = Field(
        None,
        description="the folder of an adapter to go on from, ours or PEFT's plain LoRA of the same base; its updates "
        "are resized to each schedule's ranks, or keep their own with the schedule `adapter`",
    )
    steps: int | None = Field(180, gt=0, description="optimizer steps (null: as many as `epochs` take)")
    epochs: float = Field(1.0, gt=0)
    learning_rate: float = Field(4e-3, gt=0)
    full_learning_rate: float = Field(1e-3, gt=0, description="of the baseline that trains the whole decoder")
    b_ratio: float = Field(1.0, gt=0, description="learning rate of LoRA's B over that of A (LoRA+); 1: one rate")
    projector_learning_rate: float | None = Field(None, gt=0, description="default: the learning rate")
    tower_learning_rate: float | None = Field(
        None, gt=0, description="of LoRA's A in the vision tower, where it is adapted (default: the learning rate)"
    )
    batch_size: int = Field(32, gt=0, description="global batch: per-device batch x accumulation x devices")
    device_batch_size: int | None = Field(None, gt=0, description="what fits on one device (default: the global batch)")
    group_by_length: bool = Field(False, description="batches of records of about the same length: less padding")
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout")
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
    skip_spikes: int = Field(
        0, ge=0, description="so many steps in a row may be left out when their loss is no number; one more stops"
    )
    save_steps: int = Field(50, gt=0)
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="who is told of losses, learning rate and gradient norm (extra `trackers`)"
    )
    watch_steps: int = Field(30, gt=0, description="steps between validation losses, where a search prunes by them")
    cache_gigabytes: float = Field(
        2.0, ge=0, description="keep tower features in memory if they take no more than this"
    )
    disk_cache_gigabytes: float = Field(
        8.0, ge=0, description="keep tower features in the run folder if they take no more than this (0: do not)"
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
    workers: int | None = Field(
        None, ge=0, description="processes that read and decode images ahead (null: up to 4 beside a GPU, else none)"
    )
    compile: bool = Field(False, description="torch.compile the model (in place of fused_layers)")
    liger: bool = Field(False, description="Liger kernels, on a GPU (extra `liger`; in place of fused_layers)")

    @field_validator("trackers", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _offloads_checkpoints(self) -> "TrainingConfig":
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError("offload_activations moves what gradient checkpointing keeps: set both, or neither")
        return self


class EvaluationConfig(_Section):
    """Greedy short answers on the test file."""

    limit: int | None = Field(1000, gt=0, description="a seeded sample of each test file (null: all)")
    batch_size: int = Field(200, gt=0)
    max_new_tokens: int = Field(8, gt=0)
    zero_shot: bool = Field(True, description="score the model as it came, too")


class SearchConfig(_Section):
    """`hydra-vlm search`: which schedules may be tried, who proposes them, and how the search ends."""

    trials: int = Field(16, ge=1, description="finished trials, uniform LoRA among them; a later search may ask more")
    sampler: str = Field("phi", description="phi (a performance model proposes), tpe, gp, random, evolution")
    model: str = Field(
        "gaussian-process",
        description="of phi: gaussian-process, transformer (the paper's), transformer-ensemble, mlp, random-forest, "
        "lightgbm, ridge",
    )
    objective: str = Field(
        "relative",
        description="relative (mean of scores over uniform LoRA's), loss, a benchmark's name, weights such as "
        "gqa=2,pope=1, or pareto:gqa,pope",
    )
    open: bool = Field(False, description="beyond the paper: a rank for every projection, 0 meaning not adapted")
    tuned: bool = Field(False, description="search the learning rate and the scale as well, a fourth to four times")
    n_stages: tuple[int, int] | None = Field(None, description="fewest and most stages (null: as the profile allows)")
    deltas: tuple[int, int] | None = Field(None, description="least and greatest Δd (null: 1 to an eighth of the rank)")
    startup: int = Field(8, ge=0, description="trials that fill the space before a model proposes")
    seed: int = Field(0, description="of the proposals")
    trial_seed: int = Field(0, description="of every trial's training")
    final_seeds: tuple[int, ...] = Field(
        (101, 102, 103, 104, 105), description="seeds with which the best schedule and uniform LoRA are trained again"
    )
    pruner: Literal["none", "median", "hyperband"] = Field(
        "none", description="ends hopeless trials by their validation loss, every training.watch_steps"
    )
    grace_seconds: float = Field(60.0, gt=0, description="a worker that is silent for so long is taken for dead")
    storage: str | None = Field(
        None,
        description="postgresql+psycopg://user@host/database for several machines (null: a file in the run folder)",
    )


class Config(_Section):
    """A whole run: `hydra-vlm tune` reads all of it, the other commands the parts that they need."""

    model: str = Field("embedded", description="`embedded`, or the folder of a saved model")
    adapt: tuple[str, ...] = Field(
        ("decoder",), min_length=1, description="parts that LoRA may reach: decoder, tower, projector"
    )
    decoder_pattern: str | None = Field(
        None,
        description="only where the decoder is not found: a regular expression that the full names of its layers "
        r"match and no other module's, such as 'model\.language_model\.layers\.\d+'",
    )
    data: DataConfig = DataConfig()
    budget: BudgetConfig = BudgetConfig()
    profile: ProfileConfig = ProfileConfig()
    allocation: AllocationConfig = AllocationConfig()
    schedules: tuple[str, ...] = ("uniform", "coarse", "fine")
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    scaling: ScalingConfig = ScalingConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    search: SearchConfig = SearchConfig()
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
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

    @field_validator("adapt", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    def to_yaml(self) -> str:
        """The resolved configuration, every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (none: the embedded default) and apply overrides such as `training.steps=50`.

    A path that is no file may be the name of a shipped recipe, such as `stage2-1.4b`.

    Raises:
        ConfigError: naming the key, the value, the place and, for an unknown key, the nearest known one.
    """
    values: dict[str, Any] = {}
    place = "the overrides"
    if path is not None:
        place, path = str(path), _file_or_recipe(Path(path))
        try:
            values = read_yaml(path) or {}
        except FileError as problem:
            raise ConfigError(f"configuration file {problem}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold keys and values, found {type(values).__name__}")
    for override in overrides:
        _assign(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as problem:
        raise ConfigError(_explain(problem, place)) from None


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


def split_overrides(words: Sequence[str]) -> list[str]:
    """`key.sub=value` and `--key.sub value` (or `--key.sub=value`) alike as `key.sub=value`.

    Raises:
        ConfigError: a word is neither.
    """
    overrides: list[str] = []
    waiting = iter(words)
    for word in waiting:
        key = word.removeprefix("--").replace("-", "_") if word.startswith("--") else word
        if "=" in word:
            name, value = word.removeprefix("--").split("=", 1)
            overrides.append(f"{name.replace('-', '_')}={value}")
        elif word.startswith("--"):
            value = next(waiting, "")
            if not value:
                raise ConfigError(f"option {word} lacks its value: write {word} VALUE or {key}=VALUE")
            overrides.append(f"{key}={value}")
        else:
            raise ConfigError(f"argument {word!r} is neither a configuration file nor key.sub=value")
    return overrides


def _assign(values: dict[str, Any], override: str) -> None:
    key, _, text = override.partition("=")
    *sections, leaf = key.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        target[leaf] = parse_yaml(text, f"override {shorten(override, 200)!r}") if text else None
    except FileError as problem:
        raise ConfigError(str(problem)) from None


def _explain(problem: ValidationError, place: str) -> str:
    lines = []
    for error in problem.errors():
        key = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r} in {place}{_nearest(key)}")
        else:
            lines.append(f"key {key!r} in {place}: {error['msg']} (found {error['input']!r})")
    return "; ".join(lines)


def _nearest(key: str) -> str:
    """The known key that the writer probably meant: alike as a whole, or alike in its last part."""
    known = _keys(Config)
    leaves = {path.rsplit(".", 1)[-1]: path for path in reversed(known)}
    leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.75)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7) or [leaves[name] for name in leaf]
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
