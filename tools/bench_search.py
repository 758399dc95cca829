"""What a trial of a search costs, against starting the plain training command once per trial; both in one run.

    python tools/bench_search.py [--work build/bench-search] [--trials 16] [--plain 4] [--workers 2] [CONFIG]

Plain: `hydra-vlm train --schedule uniform` in a new folder, the whole process, so many times, each with all of the
machine; half of them before the search and half after it, since a machine is not equally fast for half an hour. Search:
`hydra-vlm search --trials N --workers W` in a new folder, the whole command from start to end, profile and proposals
included, without final runs; its wall time divided by its trials. Then the same command again, with the final
comparison. Prints the times, the ratio, and what the whole search cost in plain runs of uniform LoRA. Run it on an
otherwise idle machine.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench-search"))
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--plain", type=int, default=4, help="plain runs, the median of which counts")
    parser.add_argument("--workers", type=int, default=2)
    asked, settings = parser.parse_known_args()
    shutil.rmtree(asked.work, ignore_errors=True)
    plain: list[float] = []

    def run_plain(until: int) -> None:
        while len(plain) < until:
            out = asked.work / f"plain-{len(plain)}"
            plain.append(seconds("train", *settings, "--schedule", "uniform", "--out", out))
            print(f"plain training command {len(plain)}: {plain[-1]:.1f} s", flush=True)

    run_plain(asked.plain // 2)
    command = (
        "search",
        *settings,
        "--trials",
        asked.trials,
        "--workers",
        asked.workers,
        "--out",
        asked.work / "search",
    )
    search = seconds(*command, "search.final_seeds=[]")
    run_plain(asked.plain)
    each, alone = search / asked.trials, median(plain)
    print(f"search of {asked.trials} trials, {asked.workers} workers: {search:.1f} s, {each:.1f} s a trial")
    print(f"a trial costs {each / alone:.2f} of the plain command ({alone:.1f} s, median of {len(plain)})", flush=True)
    final = seconds(*command)
    print(f"final comparison: {final:.1f} s; the whole command: {(search + final) / 60:.1f} min")
    runs, with_final = search / alone, (search + final) / alone
    print(f"in plain runs of uniform LoRA: search {runs:.1f}, with the final comparison {with_final:.1f}")


def seconds(*words: object) -> float:
    """Wall time of a command of hydra-vlm, which must succeed."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "hydra_vlm.cli", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed: {done.stderr[-2000:]}")
    return time.monotonic() - started


if __name__ == "__main__":
    main()
