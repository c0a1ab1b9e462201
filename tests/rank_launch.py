"""Start several ranks of a script of tests on this machine, without a launcher."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def environment(rank: int, ranks: int, port: int, local: int | None = None) -> dict[str, str]:
    """What a launcher sets for a rank, `local` of them as if on one machine; one thread, no GPU."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local or ranks}
    own |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    common = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | common | {name: str(value) for name, value in own.items()}


def start_ranks(script: str, ranks: int, *arguments: str, local: int | None = None) -> None:
    """Run a script of tests as so many ranks and wait for all of them; each must end well."""
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, str(TESTS / script), *arguments],
            env=environment(rank, ranks, port, local),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    ends = [(process.communicate(timeout=600)[1], process.returncode) for process in running]
    assert all(code == 0 for _, code in ends), "\n".join(errors for errors, _ in ends)


def found_by(folder: Path, ranks: int) -> list[Any]:
    """Return what each rank has written to its file `found-RANK-of-RANKS.json`."""
    return [json.loads((folder / f"found-{rank}-of-{ranks}.json").read_text()) for rank in range(ranks)]
