"""Which checkpoint a stopped run goes on from."""

import json
import re
import shutil
from pathlib import Path

LAST_WRITTEN = "trainer_state.json"  # the Trainer writes it after weights, optimizer, schedule and random states


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, or None; half-written ones are removed."""
    steps = {
        int(m[1]): path for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for step in sorted(steps, reverse=True):
        if _is_whole(steps[step]):
            return str(steps[step])
        shutil.rmtree(steps[step])
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / LAST_WRITTEN).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True
