"""Two ranks of which one stops in the middle, as a process does that hangs: the other must give it up.

python hang_case.py tensors|store    with the environment that a launcher sets, and PREFLOOP_STALLED
"""

import os
import signal
import sys

import torch

from prefloop.errors import RankLost
from prefloop.ranks import joined


def main() -> int:
    try:
        with joined() as team:
            team.gathered()
            if not team.main:
                os.kill(os.getpid(), signal.SIGSTOP)
            if sys.argv[1] == "tensors":
                team.sum(torch.ones(2))
            else:
                team.gathered("here")
    except RankLost as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    # The store is rank 0's: it must not wait at the end for the one that hangs.
    code = main()
    sys.stderr.flush()
    os._exit(code)
