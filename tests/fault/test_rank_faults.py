"""Several ranks through the command line: sharded, stopped and gone on with; and ranks that cannot work together."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

import prefloop
from prefloop.artifact import read_json
from rank_launch import TESTS, environment, free_port

SETTINGS = [
    *("iterative_dpo", "name=x", "rounds=1", "prompts_per_round=24", "prompts_per_part=8", "threads=1"),
    *("sampler.max_new_tokens=8", "evaluate.prompts=8", "train.sharding=full"),
    *("train.pairs_per_step=4", "train.epochs=6", "train.checkpoint_every=4"),
]
HERE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def command(out: Path | str, *more: str) -> list[str]:
    return [sys.executable, "-m", "prefloop", "run", *SETTINGS, "--out", str(out), *more]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """What plain transformers reads from the folder that a run's first round has left."""
    return AutoModelForCausalLM.from_pretrained(out / "round-000" / "5-policy").state_dict()


def wait_for(process: subprocess.Popen[str], seen, what: str) -> None:
    end = time.monotonic() + 300
    while not seen():
        assert process.poll() is None, f"ended before {what}: {process.communicate()[0]}"
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.slow
def test_full_sharding_is_stopped_by_the_launchers_signal_and_goes_on_with_more_ranks(tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "run"
    first = subprocess.Popen(
        command(out, "--nproc", "2"), env=os.environ | HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    state = out / "round-000" / "5-policy" / ".state"
    wait_for(first, lambda: list(state.glob("step-*/state.json")), "a training state")
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 75, said
    assert "stopped after step" in said

    # Every rank stopped after the same step, and wrote its rows of it.
    newest = max(state.glob("step-*"))
    files = set(read_json(newest / "state.json")["files"])
    assert {"weights.safetensors", "weights-00001.safetensors", "moments-00001.safetensors"} <= files
    assert f"stopped after step {int(newest.name.removeprefix('step-'))} of" in said

    for where, ranks in ((out, 4), (alone, 1)):
        done = subprocess.run(
            command(where, "--nproc", str(ranks)), env=os.environ | HERE, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = weights(out), weights(alone)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-5)
    assert {t.dtype for t in ours.values()} == {torch.float32}
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        folders = [each / "round-000" / "5-policy" / name for each in (out, alone)]
        assert folders[0].read_bytes() == folders[1].read_bytes()
    metrics = [read_json(each / "summary.json")["rounds"][0]["metrics"] for each in (out, alone)]
    assert metrics[0]["win_rate_vs_start"]["value"] == metrics[1]["win_rate_vs_start"]["value"]


def two_by_hand(
    commands: list[list[str]], folders: list[Path], more: list[dict[str, str]], limit: int | None = None
) -> list[tuple[int, str]]:
    """Start rank 0 and rank 1 as no launcher would; return how each ended and what it said."""
    port = free_port()

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    running = [
        subprocess.Popen(
            commands[rank],
            env=environment(rank, 2, port) | more[rank],
            cwd=folders[rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=limited if rank else None,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


@pytest.mark.slow
def test_ranks_with_other_code_or_another_folder_are_refused_on_all(tmp_path):
    source = Path(prefloop.__file__).parent
    shutil.copytree(source, tmp_path / "src" / "prefloop", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "src" / "prefloop" / "team.py").open("a", encoding="utf-8") as file:
        file.write("# one line more\n")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    other = {"PYTHONPATH": str(tmp_path / "src")}
    ends = two_by_hand([command(tmp_path / "run")] * 2, folders, [{}, other])
    assert [code for code, _ in ends] == [2, 2], ends
    assert all("ranks differ in prefloop: rank 0 on" in text for _, text in ends), ends
    assert not (tmp_path / "run" / "prompts").exists()

    # The same words, and each rank takes them to mean a folder of its own.
    ends = two_by_hand([command("run")] * 2, folders, [{"PREFLOOP_SEEN": "1"}] * 2)
    assert [code for code, _ in ends] == [2, 2], ends
    assert all("run: ranks 1 do not see what rank 0 writes there" in text for _, text in ends), ends
    assert not any((folder / "run" / "prompts").exists() for folder in folders)


@pytest.mark.slow
def test_a_full_disk_on_one_rank_ends_the_run_on_all_with_the_cause(tmp_path):
    # What a rank may write is less than its rows of the training state, which is the largest that it writes.
    ends = two_by_hand([command(tmp_path / "run")] * 2, [tmp_path] * 2, [{}, {}], limit=1 << 20)
    assert [code for code, _ in ends] == [74, 74], ends
    assert "rank 1 on" in ends[0][1], ends
    assert all("File too large" in text for _, text in ends), ends
    assert not (tmp_path / "run" / "round-000" / "5-policy" / "manifest.json").exists()


@pytest.mark.parametrize(("where", "words"), [("tensors", "another rank is gone"), ("store", "no sign of life")])
def test_a_rank_that_hangs_is_given_up(where, words):
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "hang_case.py"), where],
            env=environment(rank, 2, port) | {"PREFLOOP_STALLED": "3"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, said = running[0].communicate(timeout=60)
        assert running[0].returncode == 75, said
        assert words in said
        assert psutil.Process(running[1].pid).status() == psutil.STATUS_STOPPED
    finally:
        running[1].kill()
        running[1].communicate()
