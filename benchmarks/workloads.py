"""The workloads: models, lengths, data and goals. Everything follows from a seed, so that all sides get the same."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from benchmarks.records import Bar, Case, Contender

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


TINY = ModelSpec(32, 48, 2, 4, 4, 512, 256)
ONE_BILLION = ModelSpec(2048, 8192, 16, 32, 8, 128_256, 4096)


def jittered(spec: TrainSpec, seed: int = 0) -> list[tuple[Tokens, tuple[Tokens, ...]]]:
    """Return contexts with their completions: random ids, each length drawn within 10 % of the nominal one."""
    draw = random.Random(seed)

    def ids(nominal: int) -> Tokens:
        length = max(1, round(nominal * draw.uniform(0.9, 1.1)))
        return tuple(draw.randrange(FIRST_TOKEN, spec.model.vocabulary) for _ in range(length))

    return [(ids(spec.prompt), tuple(ids(spec.completion) for _ in range(spec.completions))) for _ in range(spec.pairs)]


def token_pairs(spec: TrainSpec, apart: bool = False) -> list[TokenPair]:
    """Return the pairs of a step: every pair of every prompt's completions, the one of lower index chosen.

    With `apart`, each pair has the lengths of the same pair, and random ids of its own.
    """
    pairs = [
        (context, chosen, rejected)
        for context, completions in jittered(spec)
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


PREFLOOP = Contender("prefloop", "prefloop_side:train_pairs")
TRL = Contender("TRL", "rivals:train_pairs", needs="trl")
TRL_SMALL = Contender("TRL, 2 pairs × 4 accumulated", "rivals:train_pairs", {"accumulated": 4}, needs="trl")


def _training(device: str, quick: bool) -> list[Case]:
    if quick:
        return [Case("W2", "24/12", TrainSpec(TINY, 24, 12, pairs=4), (PREFLOOP, TRL))]
    if device == "cuda":
        spec = TrainSpec(ONE_BILLION, 1024, 512, pairs=4, steps=4, precision="bf16")
        bars = (*_goals("≥ 2× TRL's pairs/s", 2, "≤ 1/2 of TRL's peak memory", 2), _share(45))
        return [Case("W2", "1 B, 1024/512, bf16", spec, (PREFLOOP, TRL), bars)]
    cases = []
    for precision in ("fp32", "bf16"):
        for prompt, completion, goal in ((256, 128, 8), (512, 64, 10), (64, 256, 4)):
            spec = TrainSpec(ModelSpec(), prompt, completion, precision=precision)
            bars = _goals(f"≥ {goal}× TRL's pairs/s", goal, "≤ 1/3 of TRL's peak memory", 3)
            # Smaller microbatches save TRL memory, not time: shown in one case, as each takes minutes.
            sides = (PREFLOOP, TRL, TRL_SMALL) if (prompt, precision) == (256, "fp32") else (PREFLOOP, TRL)
            bars += (_share(60),) if precision == "fp32" else ()
            cases.append(Case("W2", f"{prompt}/{completion}, {precision}", spec, sides, bars))
    return cases


def _goals(speed: str, times: float, memory: str, share: float) -> tuple[Bar, ...]:
    return Bar(speed, "speed", times, rival="TRL"), Bar(memory, "memory", share, rival="TRL")


def _share(percent: float) -> Bar:
    return Bar(f"≥ {percent} % of the measured matrix peak", "fraction", percent / 100)


def _loop(device: str, quick: bool) -> list[Case]:
    spec = LoopSpec(rounds=1, prompts=16, new_tokens=12, pairs_per_step=8) if quick else LoopSpec()
    sides = (
        Contender("prefloop", "prefloop_side:run_loop"),
        Contender("transformers + TRL", "rivals:run_loop", needs="trl"),
    )
    bars = () if quick else (Bar("≥ 3× faster than the TRL loop", "speed", 3, rival="transformers + TRL"),)
    name = f"{spec.rounds} rounds of {spec.prompts} × {spec.completions} × {spec.new_tokens}"
    return [Case("W1", name, spec, sides, bars)]


def _multi(device: str, quick: bool) -> list[Case]:
    spec = TrainSpec(TINY, 24, 12, 2, completions=4) if quick else TrainSpec(ModelSpec(), 256, 128, 2, completions=4)
    sides = (
        PREFLOOP,
        *(
            Contender(f"prefloop, pairs apart, {layout}", PREFLOOP.target, {"layout": layout, "apart": True})
            for layout in ("shared", "packed", "padded")
        ),
    )
    bar = Bar("≥ 1.8× the same pairs without sharing", "speed", 1.8, rival="prefloop, pairs apart, packed")
    note = (
        "All 6 pairs of each prompt's 4 completions, 2 prompts a step. Apart: the same lengths with token ids of their "
        "own for each pair, so that nothing is shared but, in the layout `shared`, the prompt of a pair's two sides."
    )
    return [Case("W3", f"{spec.prompt}/{spec.completion}, K = 4", spec, sides, () if quick else (bar,), note)]


def _head(device: str, quick: bool) -> list[Case]:
    spec = HeadSpec(4096, 256, 32) if quick else HeadSpec(hidden=2048 if device == "cuda" else 288)
    sides = (
        Contender("prefloop", "prefloop_side:score_head"),
        Contender("materialised logits", "plain:materialise_head"),
        Contender("TRL's chunked head", "rivals:chunk_head", needs="trl"),
    )
    bar = Bar("≤ 1/4 of materialised logits' peak memory", "memory", 4, rival="materialised logits")
    name = f"vocabulary {spec.vocabulary:,}, {spec.tokens:,} tokens, hidden {spec.hidden}"
    return [Case("W4", name, spec, sides[: 2 if quick else 3], () if quick else (bar,))]


def _sampling(device: str, quick: bool) -> list[Case]:
    spec = LoopSpec(prompts=8, new_tokens=8) if quick else LoopSpec()
    sides = (
        Contender("prefloop", "prefloop_side:sample"),
        Contender("transformers.generate", "plain:sample"),
    )
    bar = Bar("≥ 2.5× generate(num_return_sequences=4)", "speed", 2.5, rival="transformers.generate")
    name = f"{spec.prompts * spec.completions:,} completions of {spec.new_tokens} tokens"
    return [Case("W5", name, spec, sides, () if quick else (bar,))]


def _lora(device: str, quick: bool) -> list[Case]:
    case = _training(device, quick)[0]
    spec = replace(case.settings, lora_rank=16)
    return [Case("W6", f"LoRA rank 16, {case.name}", spec, (PREFLOOP, replace(TRL, label="TRL + peft")))]


def scaling(quick: bool) -> list[Case]:
    """Return the same training on ever larger data sets."""
    sizes = (100, 1_000) if quick else (1_000, 10_000, 100_000)
    side = Contender("prefloop", "scaling:train_large")
    return [Case("scaling", f"{size:,} pairs", ScalingSpec(size, 3 if quick else 30), (side,)) for size in sizes]


WORKLOADS: Mapping[str, tuple[str, Callable[[str, bool], list[Case]]]] = {
    "W1": ("The whole loop on stories260K", _loop),
    "W2": ("Training steps of a 15 M-parameter Llama", _training),
    "W3": ("Four completions for each prompt, all pairs", _multi),
    "W4": ("The log-prob head on a large vocabulary", _head),
    "W5": ("Sampling on stories260K", _sampling),
    "W6": ("LoRA on all linear layers", _lora),
}
"""Title and cases by name."""


SCALING = "The same training on 1k, 10k and 100k pairs"
LOOPS = ("W1", "W5")
"""Workloads on the story model."""


def find_case(workload: str, name: str, device: str, quick: bool) -> Case:
    """Return one case by its names."""
    cases = scaling(quick) if workload == "scaling" else WORKLOADS[workload][1](device, quick)
    return next(case for case in cases if case.name == name)
