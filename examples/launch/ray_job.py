"""The same run as a Ray job: one torchrun for each machine, placed by Ray.

    ray job submit --address http://HEAD:8265 --working-dir . -- python ray_job.py RECIPE.yaml OUT [key=value …]

RECIPE.yaml and OUT are paths that all machines share. Ray is needed on the cluster only; prefloop does not import it.
"""

import os
import socket
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

MACHINES = int(os.environ.get("MACHINES", "2"))
GPUS = int(os.environ.get("GPUS", "8"))


@ray.remote(max_retries=0)
def meeting_point() -> str:
    """Return address and a free port of the machine on which this runs."""
    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


@ray.remote(max_retries=0)
def torchrun(endpoint: str, arguments: list[str]) -> int:
    """Start this machine's ranks and return their exit code."""
    command = ["torchrun", "--nnodes", str(MACHINES), "--nproc-per-node", str(GPUS), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", endpoint, "--rdzv-id", "prefloop", "--shutdown-timeout", "120"]
    return subprocess.run([*command, "-m", "prefloop", "run", *arguments], check=False).returncode


def main() -> int:
    """Place one torchrun on each machine and wait for all of them."""
    recipe, out, *settings = sys.argv[1:]
    ray.init()
    group = placement_group([{"GPU": GPUS, "CPU": 1}] * MACHINES, strategy="STRICT_SPREAD")
    ray.get(group.ready())

    def on(index: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)

    endpoint = ray.get(meeting_point.options(scheduling_strategy=on(0)).remote())
    arguments = [recipe, *settings, "--out", out]
    codes = ray.get(
        [
            torchrun.options(num_gpus=GPUS, scheduling_strategy=on(index)).remote(endpoint, arguments)
            for index in range(MACHINES)
        ]
    )
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
