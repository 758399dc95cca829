"""Samples per second of training: the project's path against a plain script, both in one run, with equal losses.

    python tools/bench_training.py --size embedded --repeats 5 --steps 12
    python tools/bench_training.py --size smol --repeats 3 --steps 4
    python tools/bench_training.py --repeats 30 --steps 6 --only all --only "all, profiled" --only "all, mixed ranks"

The plain script is what transformers' documentation leads to: the model's Auto class, PEFT's uniform LoRA on all
linears of the decoder, the projector opened, `Trainer` with its defaults, and a collator that opens images and pads.
Model, first adapter, records, order, batch and learning rates are the same, and the greatest difference of the losses
is asserted to be below 1e-4. Only contenders by length have another order, and a plain script of their own.

Every contender is a process of its own, which loads once and then waits for its turns. In each repeat all train
`--steps` steps from the start, one after another; the first two steps of a turn are not timed. What gradient norms and
mixed ranks cost is measured within one process, in many short turns (the third command). Where features are kept they
are computed before (seconds are printed). Memory is the peak of a contender's process, loading included. One thread;
set OMP_NUM_THREADS for more.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scipy.special import stdtrit

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
PLAIN, PLAIN_BY_LENGTH = "plain script", "plain script, by length"
EQUAL = 1e-4
WARM = 2


@dataclass(frozen=True)
class Size:
    """What is trained on what, as the shipped recipes of that size have it."""

    data: str
    rank: int
    batch: int
    learning_rate: float
    pool: int  # records that are drawn from


SIZES = {"embedded": Size("demo", 4, 32, 4e-3, 512), "smol": Size("easy-vqa", 8, 8, 1e-3, 128)}


@dataclass(frozen=True)
class Contender:
    """The project's path with some of its ways to be fast; `plain` is the script without any."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False
    cached: bool = False
    profiled: bool = False
    schedule: str = "uniform"

    @property
    def by_length(self) -> bool:
        return bool(self.settings.get("group_by_length"))


OFF = {"supervised_only": False, "packed_rows": False, "fused_layers": False}
BY_LENGTH = {"group_by_length": True}
CONTENDERS = {
    PLAIN: Contender(plain=True),
    "none of it": Contender(OFF),
    "supervised positions": Contender({**OFF, "supervised_only": True}),
    "packed rows as well": Contender({**OFF, "supervised_only": True, "packed_rows": True}),
    "fused layers": Contender({**OFF, "fused_layers": True}),
    "features kept": Contender(OFF, cached=True),
    "all but features": Contender(),
    "all": Contender(cached=True),
    "all, profiled": Contender(cached=True, profiled=True),
    "all, mixed ranks": Contender(cached=True, schedule="linear"),
    "by length": Contender({**OFF, **BY_LENGTH}),
    PLAIN_BY_LENGTH: Contender(BY_LENGTH, plain=True),
    "two workers": Contender({**OFF, "workers": 2}),
}
COMPARED = {"all, profiled": "gradient norms cost", "all, mixed ranks": "mixed ranks cost"}
"""Trained in turn with `all` in one process: two processes with the same work differ by more than these cost."""
EXTRA = ("two workers", PLAIN_BY_LENGTH, "by length")
"""Run only when they are named: on one core a worker wins nothing, and the built-in sets have little padding."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="embedded")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", action="append", default=[], choices=CONTENDERS, help="beside the plain script")
    parser.add_argument("--home", type=Path, default=Path("build/bench_training"), help="keeps data and model")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    wish = parser.parse_args()
    if wish.contender:
        take_turns(wish.contender, wish.size, wish.home, wish.steps)
        return
    names = wish.only or [name for name in CONTENDERS if name not in EXTRA]
    lengths = any(CONTENDERS[name].by_length for name in names)
    names = list(dict.fromkeys([PLAIN, *([PLAIN_BY_LENGTH] if lengths else []), *names]))
    prepare_home(wish.size, wish.home)
    with Race(names, wish.size, wish.home, wish.steps) as race:
        turns = [race.turn() for _ in range(wish.repeats)]
    report(turns, SIZES[wish.size].batch * (wish.steps - WARM))


class Race:
    """One process for each contender; `turn` has them train one after another."""

    def __init__(self, names: Sequence[str], size: str, home: Path, steps: int) -> None:
        command = [sys.executable, __file__, "--size", size, "--home", str(home), "--steps", str(steps)]
        self.runners = {
            name: subprocess.Popen(
                [*command, "--contender", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for name in names
        }

    def __enter__(self) -> "Race":
        for name in self.runners:
            self._read(name)
        return self

    def turn(self) -> dict[str, dict[str, Any]]:
        told = {}
        for name, runner in self.runners.items():
            assert runner.stdin
            runner.stdin.write("go\n")
            runner.stdin.flush()
            told[name] = self._read(name)
        return told

    def _read(self, name: str) -> dict[str, Any]:
        """The next line of JSON that a contender writes."""
        stream = self.runners[name].stdout
        assert stream
        for line in stream:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"{name} ended: see its error above")

    def __exit__(self, *_: object) -> None:
        for runner in self.runners.values():
            assert runner.stdin
            runner.stdin.close()
            runner.wait(60)


def report(turns: Sequence[Mapping[str, Mapping[str, Any]]], samples: int) -> None:
    """A line for each contender: samples/s, ratio to the plain script in the same repeat, memory, losses."""
    print(f"{'':26}{'samples/s':>10}  {'ratio: median (range)':<24}{'cpu':>6}{'peak MB':>9}  loss differs by at most")
    for name in turns[0]:
        reference = PLAIN_BY_LENGTH if CONTENDERS[name].by_length else PLAIN
        rates = [samples / turn[name]["seconds"] for turn in turns]
        ratios = [turn[PLAIN]["seconds"] / turn[name]["seconds"] for turn in turns]
        spent = statistics.median(turn[PLAIN]["cpu"] / turn[name]["cpu"] for turn in turns)
        pairs = [zip(turn[name]["losses"], turn[reference]["losses"], strict=True) for turn in turns]
        apart = max(abs(ours - plain) for pair in pairs for ours, plain in pair)
        mixed = CONTENDERS[name].schedule != "uniform"
        shown = "another schedule" if mixed else f"{apart:.1e}"
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        memory = turns[0][name]["peak"]
        print(f"{name:26}{statistics.median(rates):10.1f}  {spread:<24}{spent:6.2f}{memory:9.0f}  {shown}", flush=True)
        assert mixed or apart < EQUAL, f"{name}: losses differ by {apart}"
    for name, what in COMPARED.items():
        if name in turns[0]:
            compare(turns, name, what)


def compare(turns: Sequence[Mapping[str, Mapping[str, Any]]], name: str, what: str) -> None:
    """How much longer its steps are than those of `all` in the same process, by the quickest step of either's turn.

    Whatever else a machine does makes a step longer, never shorter; its clock drifts, so there is an interval.
    """
    ratios = [math.log(min(turn[name]["steps"]) / min(turn[name]["beside"])) for turn in turns]
    text = f"{what} {100 * statistics.fmean(ratios):+.1f} % of a step"
    if len(ratios) > 1:
        half = stdtrit(len(ratios) - 1, 0.975) * statistics.stdev(ratios) / len(ratios) ** 0.5
        text += f" (+- {100 * half:.1f}: 95 % t interval over {len(ratios)} repeats)"
    shares = [100 * turn[name]["recording"] / turn[name]["seconds"] for turn in turns]
    print(text + (f"; recording itself takes {statistics.median(shares):.2f} %" if any(shares) else ""))


def prepare_home(size: str, home: Path) -> None:
    """Write the built-in data and compose the model of `smol`, once."""
    from hydra_vlm.data.builtin import write_builtin

    data = home / SIZES[size].data
    if not (data / "train.json").is_file():
        print(f"writing {data}", flush=True)
        write_builtin(SIZES[size].data, data)
    if size == "smol" and not (home / "smol" / "config.json").is_file():
        print(f"composing {home / 'smol'}", flush=True)
        compose_smol(home / "smol")


def compose_smol(folder: Path) -> None:
    """The preset `smol` with a new projector, as `hydra-vlm init --preset smol` writes it."""
    from hydra_vlm.models.compose import compose
    from hydra_vlm.models.smol import smol_parts

    model, processor = compose(smol_parts(), "ldpnetv2")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def take_turns(name: str, size: str, home: Path, steps: int) -> None:
    """A contender's process: load, say so, then train at every line of the standard input."""
    import torch
    from transformers import logging

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    contender = CONTENDERS[name]
    train = (PlainScript if contender.plain else ProjectPath)(contender, SIZES[size], model_of(size, home), home, steps)
    print(json.dumps({"ready": name}), flush=True)
    beside = "all" if name in COMPARED else None  # in the same process, for what differs between processes
    for turn, _ in enumerate(sys.stdin):
        told: dict[str, Any] = {}
        for one in [name, beside] if turn % 2 else [beside, name]:
            if one is None:
                continue
            train.contender = CONTENDERS[one]
            with TemporaryDirectory() as scratch:
                clock, losses = train.run(Path(scratch))
            told |= clock.told() | {"losses": losses} if one == name else {"beside": clock.told()["steps"]}
        print(json.dumps(told), flush=True)


def model_of(size: str, home: Path) -> str:
    return "embedded" if size == "embedded" else str(home / "smol")


def stopwatch() -> Any:
    """A callback that takes wall and processor time from the end of step `WARM` to the end of the last step."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        recorder: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = (time.perf_counter(), time.process_time(), self.recorder.seconds if self.recorder else 0.0)
            if state.global_step == WARM:
                self.first, self.steps = now, []
            elif state.global_step > WARM:
                self.steps.append(now[0] - self.last[0])
            self.last = now

        def told(self) -> dict[str, Any]:
            seconds, cpu, recording = (b - a for a, b in zip(self.first, self.last, strict=True))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            return {"seconds": seconds, "steps": self.steps, "cpu": cpu, "recording": recording, "peak": peak}

    return Stopwatch()


class PlainScript:
    """transformers' Trainer and PEFT, without anything of the project but its model class and its tokenized records."""

    def __init__(self, contender: Contender, size: Size, model: str, home: Path, steps: int) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from hydra_vlm.models.loading import resolve_model

        folder = resolve_model(model)
        self.size, self.steps, self.by_length = size, steps, contender.by_length
        self.base = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
        self.processor = AutoProcessor.from_pretrained(folder)
        self.items = list(dataset(self.processor, size, home))
        self.projector = {k: v.clone() for k, v in self.base.model.mm_projector.state_dict().items()}

    def run(self, scratch: Path) -> tuple[Any, list[float]]:
        from peft import LoraConfig, get_peft_model
        from transformers import Trainer, TrainingArguments

        self.base.requires_grad_(False)
        self.base.model.mm_projector.load_state_dict(self.projector)
        targets = r"model\.language_model\.layers\.\d+\..*_proj"
        rank = self.size.rank
        model = get_peft_model(self.base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        same_first_adapter(model)
        self.base.model.mm_projector.requires_grad_(True)
        arguments = TrainingArguments(
            output_dir=str(scratch),
            per_device_train_batch_size=self.size.batch,
            max_steps=self.steps,
            learning_rate=self.size.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        items, trainer_class = self.items, Trainer
        if self.by_length:
            items, trainer_class = in_order(items, self.size.batch, arguments.seed), unshuffled()
        clock = stopwatch()
        trainer = trainer_class(
            model=model, args=arguments, train_dataset=items, data_collator=self.collate, callbacks=[clock]
        )
        silence(trainer)
        trainer.train()
        self.base = model.unload()
        return clock, logged(trainer.state.log_history)

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pad on the right, open the images."""
        import torch
        from PIL import Image
        from torch.nn.utils.rnn import pad_sequence

        ids, labels = ([torch.tensor(item[key]) for item in items] for key in ("input_ids", "labels"))
        lengths = torch.tensor([len(row) for row in ids])
        padded = pad_sequence(ids, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id)
        images = [Image.open(item["image"]).convert("RGB") for item in items if item["image"]]
        return {
            "input_ids": padded,
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
            "pixel_values": self.processor.pixels(images),
        }


class ProjectPath:
    """What `hydra-vlm train` runs: a borrowed model with the schedule's adapter, `finetune`."""

    def __init__(self, contender: Contender, size: Size, model: str, home: Path, steps: int) -> None:
        from hydra_vlm.config import TrainingConfig
        from hydra_vlm.models.loading import load_model
        from hydra_vlm.training.recipe import InstructionData

        self.contender, self.size = contender, size
        self.loaded = load_model(model, "cpu")
        records = dataset(self.loaded.processor, size, home)
        if contender.cached:
            records = with_kept_features(self.loaded, records)
        self.data = InstructionData(records, None, records.reader)
        self.settings = TrainingConfig(
            steps=steps,
            learning_rate=size.learning_rate,
            batch_size=size.batch,
            save_steps=10**9,
            **contender.settings,
        )

    def run(self, scratch: Path) -> tuple[Any, list[float]]:
        from hydra_vlm.allocation import AllocationRequest, Budget, allocate
        from hydra_vlm.training.recipe import adapting, finetune
        from hydra_vlm.training.recording import Recording
        from hydra_vlm.training.signals.gradient_norm import Recorder

        graph = self.loaded.parts.graph
        budget = Budget.of_rank(graph, self.size.rank)
        schedule = allocate(self.contender.schedule, AllocationRequest(graph, budget))
        clock = stopwatch()
        with adapting(self.loaded, schedule, self.settings, 42) as model:
            if self.contender.schedule == "uniform":
                same_first_adapter(model)
            callbacks = [clock]
            if self.contender.profiled:
                clock.recorder = Recording([Recorder(model, self.loaded.parts)])
                timed(clock.recorder)
                callbacks.append(clock.recorder)
            done = finetune(model, self.loaded, self.data, self.settings, 42, scratch, callbacks)
        return clock, [loss for _, loss in done.train_losses]


def dataset(processor: Any, size: Size, home: Path) -> Any:
    """The same records for everyone: a seeded draw from the built-in set."""
    from hydra_vlm.data.instruction import InstructionDataset
    from hydra_vlm.data.readers import open_reader
    from hydra_vlm.data.records import read_records, sample

    folder = home / size.data
    records = sample(read_records(folder / "train.json", folder / "images"), size.pool)
    return InstructionDataset(records, open_reader(processor), 1024)


def with_kept_features(loaded: Any, records: Any) -> Any:
    """The same records, read with the tower's features at hand."""
    from dataclasses import replace

    from hydra_vlm.data.features import encode_once
    from hydra_vlm.data.instruction import InstructionDataset

    started = time.perf_counter()
    features = encode_once(loaded.model, loaded.processor, [r.image for r in records.records if r.image])
    print(f"{len(features)} images encoded in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return InstructionDataset(records.records, replace(records.reader, features=features), 1024)


def same_first_adapter(model: Any) -> None:
    """A of every layer drawn from its name, B zero: whoever attached it starts from the same point."""
    import hashlib

    import torch

    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            drawn = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.data.copy_((2 * drawn - 1) / parameter.shape[1] ** 0.5)


def timed(callback: Any) -> None:
    """Have a recording callback add up the seconds of its recording."""
    record, callback.seconds = callback.record, 0.0

    def recording() -> None:
        started = time.perf_counter()
        record()
        callback.seconds += time.perf_counter() - started

    callback.record = recording


def in_order(items: Sequence[Any], batch: int, seed: int) -> list[Any]:
    """The items as the project's batches by length take them."""
    from hydra_vlm.training.trainer import ByLength

    return [items[i] for i in ByLength([item["length"] for item in items], batch, seed)]


def unshuffled() -> type:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    class Unshuffled(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset or self.train_dataset)

    return Unshuffled


def silence(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def logged(history: Sequence[Mapping[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


if __name__ == "__main__":
    main()
