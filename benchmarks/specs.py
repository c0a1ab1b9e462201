"""Models, lengths and data of the workloads. Everything follows from a seed, so that all sides get the same."""

import random
from dataclasses import dataclass
from itertools import combinations

Tokens = tuple[int, ...]
TokenPair = tuple[Tokens, Tokens, Tokens]
"""Token ids of context, chosen and rejected."""
FIRST_TOKEN = 3
"""Ids below are padding, beginning and end."""


@dataclass(frozen=True)
class ModelSpec:
    """A Llama-type model from config with tied embeddings and random weights (seed 0)."""

    hidden: int = 288
    intermediate: int = 768
    layers: int = 6
    heads: int = 6
    kv_heads: int = 6
    vocabulary: int = 32_000
    positions: int = 2048

    @property
    def body(self) -> int:
        """Weights of the layers' matrices, without embeddings and norms."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate)


@dataclass(frozen=True)
class TrainSpec:
    """Full training steps of DPO with stored reference log-probs."""

    model: ModelSpec
    prompt: int
    completion: int
    pairs: int = 8
    """Prompts of a step. Every step trains on the same ones, so that all timed work is the same."""
    steps: int = 1
    """Timed steps, after a first one that warms up."""
    lora_rank: int = 0
    completions: int = 2
    """Completions of each prompt; every pair of them is trained on."""
    precision: str = "fp32"
    """Of matrix products: fp32, or bf16 by autocast over float32 weights, which is TRL's default."""


@dataclass(frozen=True)
class HeadSpec:
    """Forward and backward pass of the log-prob head alone."""

    vocabulary: int = 128_256
    tokens: int = 2048
    hidden: int = 288


@dataclass(frozen=True)
class LoopSpec:
    """The whole loop on the story model, or its sampling alone."""

    rounds: int = 3
    prompts: int = 256
    completions: int = 4
    new_tokens: int = 64
    pairs_per_step: int = 16
    learning_rate: float = 3e-4
    evaluated: int = 20
    """Held-out prompts that prefloop's gate measures after each round. The rival loop has no evaluation."""


@dataclass(frozen=True)
class ScalingSpec:
    """A data set of `pairs` pairs on disk, of which the first `steps` steps are trained."""

    pairs: int
    steps: int = 30
    pairs_per_step: int = 32
    model: ModelSpec = ModelSpec(32, 48, 2, 4, 4, 512, 256)


@dataclass(frozen=True)
class MethodSpec:
    """Training of a method on the story model and the pairs that prefloop ships."""

    steps: int = 16
    """Timed steps, after a first one that warms up."""
    pairs_per_step: int = 16


TINY = ModelSpec(32, 48, 2, 4, 4, 512, 256)
ONE_BILLION = ModelSpec(2048, 8192, 16, 32, 8, 128_256, 4096)


def jittered(spec: TrainSpec, seed: int = 0) -> list[tuple[Tokens, tuple[Tokens, ...]]]:
    """Return contexts with their completions: random ids, each length drawn within 10 % of the nominal one."""
    draw = random.Random(seed)

    def ids(nominal: int) -> Tokens:
        length = max(1, round(nominal * draw.uniform(0.9, 1.1)))
        return tuple(draw.randrange(FIRST_TOKEN, spec.model.vocabulary) for _ in range(length))

    return [(ids(spec.prompt), tuple(ids(spec.completion) for _ in range(spec.completions))) for _ in range(spec.pairs)]


def token_pairs(spec: TrainSpec, apart: bool = False, seed: int = 0) -> list[TokenPair]:
    """Return the pairs of a step: every pair of every prompt's completions, the one of lower index chosen.

    With `apart`, each pair has the lengths of the same pair, and random ids of its own.
    """
    pairs = [
        (context, chosen, rejected)
        for context, completions in jittered(spec, seed)
        for chosen, rejected in combinations(completions, 2)
    ]
    if not apart:
        return pairs
    draw = random.Random(1)

    def fresh(ids: Tokens) -> Tokens:
        return tuple(draw.randrange(FIRST_TOKEN, spec.model.vocabulary) for _ in ids)

    return [(fresh(context), fresh(chosen), fresh(rejected)) for context, chosen, rejected in pairs]


def useful_tokens(spec: TrainSpec) -> int:
    """Return context + completion tokens of the timed steps, each counted once: no padding, no repeated prompt."""
    return spec.steps * sum(len(context) + sum(map(len, completions)) for context, completions in jittered(spec))


def useful_flops(spec: TrainSpec) -> float:
    """Return operations of the timed steps on useful tokens; the formula is in docs/benchmarks.md."""
    model = spec.model
    per_weight = 4 if spec.lora_rank else 6  # frozen weights take no gradient
    total = 0.0
    for context, completions in jittered(spec):
        lengths = [len(c) for c in completions]
        attended = triangle(len(context)) + sum(len(context) * n + triangle(n) for n in lengths)
        total += per_weight * model.body * (len(context) + sum(lengths))
        total += per_weight * model.hidden * model.vocabulary * sum(lengths)
        total += 12 * model.layers * model.hidden * attended
    return spec.steps * total


def triangle(length: int) -> int:
    """Return the number of (query, key) pairs of causal attention over `length` tokens."""
    return length * (length + 1) // 2
