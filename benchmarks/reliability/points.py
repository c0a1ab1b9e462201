"""Write points: every place where a run changes the disk, by name, and a fault at one of them.

No hook in the product: Python's audit events tell of every file that is opened for writing, renamed or removed; `fsync`
and the native writers of Parquet and safetensors are wrapped. A point's name is what is done to which file of the run.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import safetensors.torch
from safetensors import SafetensorError

NATIVE = ("parquet", "safetensors")
"""Writers that do not tell Python when they open a file."""
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.link", "os.symlink", "os.truncate")


@dataclass(frozen=True)
class Fault:
    """What happens at the first write point under `root` that is not among `spared`; `hit` learns its name.

    `action`: kill (SIGKILL before it), torn (SIGKILL in the middle of a native write, else before), term (SIGTERM),
    enospc (the disk is full, in the middle of a native write), memory (MemoryError), none (only names are noted).
    """

    action: str
    root: Path
    spared: frozenset[str]
    hit: Path


class Trap:
    """Waits for the first write point that is not spared; springs once."""

    def __init__(self, fault: Fault) -> None:
        """Set the trap in this process, for good."""
        self._fault, self._root = fault, str(fault.root) + os.sep
        self._sprung = False
        self._noting = os.open(fault.hit, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.addaudithook(self._audit)
        os.fsync = self._around(os.fsync, "fsync")
        pyarrow.parquet.write_table = self._native(pyarrow.parquet.write_table, "parquet", 1)
        safetensors.torch.serialize_file = self._native(safetensors.torch.serialize_file, "safetensors", 1)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _mode, flags = arguments
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            self.reach("open", path)
        elif event in CHANGES and not (event == "os.mkdir" and os.path.isdir(arguments[0])):
            self.reach(event.rpartition(".")[2], arguments[0])

    def reach(self, what: str, path: Any, half: Callable[[], None] | None = None) -> None:
        """Note a write point, and spring if it is the one; `half` writes half of the file first."""
        place = os.path.abspath(os.fsdecode(path))
        if self._sprung or not place.startswith(self._root):
            return
        name = f"{what} {place.removeprefix(self._root)}"
        if name in self._fault.spared:
            return
        os.write(self._noting, f"{name}\n".encode())
        action = self._fault.action
        if action == "none":
            return
        self._sprung = True
        if half is not None and action in ("torn", "enospc"):
            half()
        if action in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif action == "memory":
            raise MemoryError
        elif what == "safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        else:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)

    def _around(self, write: Callable[..., Any], what: str) -> Callable[..., Any]:
        def wrapped(descriptor: int) -> Any:
            self.reach(what, os.readlink(f"/proc/self/fd/{descriptor}"))
            return write(descriptor)

        return wrapped

    def _native(self, write: Callable[..., Any], what: str, place: int) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            path = arguments[place]

            def half() -> None:
                write(*arguments, **options)
                os.truncate(path, os.path.getsize(path) // 2)

            self.reach(what, path, half)
            return write(*arguments, **options)

        return wrapped
