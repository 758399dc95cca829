"""What rates, ranks and width each bring: arms of one ground, trained with the same seeds, batches and noise.

    python tools/measure_ranks.py --ground embedded --seeds 0,1,2 --arms fixed,squeeze-spectral-2
    python tools/measure_ranks.py --ground embedded --table

Every finished run is kept in build/ranks/<ground>/<arm>/, so a measurement that was stopped goes on. An arm is written
`fixed` or `squeeze|dynamic-DECIDER-WIDTH`; `today` has one rate for all parts and no pilot. `+key=value` changes a key
of the configuration for that arm, `+nopilot` takes the configuration's rates.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from hydra_vlm.allocation import AllocationRequest, allocate
from hydra_vlm.config import load_config
from hydra_vlm.moving.plan import wide_schedule
from hydra_vlm.records import TrialRecord
from hydra_vlm.report.statistics import seed_interval
from hydra_vlm.run_folder import RunFolder
from hydra_vlm.trials import Study, prepare_study, run_trial, scaling_of

GROUNDS = {
    "embedded": (None, ()),
    "worlds": (None, ("data.train=worlds",)),
    "smol": (Path("smol"), ()),
}
ONE_RATE = ("training.rates=single", "scaling.rule=constant")


def keys_of(arm: str) -> tuple[tuple[str, ...], bool, bool]:
    """An arm's keys, whether its ranks move, whether rates are chosen by a pilot."""
    name, *changes = arm.split("+")
    pilot = "nopilot" not in changes and name != "today"
    keys = tuple(change for change in changes if change != "nopilot")
    if name == "today":
        return (*ONE_RATE, *keys), False, False
    if name == "fixed":
        return keys, False, pilot
    ranks, decide, width = name.split("-")
    return (f"training.ranks={ranks}", f"training.decide={decide}", f"training.width={width}", *keys), True, pilot


def measure(study: Study, base: Sequence[str], file: Path | None, arm: str, seed: int, root: Path) -> TrialRecord:
    """One run of an arm, read back where it is there."""
    keys, moving, pilot = keys_of(arm)
    config = load_config(file, [*base, *keys])
    folder = RunFolder(root / arm.replace("/", "_"))
    own = replace(study, config=config, folder=folder, tasks=())
    scaling = scaling_of(config)
    if moving:
        schedule = wide_schedule(study.graph, study.budget, scaling, config.training.width)
    else:
        schedule = allocate("uniform", AllocationRequest(study.graph, study.budget, scaling=scaling))
    return run_trial(own, "run", schedule, seed, print, moving=moving, pilot=pilot)


def records(root: Path) -> Iterator[tuple[str, TrialRecord]]:
    for path in sorted(root.glob("*/trials/*/record.json")):
        yield path.parents[2].name, TrialRecord.from_json(json.loads(path.read_text()))


def table(root: Path) -> str:
    arms: dict[str, dict[int, TrialRecord]] = {}
    for arm, record in records(root):
        arms.setdefault(arm, {})[record.seed] = record
    base = arms.get("fixed", {})
    lines = [f"{'arm':44} seeds  loss    ±     - fixed (95 %)            shipped  most   steps+  seconds"]
    for arm, found in sorted(arms.items(), key=lambda pair: fmean(r.validation_loss for r in pair[1].values())):
        losses = [record.validation_loss for record in found.values()]
        common = sorted(found.keys() & base.keys())
        difference = ""
        if len(common) > 1 and arm != "fixed":
            pairs = [found[seed].validation_loss - base[seed].validation_loss for seed in common]
            difference = seed_interval(pairs).show(4, signed=True)
        one = next(iter(found.values()))
        spread = (sum((x - fmean(losses)) ** 2 for x in losses) / max(1, len(losses) - 1)) ** 0.5
        thrown = fmean(r.pilot.thrown_away if r.pilot else 0 for r in found.values())
        shipped = one.schedule.parameters if one.schedule else 0
        lines.append(
            f"{arm:44} {len(found):3}  {fmean(losses):.4f} {spread:.3f}  {difference:38} {shipped:8,} "
            f"{one.most_trainable:8,} {thrown:5.0f} {fmean(r.seconds for r in found.values()):6.0f}"
            f"  {' '.join(f'{found[s].validation_loss:.3f}' for s in sorted(found))}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ground", choices=GROUNDS, default="embedded")
    parser.add_argument("--arms", default="fixed")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", type=Path, default=Path("build/ranks"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("keys", nargs="*")
    asked = parser.parse_args()
    root = asked.out / asked.ground
    if not asked.table:
        file, keys = GROUNDS[asked.ground]
        base = [*keys, "evaluation.limit=1", "evaluation.zero_shot=false", *asked.keys]
        study = prepare_study(load_config(file, base), root / "shared", lambda _: None)
        for seed in map(int, asked.seeds.split(",")):
            for arm in asked.arms.split(","):
                record = measure(study, base, file, arm, seed, root)
                print(f"{arm} {seed}: {record.validation_loss:.4f} {record.seconds:.0f} s", flush=True)
                assert not math.isnan(record.seconds)
    print(table(root))


if __name__ == "__main__":
    main()
