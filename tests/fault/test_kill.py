"""SIGKILL at random moments of a three-round run; the same command must end in the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.reliability.subject import outcome

KILLS = int(os.environ.get("PREFLOOP_KILLS", "10"))
SETTINGS = [
    "prompts_per_round=48",
    "prompts_per_part=16",
    "sampler.completions=3",
    "sampler.max_new_tokens=24",
    "train.pairs_per_step=4",
    "train.checkpoint_every=2",
    "evaluate.prompts=40",
    "gate.kind=always",
]


def start(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "prefloop", "run", "iterative_dpo", *SETTINGS, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(out: Path) -> None:
    process = start(out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def test_killed_and_rerun_equals_uninterrupted(tmp_path):
    began = time.monotonic()
    finish(tmp_path / "whole")
    whole = time.monotonic() - began
    expected = outcome(tmp_path / "whole")
    assert len([name for name in expected if name.endswith("5-policy/model.safetensors")]) == 3

    rng = random.Random(20261121)
    kills, attempt = 0, 0
    while kills < KILLS:
        out = tmp_path / f"killed-{attempt}"
        process = start(out)
        try:
            process.communicate(timeout=rng.uniform(0.25, 0.75) * whole)
            attempt += 1  # it finished first: compare, and go on with a fresh run
            assert outcome(out) == expected
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
    finish(out)
    assert outcome(out) == expected


def test_sigterm_stops_at_a_safe_point_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path / "run")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "round-000" / "1-samples" / "manifest.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors.decode()
    assert "Nothing is lost. To go on: prefloop run iterative_dpo" in errors.decode()
    finish(tmp_path / "run")
