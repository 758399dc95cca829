"""Which checkpoint a stopped run goes on from, and how one comes whole onto the disk.

A checkpoint is whole when every file of it reads to its end: the Trainer writes `trainer_state.json` after weights,
optimizer, schedule and random states, but after a power cut the last file may be there and an earlier one torn.
Nothing is unpickled to find out: the archives' own checksums are.
"""

import os
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hydra_vlm.errors import DiskFullError
from hydra_vlm.faults import disk_full_told
from hydra_vlm.reading import read_json

LAST_WRITTEN = "trainer_state.json"
ARCHIVES = (".pt", ".pth", ".bin")  # of torch.save: zip archives with checksums
NEEDED = (  # each by one of these names; global_step<k> holds the first three under DeepSpeed
    ("*.safetensors", "pytorch_model*", "global_step*"),
    ("optimizer*", "global_step*"),
    ("scheduler.pt", "global_step*"),
    ("rng_state*.pth",),
)


def last_whole_checkpoint(folder: Path, say: Callable[[str], None] = lambda line: None) -> str | None:
    """The newest checkpoint whose files are whole, or None; damaged ones are removed, and `say` is told."""
    steps = checkpoints(folder)
    for step in sorted(steps, reverse=True):
        damage = damage_of(steps[step])
        if damage is None:
            return str(steps[step])
        say(f"checkpoint of step {step} is damaged ({damage}): removed; the one before it is used, if there is one")
        shutil.rmtree(steps[step], ignore_errors=True)
    return None


def checkpoints(folder: Path) -> dict[int, Path]:
    """Every checkpoint folder by its step, whole or not."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in found if match}


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where all of them are there and read to their ends."""
    try:
        read_json(checkpoint / LAST_WRITTEN)
    except (OSError, ValueError):
        return f"{LAST_WRITTEN} is missing or cut off"
    for names in NEEDED:
        if not any(any(checkpoint.glob(name)) for name in names):
            return f"{names[0]} is missing"
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if not _reads(path):
            return f"{path.name} does not read"
    return None


def _reads(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:  # which compares the header with the file's size
                opened.keys()
                return True
        if path.suffix in ARCHIVES:
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
    except (OSError, SafetensorError, zipfile.BadZipFile, EOFError, ValueError):
        return False
    return True


def write_whole(folder: Path, step: int, write: Callable[[], None], estimate: int) -> None:
    """Let a checkpoint be written into `folder` and forced onto the disk; one that cannot be is removed.

    `estimate` is a checkpoint's size in bytes where there is no earlier one to tell.

    Raises:
        DiskFullError: there is no room; earlier checkpoints are as they were.
    """
    mine = folder / f"checkpoint-{step}"
    known = [_size(path) for number, path in checkpoints(folder).items() if number != step]
    try:
        with disk_full_told(mine, lambda: _kept(folder, step), needed=max(known, default=estimate)):
            write()
            for path in [*mine.rglob("*"), mine]:
                _force(path)
    except DiskFullError:
        shutil.rmtree(mine, ignore_errors=True)
        raise


def kept(folder: Path) -> str:
    """Which work survives, in words."""
    return _kept(folder, None)


def _kept(folder: Path, but: int | None) -> str:
    steps = [step for step in checkpoints(folder) if step != but]
    return f"The checkpoint of step {max(steps)} is kept." if steps else "There is no checkpoint yet."


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def _force(path: Path) -> None:
    with suppress(OSError):  # some file systems force no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
