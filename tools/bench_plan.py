"""Compare what `hydra-vlm plan` predicts with what is measured on this machine's CPU: peak memory and FLOPs.

    python tools/bench_plan.py [--size embedded,larger] [--folder DIR]

Each case runs in a process of its own. The baseline is the resident memory after all imports and one step over one row
with the embedded model, which is then deleted, so that what libraries set up at their first use is in it. Then the
model is loaded, the kernel's high-water mark is reset (loading does not count), the real recipe runs, and the mark is
read. Large blocks are handed back to the system when they are freed (MALLOC_MMAP_THRESHOLD_), and there is one arena,
since otherwise the mark shows what glibc keeps for later as well. FLOPs are counted by torch's FlopCounterMode in one
more step. Attention is eager, as it is on the CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES: dict[str, list[tuple[str, str, list[str]]]] = {
    "embedded": [
        ("profile", "batch 32, rank 8", ["training.batch_size=32", "budget.rank=8"]),
        ("training", "batch 32", ["training.batch_size=32"]),
        ("training", "batch 64", ["training.batch_size=64"]),
        ("training", "batch 64, checkpointing", ["training.batch_size=64", "training.gradient_checkpointing=true"]),
        ("training", "batch 64, bf16", ["training.batch_size=64", "training.precision=bf16"]),
        ("evaluation", "64 questions", ["training.batch_size=64", "evaluation.batch_size=64"]),
    ],
    "larger": [
        ("training", "batch 4", ["training.batch_size=4"]),
        ("training", "batch 8", ["training.batch_size=8"]),
        ("training", "batch 8, checkpointing", ["training.batch_size=8", "training.gradient_checkpointing=true"]),
        ("evaluation", "8 questions", ["training.batch_size=8", "evaluation.batch_size=8"]),
    ],
}
QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="embedded,larger")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(measure(**json.loads(asked.case))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch)
        print(f"{'':<48}{'peak MiB over the baseline':^31}{'GFLOPs of a step or batch':^27}")
        print(f"{'size':<10}{'case':<38}" + 2 * f"{'predicted':>12}{'measured':>11}{'ratio':>7}")
        for size in asked.size.split(","):
            for phase, name, overrides in CASES[size]:
                found = run(size, phase, overrides, folder)
                held = found["predicted"] / 2**20, found["measured"] / 2**20
                work = found["flops"] / 1e9, found["counted"] / 1e9
                print(
                    f"{size:<10}{f'{phase}, {name}':<38}{held[0]:>12.1f}{held[1]:>11.1f}{held[0] / held[1]:>7.3f}"
                    f"{work[0]:>12.1f}{work[1]:>11.1f}{work[0] / work[1]:>7.3f}",
                    flush=True,
                )


def run(size: str, phase: str, overrides: list[str], folder: Path) -> dict[str, float]:
    """One case in a fresh process."""
    case = json.dumps({"size": size, "phase": phase, "overrides": overrides, "folder": str(folder)})
    done = subprocess.run(
        [sys.executable, __file__, "--case", case], env=os.environ | QUIET, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(size: str, phase: str, overrides: list[str], folder: str) -> dict[str, float]:
    """Predicted and measured bytes over the baseline, FLOPs predicted and counted, of one phase."""
    import gc

    import accelerate.optimizer  # noqa: F401
    from torch.utils.flop_counter import FlopCounterMode

    from hydra_vlm.config import load_config
    from hydra_vlm.models.loading import load_model
    from hydra_vlm.planning.plan import GIB, RUNTIME, Device
    from hydra_vlm.planning.run import planner_of
    from hydra_vlm.training import recipe  # noqa: F401  (all imports before the baseline)

    model = larger_model(Path(folder)) if size == "larger" else "embedded"
    rows = max(int(word.split("=")[1]) for word in overrides if "batch_size" in word)
    data = records(Path(folder) / f"data-{rows}", rows, 40 if size == "embedded" else 60)
    config = load_config(
        None,
        [f"model={model}", f"data.train={data}", f"data.tests={{q: {data}}}", "device=cpu", "data.max_length=1024",
         "budget.rank=4", "evaluation.max_new_tokens=8", *overrides],
    )  # fmt: skip
    plan = planner_of(config, Device("cpu", 64 * GIB, ""))(config)
    told = plan.phase(phase)
    warm = config.model_copy(update={"training": config.training.model_copy(update={"batch_size": 1})})
    one = records(Path(folder) / "data-1", 1, 4)
    warm = warm.model_copy(update={"data": warm.data.model_copy(update={"train": str(one)})})
    prepared(load_model("embedded", "cpu"), warm, "training", Path(folder))(1)
    gc.collect()
    baseline = resident("VmRSS")
    loaded = load_model(model, "cpu")
    for weight in loaded.model.parameters():  # they are mapped from the file, and what nobody reads is not in memory
        weight.sum()
    step = prepared(loaded, config, phase, Path(folder))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    step(2)
    peak = resident("VmHWM")
    with FlopCounterMode(display=False) as counter:
        step(1)
    return {
        "predicted": told.memory.total - RUNTIME["cpu"] * GIB,
        "measured": peak - baseline,
        "baseline": baseline,
        "flops": told.flops,
        "counted": counter.get_total_flops(),
    }


def prepared(loaded: Any, config: Any, phase: str, folder: Path) -> Any:
    """What runs one phase for some steps; the tower's features are there beforehand, as in a run."""
    import shutil

    from hydra_vlm.allocation import AllocationRequest, Budget, allocate
    from hydra_vlm.benchmarks.exact_match import ExactMatch
    from hydra_vlm.benchmarks.generation import Answering, answer
    from hydra_vlm.data.features import encode_once
    from hydra_vlm.data.instruction import InstructionDataset
    from hydra_vlm.data.readers import open_reader
    from hydra_vlm.data.records import read_records
    from hydra_vlm.evaluation import with_features
    from hydra_vlm.training.recipe import InstructionData, adapting, finetune

    found = read_records(Path(config.data.train))
    reader = open_reader(loaded.processor)
    features = encode_once(loaded.model, loaded.processor, [r.image for r in found if r.image])
    reader = with_features(reader, features)
    graph = loaded.parts.graph
    schedule = allocate("uniform", AllocationRequest(graph, Budget.of_rank(graph, config.budget.rank)))
    out = folder / "checkpoints"

    def run(steps: int) -> None:
        training = config.training.model_copy(update={"steps": steps, "save_steps": 10**9})
        with adapting(loaded, schedule, training, 0) as model:
            if phase == "evaluation":
                how = Answering(config.evaluation.batch_size, config.evaluation.max_new_tokens)
                never_end()
                answer(model.eval(), reader, ExactMatch("q").examples(found), how)
                return
            rows = InstructionDataset(found, reader, 1024)
            finetune(model, loaded, InstructionData(rows, None, reader), training, 0, out)
        shutil.rmtree(out, ignore_errors=True)

    return run


def never_end() -> None:
    """From now on all answers take max_new_tokens, so that the longest case is measured."""
    from hydra_vlm.benchmarks import generation

    generation.stop_tokens = lambda model, reader: [reader.tokenizer.pad_token_id]


def records(folder: Path, rows: int, words: int) -> Path:
    """So many records of one length, each with a picture of its own; half of each is the answer."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.json"
    content = []
    for i in range(rows):
        Image.new("RGB", (64, 64), (i % 256, 90, 30)).save(folder / f"{i}.png")
        talk = [
            {"from": "human", "value": "<image>\n" + "red " * words},
            {"from": "gpt", "value": ("blue " * words).strip()},
        ]
        content.append({"id": str(i), "image": f"{i}.png", "conversations": talk})
    path.write_text(json.dumps(content))
    return path


def larger_model(folder: Path) -> str:
    """A random MobileVLM with a decoder of width 768, 12 layers and 32,000 tokens, its tower that of the embedded."""
    target = folder / "larger"
    if not (target / "config.json").is_file():
        places = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench_plan; "
        build = f"{places}bench_plan.build_larger({str(target)!r})"
        subprocess.run([sys.executable, "-c", build], check=True)
    return str(target)


def build_larger(target: str) -> None:
    """Write the larger model; in a process of its own, since its memory must not be found free later."""
    import torch
    from transformers import AutoConfig

    from hydra_vlm.models.loading import load_model
    from hydra_vlm.models.mobilevlm.modeling import MobileVLMForConditionalGeneration

    small = load_model("embedded", "cpu")
    config = AutoConfig.from_pretrained(small.model.config._name_or_path)
    config.dtype = torch.float32
    text = config.text_config
    text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 768, 12, 12, 12
    text.head_dim, text.intermediate_size, text.vocab_size = 64, 2048, 32000
    MobileVLMForConditionalGeneration(config).save_pretrained(target)
    small.processor.save_pretrained(target)


def resident(what: str) -> int:
    """VmRSS (now) or VmHWM (the most since the mark was reset) of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{what}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
