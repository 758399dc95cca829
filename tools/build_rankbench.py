"""RankBench's trials: real fine-tuning runs of many schedules under one budget, on the embedded model and six scores.

    OMP_NUM_THREADS=1 python tools/build_rankbench.py --work build/rankbench [--entries 160] [--runs 300] [--minutes 60]

Resumable, and several may run side by side in one folder: a finished run is never repeated, a stopped one goes on. It
writes what `python -m hydra_vlm.rankbench collect` makes the table of:

    base/                the embedded model after full fine-tuning on `worlds`, which knows the forms of the questions
    run/                 config.yaml, graph.json, profile.json, rankbench.json (the schedules),
                         trials/<id>-seed<k>/record.json

About a minute a run on one core; the base takes four minutes on two.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

from hydra_vlm.compare import compare
from hydra_vlm.config import Config, load_config
from hydra_vlm.files import write_json
from hydra_vlm.measuring import measure_profile
from hydra_vlm.rankbench.entry import Entry
from hydra_vlm.rankbench.plan import plan, runs
from hydra_vlm.trials import Study, prepare_study, run_trial

TEACHING = ("data.train=worlds", "schedules=[full]", "training.steps=450", "evaluation.zero_shot=false")
TRIAL = (
    "data.train=nicknames",
    "training.steps=90",
    "training.batch_size=24",
    "training.learning_rate=3e-3",
    "training.rates=single",
    "scaling.rule=constant",
    "training.group_by_length=true",
    "profile.steps=20",
    "evaluation.limit=null",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/rankbench"))
    parser.add_argument("--entries", type=int, default=160, help="schedules; a longer plan starts with the shorter one")
    parser.add_argument("--runs", type=int, default=10**6, help="stop after so many runs of the plan's order")
    parser.add_argument("--minutes", type=float, default=10**6, help="begin no run after so many minutes")
    asked = parser.parse_args()
    until = time.monotonic() + 60 * asked.minutes
    base = taught(asked.work)
    study = prepare_study(trial_config(base), asked.work / "run")
    profile = measure_profile(study)
    entries = {entry.id: entry for entry in plan(study.graph, study.budget, profile, n=asked.entries)}
    write_json(study.folder.path / "rankbench.json", [entry.to_json() for entry in entries.values()])
    for name, seed in runs(list(entries.values()))[: asked.runs]:
        if time.monotonic() > until:
            return
        run(study, entries[name], seed)


def taught(work: Path) -> Path:
    """The folder of the base, made first where it is not there."""
    base = work / "base"
    if not base.is_dir():
        compare(load_config(None, TEACHING), work / "teaching")
        shutil.copytree(work / "teaching" / "trials" / "full-seed0" / "model", work / "base.new")
        (work / "base.new").rename(base)
    return base


def trial_config(base: Path) -> Config:
    """What all runs share."""
    return load_config(None, (f"model={base}", *TRIAL))


def run(study: Study, entry: Entry, seed: int) -> None:
    """One run, unless it is done or another process has it."""
    folder = study.folder.trial(f"{entry.id}-seed{seed}")
    if (folder / "record.json").is_file():
        return
    claim = folder.parent / f"{entry.id}-seed{seed}.claim"
    if not taken(claim):
        return
    record = run_trial(study, entry.id, entry.schedule(study.graph, study.budget), seed)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    claim.unlink()
    print(f"{entry.name}: {record.summary()}", flush=True)


def taken(claim: Path) -> bool:
    """Whether this process now has the claim; that of a process that is gone is void."""
    claim.parent.mkdir(parents=True, exist_ok=True)
    try:
        with claim.open("x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        owner = claim.read_text()
    if not owner or Path(f"/proc/{owner}").is_dir():
        return False
    claim.unlink(missing_ok=True)
    return taken(claim)


if __name__ == "__main__":
    main()
