"""What a model of a size needs on a number of GPUs: memory of each and time, by formulas (see docs/scale.md)."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from prefloop.errors import ConfigError
from prefloop.train.settings import TrainSettings

MIB = 1 << 20
GIB = 1 << 30
HEAD_LOGITS = 1 << 26
"""Logits that the LM head holds at a time on a GPU (`models/head.py`)."""
FIXED = 2 * GIB
"""CUDA context, kernels' workspaces, NCCL's buffers and fragmentation, on each GPU; a round number."""
ACHIEVED = 0.35
"""Share of the peak arithmetic that training and scoring reach; a usual figure for FSDP, not measured here."""
BANDWIDTH = 0.6
"""Share of the peak memory bandwidth that sampling one token at a time reaches; a usual figure, not measured here."""


SAMPLING = "sampling in process"


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB, bf16 arithmetic in teraflop/s (dense), memory bandwidth in GB/s, as their maker publishes them."""

    memory: float
    teraflops: float
    bandwidth: float


GPUS = {
    "L4": Gpu(22.5, 121, 300),
    "A10G": Gpu(22.5, 70, 600),
    "L40S": Gpu(44.5, 362, 864),
    "A100-40": Gpu(39.5, 312, 1555),
    "A100": Gpu(79.2, 312, 2039),
    "H100": Gpu(79.2, 989, 3350),
    "H200": Gpu(140.0, 989, 4800),
    "B200": Gpu(178.0, 2250, 8000),
}


@dataclass(frozen=True)
class Shape:
    """A decoder: parameters, layers, width, width of the gated MLP, width of keys (or values), vocabulary."""

    parameters: float
    layers: int
    width: int
    mlp: int
    keys: int
    vocabulary: int

    @property
    def layer(self) -> float:
        """Parameters of one layer: attention's four matrices, and the MLP's three."""
        return 2 * self.width * (self.width + self.keys) + 3 * self.width * self.mlp

    @property
    def outside(self) -> float:
        """Parameters of embeddings and head."""
        return max(0.0, self.parameters - self.layers * self.layer)

    @property
    def saved(self) -> float:
        """Numbers that a layer keeps for each token until its backward pass.

        Two norms (3 widths each: input in float32, normalised, scaled), queries before and after rotation, attention's
        output twice, the residual stream twice; keys and values, rotated and repeated for every query head; four of
        the MLP's width.
        """
        return 14 * self.width + 3 * self.keys + 4 * self.mlp

    @property
    def adapter(self) -> float:
        """Parameters of a LoRA adapter of rank 1 on all linear layers."""
        return self.layers * (2 * (2 * self.width + self.width + self.keys) + 3 * (self.width + self.mlp))


SHAPES = {
    "0.5B": Shape(0.494e9, 24, 896, 4864, 128, 151936),
    "1B": Shape(1.236e9, 16, 2048, 8192, 512, 128256),
    "3B": Shape(3.213e9, 28, 3072, 8192, 1024, 128256),
    "8B": Shape(8.030e9, 32, 4096, 14336, 1024, 128256),
    "14B": Shape(14.77e9, 48, 5120, 13824, 1024, 152064),
    "32B": Shape(32.76e9, 64, 5120, 27648, 1024, 152064),
    "70B": Shape(70.55e9, 80, 8192, 28672, 1024, 128256),
}
"""Llama 3 (1B, 3B, 8B, 70B) and Qwen 2.5 (0.5B, 14B, 32B), by their published configurations."""


@dataclass(frozen=True)
class Load:
    """How much there is to do: pairs, tokens of a prompt and of a completion, completions of each prompt."""

    pairs: int = 100_000
    prompt_tokens: int = 200
    completion_tokens: int = 400
    completions: int = 4


@dataclass(frozen=True)
class Capacity:
    """Bytes on each GPU, by what they are for, and hours on all of them together."""

    gpu: str
    count: int
    model: str
    sharding: str
    training: dict[str, float]
    loading: float
    scoring: float
    sampling: float
    hours: dict[str, float]
    load: Load

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment of training."""
        return sum(self.training.values())

    def lines(self) -> Iterator[str]:
        """Yield the capacity as text."""
        room = GPUS[self.gpu].memory * GIB
        yield f"{self.model} on {self.count} × {self.gpu} ({room / GIB:.0f} GiB each), train.sharding={self.sharding}"
        for name, size in self.training.items():
            yield f"  {name:<34}{size / GIB:8.1f} GiB"
        for name, size in (
            ("training, at its fullest", self.peak),
            ("loading and saving the policy", self.loading),
            ("reference and start log-probs", self.scoring),
            (SAMPLING, self.sampling),
        ):
            verdict = "fits" if size <= room else "DOES NOT FIT"
            if name == SAMPLING and size > room:
                verdict += ": there each GPU holds the whole policy; use sampler.kind=server"
            yield f"  {name:<34}{size / GIB:8.1f} GiB  {verdict}"
        load = self.load
        yield (
            f"one round of {load.pairs:,} pairs, {load.prompt_tokens} + {load.completion_tokens} tokens, "
            f"{load.completions} completions of each prompt"
        )
        for name, hours in self.hours.items():
            yield f"  {name:<34}{hours:8.1f} h"
        yield "formulas and what they leave out: docs/scale.md; the hours assume usual efficiencies, not measured ones"


def read_gpus(text: str) -> tuple[int, str]:
    """Return number and kind of GPUs from text such as 8xH100.

    Raises:
        ConfigError: not of that form, or an unknown kind.

    """
    found = re.fullmatch(r"(?:(\d+)\s*[x×*])?\s*([A-Za-z0-9-]+)", text.strip())
    kind = found.group(2).upper() if found else ""
    count = int(found.group(1) or 1) if found else 0
    if kind not in GPUS or count < 1:
        raise ConfigError(f"--gpus: {text!r} must be like 8xH100; known are {', '.join(GPUS)}")
    return count, kind


def shape_of(name: str) -> Shape:
    """Return the shape of a model by its size.

    Raises:
        ConfigError: an unknown size.

    """
    if name.upper() not in SHAPES:
        raise ConfigError(f"--model: {name!r} is not one of {', '.join(SHAPES)}")
    return SHAPES[name.upper()]


def training_memory(
    shape: Shape, settings: TrainSettings, ranks: int, local: int, lower: bool = True
) -> tuple[str, dict[str, float]]:
    """Return how weights are shared among `ranks`, `local` on a machine, and the bytes on each at the fullest moment.

    `lower` says whether matrices are multiplied in bf16. Fullest is the begin of the backward pass: all activations,
    and gradients of the microbatches before.
    """
    kind = "full" if settings.sharding == "auto" else settings.sharding
    kind = "replicate" if ranks == 1 else kind
    share = shares(kind, ranks, local)
    whole, width = shape.parameters, 2 if lower else 4
    trained = shape.adapter * settings.lora.rank if settings.lora else whole / share
    found = {"weights, float32": 4 * whole / share + (4 * trained if settings.lora else 0)}
    found["gradients, float32"] = 4 * trained
    found["AdamW's two moments, float32"] = 8 * trained
    if kind == "replicate":
        found["weights in bf16 (autocast)"] = 2 * whole if lower else 0.0
    else:
        # The root stays gathered; a layer is gathered while the next one is fetched, and its gradients are summed.
        gathered = shape.outside + 2 * shape.layer
        found["gathered weights, gradients"] = width * gathered + (0 if settings.lora else (width + 4) * shape.layer)
    tokens = settings.tokens_per_microbatch
    if settings.gradient_checkpointing:
        kept = tokens * (shape.layers * shape.width + shape.saved)
    else:
        kept = tokens * shape.layers * shape.saved
    found["activations"] = width * kept
    logits = HEAD_LOGITS if lower else 1 << 20
    head = 0 if settings.lora else 4 * shape.vocabulary * shape.width
    found["LM head: logits, its gradient"] = 3 * 4 * logits + head + 2 * 4 * tokens * shape.width
    found["CUDA, NCCL, fragments"] = FIXED if lower else 0.0
    return kind, found


def shares(kind: str, ranks: int, local: int) -> int:
    """Return among how many ranks the weights are shared."""
    return {"replicate": 1, "full": ranks, "hybrid": local}[kind]


def capacity(
    gpus: str, model: str, settings: TrainSettings, load: Load, ranks_on_machine: int = 8, batch: int = 64
) -> Capacity:
    """Return what `model` needs on `gpus`.

    Sampling holds `batch` sequences at a time on each GPU.

    Raises:
        ConfigError: unknown GPUs or model.

    """
    count, kind = read_gpus(gpus)
    shape, gpu = shape_of(model), GPUS[kind]
    local = math.gcd(count, ranks_on_machine)
    sharding, training = training_memory(shape, settings, count, local)
    length = load.prompt_tokens + load.completion_tokens
    cache = 2 * 2 * shape.layers * shape.keys * length * batch
    read = shape.parameters * 2 + cache / 2
    per_pair = load.prompt_tokens + 2 * load.completion_tokens  # both sides share the prompt's computation
    work = 8 if settings.gradient_checkpointing else 6
    work -= 2 if settings.lora else 0  # no gradients of the frozen weights
    flops = count * gpu.teraflops * 1e12 * ACHIEVED * 3600
    steps = load.pairs * load.completions * load.completion_tokens / batch / count
    passes = load.pairs * per_pair * shape.parameters
    hours = {
        "sampling, in process": steps * read / (gpu.bandwidth * 1e9 * BANDWIDTH) / 3600,
        "reference log-probs": 2 * passes / flops,
        "training": settings.epochs * work * passes / flops,
    }
    share = shares(sharding, count, local)
    # Each rank reads its own rows; saving gathers one weight at a time, the largest of which are the embeddings.
    loading = 4 * shape.parameters / share + (4 * shape.vocabulary * shape.width if share > 1 else 0) + FIXED
    gathered = 2 * (shape.outside + 2 * shape.layer) if share > 1 else 0
    scoring = 2 * shape.parameters / share + gathered + 3 * 4 * HEAD_LOGITS + FIXED
    return Capacity(
        kind,
        count,
        model.upper(),
        sharding,
        training,
        loading,
        scoring,
        2 * shape.parameters + cache + FIXED,
        hours,
        load,
    )
