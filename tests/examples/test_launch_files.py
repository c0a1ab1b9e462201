"""The files of `examples/launch/` as they stand, on CPUs of one machine: two machines are two launchers here.

The first starts a run and makes it; the others come to the same folder and find it done, which needs all of their ranks
to meet and agree. A scheduler is a few lines of shell that do what its command would.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefloop.artifact import read_json
from rank_launch import TESTS, free_port

LAUNCH = TESTS.parent / "examples" / "launch"
RECIPE = {
    "recipe": "iterative_dpo",
    "name": "x",
    "rounds": 1,
    "prompts_per_round": 24,
    "prompts_per_part": 8,
    "threads": 1,
    "sampler": {"max_new_tokens": 8},
    "evaluate": {"prompts": 8},
    "train": {"pairs_per_step": 4, "sharding": "full"},
}


def settings(folder: Path, **own: str) -> dict[str, str]:
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    source = os.pathsep.join([str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    common = {"PATH": path, "PYTHONPATH": source, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | common | {"OUT": str(folder / "run")} | own


def run_all(commands: list[list[str]], environment: dict[str, str]) -> list[str]:
    """Run commands side by side; each must end well. Return what they said."""
    running = [
        subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c in commands
    ]
    said = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(commands), "\n".join(said)
    return said


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.slow
def test_the_launch_files_start_ranks_that_work_together(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    out = tmp_path / "run"

    two = settings(tmp_path, HEAD=f"127.0.0.1:{free_port()}", RANKS="1", ID="x")
    run_all([["bash", str(LAUNCH / "two_machines.sh"), str(recipe), "seed=3"]] * 2, two)
    summary = read_json(out / "summary.json")
    assert summary["state"] == "done"
    written = (out / "round-000" / "5-policy" / "manifest.json").stat().st_mtime_ns

    # Slurm's: a node list of two, and srun starts the command once on each node.
    executable(
        tmp_path / "scontrol", '[[ "$1 $2 $3" == "show hostnames nodes-[1-2]" ]] && printf "127.0.0.1\\nother\\n"'
    )
    executable(
        tmp_path / "srun", '[[ "$1" == --kill-on-bad-exit=1 ]] && shift; "$@" & "$@"; code=$?; wait $! && exit $code'
    )
    nodes = {"SLURM_JOB_NODELIST": "nodes-[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    slurm = settings(tmp_path, SLURM_JOB_ID=str(os.getpid()), **nodes)
    said = run_all([["bash", str(LAUNCH / "slurm.sbatch"), str(recipe), str(out), "seed=3"]], slurm)
    assert "report" in said[0]

    run_all([["bash", str(LAUNCH / "eight_gpus.sh"), str(recipe), "seed=3"]], settings(tmp_path, RANKS="2"))
    run_all([["bash", str(LAUNCH / "one_gpu.sh"), str(recipe), "seed=3"]], settings(tmp_path))
    assert (out / "round-000" / "5-policy" / "manifest.json").stat().st_mtime_ns == written  # found, not made again


def test_the_manifest_of_kubernetes_starts_what_torchrun_understands():
    run = pytest.importorskip("torch.distributed.run")
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["torchrun"]
    found = run.get_args_parser().parse_args(container["args"])
    assert int(found.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(found.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert (found.module, found.training_script) == (True, "prefloop")
    # The first pod of an indexed Job is called NAME-0, and found under the service that selects the job's pods.
    host, _, port = found.rdzv_endpoint.partition(":")
    assert (host, port) == (f"{job['metadata']['name']}-0.{pod['subdomain']}", "29500")
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["terminationGracePeriodSeconds"] > found.shutdown_timeout
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
