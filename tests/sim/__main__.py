"""`python -m tests.sim`: a campaign of kills, or of faults at single frames; prints the counts, and how to
run again what failed."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .campaign import run_seed
from .cluster import tiny_model
from .frames import run_frames


def main() -> int:
    """The exit code: 1 if an answer was lost or differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="goes on with further seeds to this many kills")
    parser.add_argument("--frames", action="store_true", help="faults at every frame of an answer instead")
    parser.add_argument("--seeds", type=int, default=1, help="with --frames: so many seeds")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; alone: the only one")
    parser.add_argument("--log", action="store_true", help="prints what happens")
    options = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if options.log else logging.CRITICAL, stream=sys.stdout)
    begun, failed, counts, digest = time.monotonic(), list[int](), Counter[str](), ""
    answers = struck = missed = wrong = 0
    longest_s = 0.0
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_model(Path(directory) / "tiny")
        for seed in itertools.count(options.seed):
            if options.frames:
                found = run_frames(model, seed, keep=options.log)
                counts += found.done
                answers, struck = answers + sum(found.done.values()), struck + sum(found.done.values())
                problems, lines, pause_s, digest = found.wrong, found.lines, found.longest_s, found.digest
                over = seed + 1 >= options.seed + options.seeds
            else:
                outcome = run_seed(model, seed, keep=options.log)
                counts += outcome.kills
                answers, struck = answers + outcome.answers, struck + outcome.struck
                missed += outcome.missed
                problems, lines, pause_s, digest = (
                    outcome.wrong,
                    outcome.lines,
                    outcome.longest_s,
                    outcome.digest,
                )
                over = sum(counts.values()) >= options.kills
            print("\n".join(lines), end="\n" if lines else "")
            for problem in problems:
                print(f"seed {seed}: {problem}", flush=True)
            failed += [seed] if problems else []
            wrong, longest_s = wrong + len(problems), max(longest_s, pause_s)
            if over:
                break
    what, kinds = ("faults", " --frames") if options.frames else ("kills", "")
    roles = ", ".join(f"{role} {count}" for role, count in sorted(counts.items()))
    print(f"{sum(counts.values())} {what} ({roles}) in {struck} of {answers} answers; {missed} did not count")
    longest = "answer" if options.frames else "pause"
    print(f"answers lost, different or leaving something behind: {wrong}")
    print(f"the longest {longest} {longest_s:.2f} s of virtual time")
    print(f"seeds {options.seed} to {seed} in {time.monotonic() - begun:.0f} s; log {digest}")
    for number in failed:
        print(f"again: python -m tests.sim{kinds} --seed {number} --log")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
