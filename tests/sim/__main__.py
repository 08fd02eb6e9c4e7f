"""`python -m tests.sim`: a campaign of kills; prints the counts, and how to run again what failed."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .campaign import run_seed
from .cluster import tiny_model


def main() -> int:
    """The exit code: 1 if an answer was lost or differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="goes on with further seeds to this many kills")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; without --kills the only one")
    parser.add_argument("--log", action="store_true", help="prints what happens")
    options = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if options.log else logging.CRITICAL, stream=sys.stdout)
    begun, seed, failed = time.monotonic(), options.seed, []
    kills: Counter[str] = Counter()
    answers = struck = missed = wrong = 0
    longest_s = 0.0
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_model(Path(directory) / "tiny")
        while True:
            outcome = run_seed(model, seed, options.log)
            print("\n".join(outcome.lines), end="\n" if outcome.lines else "")
            kills += outcome.kills
            answers, struck, missed = (
                answers + outcome.answers,
                struck + outcome.struck,
                missed + outcome.missed,
            )
            longest_s = max(longest_s, outcome.longest_s)
            wrong += len(outcome.wrong)
            for problem in outcome.wrong:
                print(f"seed {seed}: {problem}", flush=True)
            if outcome.wrong:
                failed.append(seed)
            seed += 1
            if sum(kills.values()) >= options.kills:
                break
    roles = ", ".join(f"{role} {count}" for role, count in sorted(kills.items()))
    print(f"{sum(kills.values())} kills ({roles}) in {struck} of {answers} answers; {missed} did not count")
    print(f"answers lost or different: {wrong}; the longest pause {longest_s:.2f} s of virtual time")
    print(f"seeds {options.seed} to {seed - 1} in {time.monotonic() - begun:.0f} s; log {outcome.digest}")
    for seed in failed:
        print(f"again: python -m tests.sim --seed {seed} --log")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
