"""Answers on a simulated cluster, on virtual time (see `sim`): kills cost nothing, and a seed says it all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sim.campaign import ROLES, run_seed
from sim.cluster import tiny_model
from sim.frames import FAULTS, run_frames

ROOT = Path(__file__).resolve().parents[1]
#: Shares of the campaigns; `python -m tests.sim --kills 1000` and `--frames --seeds 50` are the whole.
SEEDS = range(100, 106)
FRAME_SEEDS = (0, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_no_answer_is_lost_and_no_token_differs_when_processes_are_killed(model: Path) -> None:
    kills: Counter[str] = Counter()
    for seed in SEEDS:
        outcome = run_seed(model, seed)
        assert not outcome.wrong, f"again: python -m tests.sim --seed {seed} --log\n{outcome.wrong}"
        kills += outcome.kills
    assert set(kills) == set(ROLES)  # every kind of victim was there


def test_no_answer_is_lost_whatever_happens_to_one_of_its_frames(model: Path) -> None:
    done: Counter[str] = Counter()
    for seed in FRAME_SEEDS:
        found = run_frames(model, seed, most=15)
        assert not found.wrong, f"again: python -m tests.sim --frames --seed {seed} --log\n{found.wrong}"
        done += found.done
    assert set(done) == set(FAULTS)


def test_a_seed_gives_the_same_events_each_time_also_in_another_process(model: Path) -> None:
    one, again = run_seed(model, 1, keep=True), run_seed(model, 1, keep=True)
    assert one.lines == again.lines
    assert run_seed(model, 2).digest != one.digest
    command = [sys.executable, "-m", "tests.sim", "--seed", "1"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert one.digest in result.stdout
