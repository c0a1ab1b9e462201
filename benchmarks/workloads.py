"""The workloads: who does what, and the goals from the issue."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from benchmarks.records import Bar, Case, Contender
from benchmarks.specs import ONE_BILLION, TINY, HeadSpec, LoopSpec, MethodSpec, ModelSpec, ScalingSpec, TrainSpec

PREFLOOP = Contender("prefloop", "prefloop_side:train_pairs")
TRL = Contender("TRL", "rivals:train_pairs", needs="trl")
COMPILED = Contender("prefloop, train.compile", PREFLOOP.target, {"compiled": True})
TRL_DEFAULT = Contender("TRL at its default precision, bf16", TRL.target, {"precision": "bf16"}, needs="trl")
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
            sides: tuple[Contender, ...] = (PREFLOOP, TRL)
            if precision == "fp32":
                bars += (_share(60),)
                sides += (TRL_DEFAULT,)
                # Smaller microbatches save TRL memory, not time: in one case, as each takes minutes.
                sides += (TRL_SMALL, COMPILED) if prompt == 256 else ()
            cases.append(Case("W2", f"{prompt}/{completion}, {precision}", spec, sides, bars, NOTES[precision]))
    return cases


NOTES = {
    "fp32": "Both sides in float32, which is prefloop's default on a CPU; TRL needs `bf16=False` for it.",
    "bf16": "Both sides with bf16 autocast over float32 weights: TRL's default; `train.precision=bf16` in prefloop.",
}


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


def _methods(device: str, quick: bool) -> list[Case]:
    spec = MethodSpec(1, 4) if quick else MethodSpec()
    full = ("iterative_rpo", "simpo", "asft", "ln_dpo", "sppo", "dnpo", "tso", "srpo", "tr_dpo")
    cases = []
    for name, methods, lora in (("all weights", full, 0), ("LoRA rank 16", ("ofs_dpo", "mrdpo"), 16)):
        baseline = Contender("DPO", "methods_side:train_method", {"method": "iterative_dpo", "lora": lora})
        sides = [Contender(m, baseline.target, {"method": m, "lora": lora}) for m in methods]
        note = (
            "Gradient steps on the same pairs, reference log-probs stored; SPIN, sDPO and Curry-DPO train as DPO does."
        )
        cases.append(Case("W7", name, spec, (baseline, *(sides[:2] if quick else sides)), (), note))
    return cases


def scaling(quick: bool) -> list[Case]:
    """Return the same training on ever larger data sets."""
    sizes = (100, 1_000) if quick else (1_000, 10_000, 100_000, 200_000)
    side = Contender("prefloop", "scaling:train_large")
    return [Case("scaling", f"{size:,} pairs", ScalingSpec(size, 3 if quick else 30), (side,)) for size in sizes]


def case_names(workload: str, device: str) -> set[str]:
    """Return the names of a workload's cases, those of a quick run too."""
    if workload == "scaling":
        return {case.name for quick in (False, True) for case in scaling(quick)}
    return {case.name for quick in (False, True) for case in WORKLOADS[workload][1](device, quick)}


WORKLOADS: Mapping[str, tuple[str, Callable[[str, bool], list[Case]]]] = {
    "W1": ("The whole loop on stories260K", _loop),
    "W2": ("Training steps of a 15 M-parameter Llama", _training),
    "W3": ("Four completions for each prompt, all pairs", _multi),
    "W4": ("The log-prob head on a large vocabulary", _head),
    "W5": ("Sampling on stories260K", _sampling),
    "W6": ("LoRA on all linear layers", _lora),
    "W7": ("Each method's training beside plain DPO's", _methods),
}
"""Title and cases by name."""


SCALING = "The same training on data sets of 1k to 200k pairs"
LOOPS = ("W1", "W5")
"""Workloads on the story model."""


def find_case(workload: str, name: str, device: str, quick: bool) -> Case:
    """Return one case by its names."""
    cases = scaling(quick) if workload == "scaling" else WORKLOADS[workload][1](device, quick)
    return next(case for case in cases if case.name == name)
