"""One vLLM engine in this process's care: started when it is needed, kept for the next part, dropped for another model.

vLLM is an optional package and imported when a sampler first draws. It runs the model in a process of its own, so that
its memory is free once that has ended.
"""

import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from prefloop.errors import ConfigError, SamplerError
from prefloop.models import causal_lm

ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_LOGGING_LEVEL": "WARNING"}
"""What is set for vLLM unless the user has: nothing is sent home, and no process with threads is forked."""
END_WITHIN = 30.0
"""Seconds in which an engine may end by itself."""


@dataclass(frozen=True)
class Wanted:
    """An engine: whose `digest` is that of its folder, and the arguments of `vllm.LLM`, as pairs."""

    digest: str
    arguments: tuple[tuple[str, Any], ...]


@dataclass
class _Kept:
    lock: threading.RLock = field(default_factory=threading.RLock)
    wanted: Wanted | None = None
    engine: Any = None


_kept = _Kept()


def require() -> None:
    """Refuse a sampler whose package is not installed.

    Raises:
        ConfigError: it is not.

    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "sampler.kind: vllm needs the package vllm, which is not installed: pip install 'prefloop[vllm]'; or set "
            "sampler.kind=hf, or server"
        )


def package() -> Any:
    """Return the package, imported now.

    Raises:
        ConfigError: it cannot be imported.

    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("vllm")
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"sampler.kind: the package vllm cannot be imported ({_first(error)}); install one for this machine"
        ) from error


@contextmanager
def engine(wanted: Wanted) -> Iterator[Any]:
    """Lend the engine `wanted`; nobody drops it meanwhile. One of another policy is ended first.

    Raises:
        ConfigError: vLLM cannot be imported.
        SamplerError: it cannot load the policy.

    """
    library = package()
    with _kept.lock:
        if _kept.wanted != wanted:
            drop()
            if torch.cuda.is_available():
                causal_lm.forget()  # vLLM takes its share of the GPU's memory at once, and must find it free
                torch.cuda.empty_cache()
            _kept.engine, _kept.wanted = _started(library, dict(wanted.arguments)), wanted
        yield _kept.engine


def drop() -> None:
    """End the engine, if there is one, once it has answered."""
    with _kept.lock:
        if _kept.engine is None:
            return
        running, _kept.engine, _kept.wanted = _kept.engine, None, None
        running.llm_engine.engine_core.shutdown(timeout=END_WITHIN)


def _started(library: Any, arguments: Mapping[str, Any]) -> Any:
    try:
        return library.LLM(**arguments)
    except (ValueError, RuntimeError, OSError, ImportError, TypeError, KeyError, AssertionError) as error:
        raise SamplerError(
            f"sampler.kind: vllm {getattr(library, '__version__', '')} cannot load {arguments['model']} "
            f"({_first(error)}; its own lines above may say more). Where memory is short, lower sampler.memory or set "
            "sampler.context; where it does not know the architecture, set sampler.kind=hf"
        ) from error


def failures() -> tuple[type[BaseException], ...]:
    """Return what a request to an engine can raise."""
    dead = getattr(importlib.import_module("vllm.v1.engine.exceptions"), "EngineDeadError", RuntimeError)
    return (dead, ValueError, RuntimeError, OSError)


def _first(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n", maxsplit=1)[0][:300]


causal_lm.kept_elsewhere(drop)
