"""The machine and the versions behind the figures. No host name, no path."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("prefloop", "torch", "transformers", "trl", "peft", "datasets")


def machine(device: str) -> str:
    """Return processor, cores and memory in words; on CUDA the GPU's name first."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cpu = f"{_cpu_name()}, {os.cpu_count()} cores, {memory:.0f} GB memory, {platform.system()}"
    return f"{_gpu_name()}; {cpu}" if device == "cuda" else cpu


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_name() -> str:
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown GPU"


def versions() -> str:
    """Return the versions of everything that takes part."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def load() -> float:
    """Return the load average of the last minute: above the number of busy threads, others were working too."""
    return os.getloadavg()[0]


def command(arguments: Sequence[str]) -> str:
    """Return the command line as a reader can repeat it: absolute paths become relative ones."""
    shown = [os.path.relpath(a) if os.path.isabs(a) else a for a in arguments]
    return shlex.join([Path(sys.executable).name.rstrip("0123456789."), "-m", "benchmarks", *shown])
