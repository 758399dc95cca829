"""Measure the peak memory of converting and loading a MobileVLM checkpoint, in units of the checkpoint's size.

    OMP_NUM_THREADS=1 python tools/bench_convert.py                   # about 1 GB of random bfloat16 weights
    OMP_NUM_THREADS=1 python tools/bench_convert.py --gigabytes 3.4   # as large as MobileVLM-1.7B's

A checkpoint in the authors' layout (one pytorch_model.bin) is made in a temporary folder; then each step runs in a
process of its own that imports torch and transformers first and reports how far its memory rose above that. `resident`
is the rise of ru_maxrss, which also counts pages of mapped files, though the kernel may drop these at any time;
`private` is the largest rise of RssAnon seen (sampled every 2 ms), memory that nothing but the process holds.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HIDDEN, FEED_FORWARD, VOCABULARY = 1024, 2816, 32000
STEPS = {
    "convert": "authors' layout to ours",
    "merge": "authors' layout and a LoRA folder of rank 16, merged, to ours",
    "load": "ours in bfloat16, from_pretrained",
    "run": "the same, and every weight summed once (float32 copies of one tensor at a time)",
    "back": "ours to the authors' layout",
}


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Random bfloat16 weights under the authors' names, with as many decoder layers as the size asks for."""
    import torch

    from hydra_vlm.models.mobilevlm import MobileVLMConfig
    from hydra_vlm.models.mobilevlm.original_layout import CLIP_LARGE_336, their_config, their_name
    from hydra_vlm.models.mobilevlm.original_weights import expected_shapes

    def shapes(layers: int) -> dict[str, tuple[int, ...]]:
        return expected_shapes(MobileVLMConfig(text_config=text | {"num_hidden_layers": layers}))

    def size(layers: int) -> int:
        return 2 * sum(torch.Size(shape).numel() for shape in shapes(layers).values())

    text = {"hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "num_attention_heads": 8}
    text |= {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    layers = max(1, round((gigabytes * 1e9 - size(1)) / (size(2) - size(1))) + 1)
    config = MobileVLMConfig(text_config=text | {"num_hidden_layers": layers}, dtype="bfloat16")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(their_config(config, CLIP_LARGE_336)))
    weights = {their_name(n): torch.randn(shape, dtype=torch.bfloat16) for n, shape in shapes(layers).items()}
    torch.save(weights, folder / "pytorch_model.bin")
    make_adapter(folder.with_name("lora"), weights)


def make_adapter(folder: Path, weights: dict[str, Any]) -> None:
    """A random LoRA folder of rank 16 over all linears of the decoder's layers."""
    import torch

    folder.mkdir()
    adapted = {name.removesuffix(".weight"): w for name, w in weights.items() if re.match(r"model\.layers.*proj", name)}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 32}))
    matrices = {f"base_model.model.{name}.lora_A.weight": torch.randn(16, w.shape[1]) for name, w in adapted.items()}
    matrices |= {f"base_model.model.{name}.lora_B.weight": torch.randn(w.shape[0], 16) for name, w in adapted.items()}
    torch.save(matrices, folder / "adapter_model.bin")


def measure(step: str, source: Path, target: Path) -> dict[str, float]:
    """Do one step in this process; the rise of resident and private memory in bytes, and seconds."""
    import torch
    from transformers import AutoModelForImageTextToText

    from hydra_vlm.models.mobilevlm.conversion import to_hydra, to_original

    def load() -> torch.nn.Module:
        return AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16)

    def run() -> float:
        return sum(float(parameter.sum(dtype=torch.float32)) for parameter in load().parameters())

    work = {"convert": lambda: to_hydra(source, target), "back": lambda: to_original(source, target)}
    work |= {"merge": lambda: to_hydra(source.with_name("lora"), target, base=source)}
    private, baseline, done = [_private()], _resident(), threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            private.append(_private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    kept = {"load": load, "run": run, **work}[step]()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    del kept
    return {"resident": _resident() - baseline, "private": max(private) - private[0], "seconds": seconds}


def _resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _private() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssAnon"))


def _child(*arguments: object) -> str:
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:  # a fresh process: ru_maxrss never falls, and a child starts from its parent's
        step, source, target = arguments.child
        if step == "make":
            make_checkpoint(Path(source), arguments.gigabytes)
        else:
            print(json.dumps(measure(step, Path(source), Path(target))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        theirs, ours, back = (Path(temporary) / name for name in ("theirs", "ours", "back"))
        places = {"convert": (theirs, ours), "merge": (theirs, theirs.with_name("merged"))}
        _child("--gigabytes", arguments.gigabytes, "--child", "make", theirs, theirs)
        size = (theirs / "pytorch_model.bin").stat().st_size
        print(f"checkpoint: {size / 1e9:.2f} GB\n{'step':10} resident  private  seconds")
        for step, what in STEPS.items():
            source, target = places.get(step, (ours, back))
            rise = json.loads(_child("--child", step, source, target).splitlines()[-1])
            shares = f"{rise['resident'] / size:7.2f}x {rise['private'] / size:7.2f}x"
            print(f"{step:10} {shares} {rise['seconds']:8.1f}  {what}", flush=True)


if __name__ == "__main__":
    main()
