"""Time and memory from a data file to the first training step, by the file's size: with an empty cache and again.

    python tools/bench_streaming.py [--records 10000 100000 1000000] [--folder DIR] [--lines]

Each start is a process of its own: it loads the model, checks the file, and trains one step of four records. Printed
are the seconds of the check (rows and images, then lengths), the seconds from its beginning to the end of the first
step, and the peak of the process's memory (with the libraries and the model, which take their share at any size).
Seconds are of one core's time, so that a busy machine does not count; the last column is the clock's.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = (
    "red",
    "blue",
    "round",
    "small",
    "wooden",
    "bright",
    "old",
    "table",
    "bird",
    "street",
    "near",
    "above",
    "water",
)
IMAGES = 16


def write_file(path: Path, count: int, form: str) -> None:
    """`count` records over a few shared pictures: one to three rounds of up to forty words."""
    from PIL import Image

    rng = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    for index in range(IMAGES):
        Image.effect_noise((64, 48), 40 + index).convert("RGB").save(path.parent / f"{index}.jpg")
    with path.open("w", encoding="utf-8") as file:
        file.write("" if form == "lines" else "[")
        for number in range(count):
            turns = []
            for turn in range(rng.choice((1, 1, 2, 3))):
                asked = "<image>\n" * (turn == 0) + f"what about {number}, {' '.join(rng.choices(WORDS, k=5))}?"
                answer = " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
                turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
            row = {"id": f"r{number}", "image": f"{rng.randrange(IMAGES)}.jpg", "conversations": turns}
            separator = "" if number == 0 else "\n" if form == "lines" else ",\n"
            file.write(separator + json.dumps(row))
        file.write("" if form == "lines" else "]")


def start(path: Path, model: str, template: str, grouped: bool) -> dict[str, float]:
    """One start in this process: what is timed, in seconds, and the peak of memory in GiB."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import transformers

    from hydra_vlm.config import load_config
    from hydra_vlm.data.instruction import InstructionDataset
    from hydra_vlm.data.preflight import check_file, check_reading, settle
    from hydra_vlm.data.readers import open_reader
    from hydra_vlm.models.loading import load_model
    from hydra_vlm.training.recipe import InstructionData, finetune, prepare_projector

    transformers.logging.disable_progress_bar()
    loaded = load_model(model, "cpu")
    reader = open_reader(loaded.processor, template)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    clock, began = time.monotonic(), time.process_time()
    checked = check_file(path)
    rows = time.process_time() - began
    checked = check_reading(checked, reader, 1024)
    lengths = time.process_time() - began - rows
    settle([checked], "error")
    data = InstructionData(InstructionDataset.of_checked(checked, reader), None, reader)
    settings = load_config(
        None, ["training.steps=1", "training.batch_size=4", f"training.group_by_length={str(grouped).lower()}"]
    ).training
    with tempfile.TemporaryDirectory() as folder:
        finetune(prepare_projector(loaded), loaded, data, settings, 0, Path(folder))
    first = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = {"rows": rows, "lengths": lengths, "first step": first, "clock": time.monotonic() - clock}
    return seconds | {"before": before, "peak": peak}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    asked.add_argument("--folder", type=Path, help="keep files and cache there (default: a temporary folder)")
    asked.add_argument("--model", default="embedded")
    asked.add_argument("--template", default="auto", help="auto (the model's chat template), v1, v1-short, plain")
    asked.add_argument("--lines", action="store_true", help="JSON Lines in place of a JSON list")
    asked.add_argument("--grouped", action="store_true", help="batches by length")
    asked.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    wish = asked.parse_args()
    if wish.start:
        print(json.dumps(start(wish.start, wish.model, wish.template, wish.grouped)))
        return
    folder = wish.folder or Path(tempfile.mkdtemp(prefix="streaming-"))
    try:
        print(
            f"{'records':>9} {'MB':>6} {'start':6} {'rows s':>8} {'lengths s':>9} {'first step s':>12} {'peak GiB':>8} "
            f"{'clock s':>8}"
        )
        for count in wish.records:
            path = folder / str(count) / ("train.jsonl" if wish.lines else "train.json")
            write_file(path, count, "lines" if wish.lines else "list")
            cache = folder / str(count) / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            words = [sys.executable, __file__, "--start", str(path), "--model", wish.model]
            words += ["--template", wish.template]
            words += ["--grouped"] if wish.grouped else []
            for which in ("first", "second"):
                done = subprocess.run(
                    words,
                    env=os.environ | {"HYDRA_VLM_CACHE": str(cache)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    check=True,
                )
                told = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{count:9,} {path.stat().st_size / 1e6:6.0f} {which:6} {told['rows']:8.2f} {told['lengths']:9.2f} "
                    f"{told['first step']:12.2f} {told['peak']:8.2f} {told['clock']:8.1f}",
                    flush=True,
                )
    finally:
        if wish.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
