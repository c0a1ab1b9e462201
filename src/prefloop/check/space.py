"""Estimates before any work: memory of the longest microbatch, and disk of all rounds."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from prefloop.check.finding import Finding
from prefloop.models import causal_lm
from prefloop.recipe import Recipe

GIB = 2**30
ROW_BYTES = 30
"""Disk of one sampled token over all stages of a round: ids, log-probs and text in samples, judged, pairs and
batches. Measured on the demo: 29."""
FULL = 0.9
"""Share of memory or disk above which an estimate is a warning."""


@dataclass(frozen=True)
class Shape:
    """Size of a model: parameters, and what activations depend on."""

    parameters: int
    hidden: int
    layers: int
    feed_forward: int
    vocabulary: int
    positions: int | None


def shape_of(folder: Path) -> Shape:
    """Read a model's size from its config and the headers of its weights, without loading them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config

    def number(*names: str) -> int:
        return next((int(config[n]) for n in names if config.get(n) is not None), 0)

    parameters = 0
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= int(length)
                parameters += size
    hidden = number("hidden_size", "n_embd", "d_model")
    return Shape(
        parameters=parameters,
        hidden=hidden,
        layers=number("num_hidden_layers", "n_layer"),
        feed_forward=number("intermediate_size", "n_inner") or 4 * hidden,
        vocabulary=number("vocab_size"),
        positions=number("max_position_embeddings", "n_positions") or None,
    )


def memory_bytes(recipe: Recipe, shape: Shape, longest_pair: int) -> int:
    """Estimate the most bytes that training takes at once.

    Weights, gradients and AdamW's two moments in float32 (16 bytes a trained parameter; 4 for a frozen one), and
    activations of the largest microbatch: 4 bytes × layers × (10 hidden + 3 feed-forward) a token, our own count of
    what a Llama layer keeps for the backward pass; attention scores and logits are computed in pieces and not kept.
    """
    lora = recipe.train.lora
    trained = shape.parameters if lora is None else 14 * shape.layers * shape.hidden * lora.rank
    tokens = max(recipe.train.tokens_per_microbatch, longest_pair)
    a_token = 4 * shape.layers * (10 * shape.hidden + 3 * shape.feed_forward)
    if recipe.train.gradient_checkpointing:
        a_token = 4 * (shape.layers + 13) * shape.hidden
    return 4 * shape.parameters + 12 * trained + tokens * a_token


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; of a CPU those of the machine or, where it is less, of the container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text(encoding="ascii").strip()).isdigit():
        free = min(free, int(most) - int(used.read_text(encoding="ascii")))
    return free


def disk_bytes(recipe: Recipe, shape: Shape, prompts: int, new_tokens: int, held_out: int) -> int:
    """Estimate the bytes that all rounds leave on disk, and the training state that comes and goes (12 a weight)."""
    settings = recipe.sampler.settings()
    drawn = prompts * int(settings.get("completions", 4)) + held_out * recipe.evaluate.completions
    policy = 4 * shape.parameters
    kept = recipe.rounds * (policy + drawn * new_tokens * ROW_BYTES)
    return kept + 3 * policy + held_out * new_tokens * ROW_BYTES


def space_findings(recipe: Recipe, folder: Path, out: Path, longest: int, counts: tuple[int, int]) -> Iterator[Finding]:
    """Yield the estimates; `longest` are the tokens of the longest prompt, `counts` training and held-out prompts."""
    shape = shape_of(folder)
    new = int(recipe.sampler.settings().get("max_new_tokens", 256))
    if shape.positions is not None and longest + new > shape.positions:
        yield Finding(
            "positions",
            "warning",
            f"the longest prompt ({longest} tokens) and sampler.max_new_tokens={new} exceed the model's "
            f"{shape.positions} positions: completions are cut earlier",
            longest + new,
            advice="lower sampler.max_new_tokens, or shorten prompts",
        )
    device = causal_lm.choose_device(recipe.train.device)
    need, free = memory_bytes(recipe, shape, longest + 2 * new), free_memory(device)
    yield _against(
        "memory",
        need,
        free,
        f"about {need / GIB:.2f} GiB to train {shape.parameters / 1e6:.1f} M parameters on microbatches of "
        f"{recipe.train.tokens_per_microbatch} tokens; {free / GIB:.1f} GiB are free on {device}",
        "lower train.tokens_per_microbatch, or set train.gradient_checkpointing=true or train.lora.rank",
    )
    prompts = min(counts[0], recipe.prompts_per_round or counts[0])
    need, free = disk_bytes(recipe, shape, prompts, new, min(counts[1], recipe.evaluate.prompts)), _free_disk(out)
    yield _against(
        "disk",
        need,
        free,
        f"about {need / GIB:.2f} GiB for {recipe.rounds} rounds; {free / GIB:.1f} GiB are free at {out}",
        "free some, or give --out another disk",
    )


def _against(name: str, need: int, free: int, text: str, advice: str) -> Finding:
    tight = need > FULL * free
    return Finding(name, "warning" if tight else "info", text, need, advice=advice if tight else "")


def _free_disk(out: Path) -> int:
    there: Any = out.resolve()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
