"""A rank that dies, or differs, ends the run on all ranks with the cause; another number of ranks goes on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prefloop.artifact import read_json
from prefloop.ranks import without_nproc

SETTINGS = [
    *("iterative_dpo", "name=x", "rounds=1", "prompts_per_round=24", "prompts_per_part=8", "threads=1"),
    *("sampler.max_new_tokens=8", "evaluate.prompts=8"),
    *("train.pairs_per_step=4", "train.epochs=40", "train.checkpoint_every=5"),
]


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "prefloop", "run", *SETTINGS, "--out", str(out), *more]


def environment() -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return {int(p.environ()["RANK"]): p for p in found if "RANK" in p.environ()}


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_one_process_goes_on(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(out, "--nproc", "2"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    state = out / "round-000" / "5-policy" / ".state"
    end = time.monotonic() + 300
    while not list(state.glob("step-*/state.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    ranks_of(process)[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    said, _ = process.communicate(timeout=120)
    assert time.monotonic() - killed < 90
    assert process.returncode == 75, said
    assert "error: rank 1 was killed by SIGKILL" in said
    assert not (out / "round-000" / "5-policy" / "manifest.json").exists()

    step = max(int(path.parent.name.removeprefix("step-")) for path in state.glob("step-*/state.json"))
    assert step >= 5
    again = subprocess.run(command(out), env=environment(), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    summary = read_json(out / "summary.json")
    assert summary["state"] == "done"


def test_what_torchrun_starts_has_no_nproc():
    assert without_nproc(["run", "x", "--nproc", "2", "a=b"]) == ["run", "x", "a=b"]
    assert without_nproc(["run", "--nproc=2", "x"]) == ["run", "x"]


def run_as(rank: int, port: int, command: list[str]) -> subprocess.Popen[str]:
    """Start one of two ranks, as a launcher would."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        command, env=environment() | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_ranks_with_other_settings_and_steps_that_cannot_be_split_are_refused_on_all(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    other = command(tmp_path / "run", "train.learning_rate=1e-9")
    running = [run_as(0, port, command(tmp_path / "run")), run_as(1, port, other)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [2, 2], said
    assert all("ranks differ in recipe" in text for text in said), said
    assert not (tmp_path / "run" / "prompts").exists()
