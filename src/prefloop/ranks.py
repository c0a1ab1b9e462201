"""Ranks come and go: joining a team that a launcher has started, leaving it with a cause, and starting one.

`prefloop run --nproc N` starts N processes of one command on this machine, with torchrun's launcher.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.rendezvous import rendezvous
from torch.distributed.run import get_args_parser
from torch.distributed.run import run as run_launcher

from prefloop.errors import ConfigError, Interrupted, PrefloopError, RankLost
from prefloop.team import ALIVE, FAILURE, MOST_SLEEP, Team, lost, seconds

STALLED = seconds("PREFLOOP_STALLED", 600.0)
"""Seconds for which a rank waits in a sum of tensors for one that does not come, and anywhere for one that gives no
sign of life, before it gives up."""
MEETING = timedelta(minutes=10)
"""How long a rank waits at the start for the others."""
GRACE = 5.0
"""Seconds in which the cause of a broken connection is looked for."""
PATIENCE = 60
"""Seconds from a request to stop, or from the death of one process, until the others are killed."""


def launched() -> bool:
    """Return whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def joined() -> Iterator[Team]:
    """Give the team that the launcher's environment variables describe, and leave it at the end.

    An error on one rank reaches the others, which raise `RankLost` with its cause.

    Raises:
        ConfigError: a variable is missing, or there are more ranks on this machine than GPUs.

    """
    if not launched():
        yield Team()
        return
    team = _join()
    ended = Event()
    Thread(target=_live, args=(team, ended), daemon=True).start()
    try:
        yield team
        team.gathered()  # nobody leaves while another may still ask the store
    except (Exception, KeyboardInterrupt) as error:
        known = report(team, error)
        if known is error:
            raise
        raise known from error
    finally:
        ended.set()
        dist.destroy_process_group()


def _live(team: Team, ended: Event) -> None:
    """Give signs of life until `ended`; a process that is stopped, or whose machine is gone, gives none."""
    assert team.store is not None
    for sign in count():
        try:
            team.store.set(f"{ALIVE}/{team.rank}", str(sign))
        except RuntimeError:  # the store went with the main rank's machine: whoever waits for it says so
            return
        if ended.wait(team.stalled / 10):
            return


def _join() -> Team:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start with torchrun, or "
            "with prefloop run --nproc N"
        )
    local_rank, local_size = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"{local_size} ranks on a machine with {torch.cuda.device_count()} GPUs; start one rank for each GPU, "
                "or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    patience = timedelta(seconds=STALLED)
    store, rank, size = next(iter(rendezvous("env://", timeout=MEETING)))
    store.set_timeout(patience)
    prefix: Any = vars(dist)["PrefixStore"]  # its stubs do not export it
    dist.init_process_group(backend, store=prefix("tensors", store), rank=rank, world_size=size, timeout=patience)
    return Team(rank, size, max(1, local_size), prefix("prefloop", store), dist.all_reduce, STALLED)


def report(team: Team, error: BaseException) -> BaseException:
    """Tell the others why this rank stops, unless one of them was first; return what to raise here."""
    assert team.store is not None
    if isinstance(error, RankLost):
        return error
    broken = isinstance(error, RuntimeError) and not isinstance(error, PrefloopError | torch.OutOfMemoryError)
    cause = _cause(team, GRACE if broken else 0.0)
    if cause is not None and cause["rank"] != team.rank:
        return lost(cause)
    if broken and _is_connection(error):
        text = str(error).strip().split("\n", maxsplit=1)[0]
        return RankLost(f"rank {team.rank}: another rank is gone ({text}); what is finished is on disk")
    text = str(error) if isinstance(error, PrefloopError) else f"{type(error).__name__}: {error}"
    code = error.exit_code if isinstance(error, PrefloopError) else 1
    told = {"rank": team.rank, "host": socket.gethostname(), "why": text, "exit_code": code}
    try:
        kept = team.store.compare_set(FAILURE, "", json.dumps(told))
    except RuntimeError:  # the store went with the main rank's machine
        return error
    first = json.loads(kept)
    return error if first["rank"] == team.rank else lost(first)


def _cause(team: Team, seconds: float) -> dict[str, Any] | None:
    assert team.store is not None
    end = time.monotonic() + seconds
    while True:
        try:
            if team.store.check([FAILURE]):
                found: dict[str, Any] = json.loads(team.store.get(FAILURE))
                return found
        except RuntimeError:
            return None
        if time.monotonic() >= end:
            return None
        time.sleep(MOST_SLEEP)


def _is_connection(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("connection", "gloo", "nccl", "timed out", "socket", "broken pipe"))


def start(count: int, arguments: Sequence[str]) -> int:
    """Run `prefloop ARGUMENTS` as `count` ranks and return the exit code: that of the first that failed, or 0.

    Raises:
        Interrupted: this process got SIGTERM, SIGINT or the like, has passed it on, and the ranks have ended.
        RankLost: a rank was killed, and could not say so itself.

    """
    own = ["--standalone", f"--nproc-per-node={count}", f"--shutdown-timeout={PATIENCE}", "-m", "prefloop"]
    try:
        run_launcher(get_args_parser().parse_args([*own, *without_nproc(arguments)]))
    except SignalException as error:
        raise Interrupted(
            f"the launcher got {error.sigval.name} and asked all ranks to stop; what is finished is on disk, and the "
            "same command goes on, with any number of ranks"
        ) from error
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode < 0:
            raise RankLost(
                f"rank {first.local_rank} was killed by {first.signal_name()}; the others were stopped, what is "
                "finished is on disk, and the same command goes on, with any number of ranks"
            ) from error
        return first.exitcode
    return 0


def without_nproc(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without `--nproc N` or `--nproc=N`."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--nproc":
            skip = True
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept
