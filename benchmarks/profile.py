"""Where prefloop's time goes in W1, W2 and W5: `python -m benchmarks.profile W2 256 128 fp32`, printed as Markdown.

Shares are of the time under torch's profiler, which itself costs about a microsecond for each operation: what is made
of many small operations looks a little larger than it is.
"""

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
from benchmarks.__main__ import STORIES, story_folder
from benchmarks.meter import build_model, matrix_peak
from benchmarks.prefloop_side import BETA, SEED, unscored
from benchmarks.records import Options
from benchmarks.specs import LoopSpec, ModelSpec, TrainSpec, token_pairs
from benchmarks.stories import loop_recipe, round_prompts, story_model
from prefloop.artifact import load_artifact
from prefloop.loop import run
from prefloop.losses.dpo import DPO
from prefloop.models.causal_lm import folder_digest, load
from prefloop.models.logps import choose_layout
from prefloop.protocols import Quiet, RoundContext
from prefloop.rows import PolicyRef, TokenizedPair
from prefloop.sample.hf import Hf
from prefloop.train.job import Job
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from prefloop.train.store import PairStore
from prefloop.train.update import train

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
ATTENTION = ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_scaled_dot_product_flash_attention_for_cpu")
Work = Callable[[], object]


def training(spec: TrainSpec) -> Work:
    """Return an optimizer step of W2."""
    model = build_model(spec.model, Options())
    layout = choose_layout(model)[0]
    pairs = [unscored(str(i), *ids) for i, ids in enumerate(token_pairs(spec))]
    pairs = score_reference(model, pairs, layout, 8192)
    settings = TrainSettings(pairs_per_step=len(pairs), precision=spec.precision)
    return lambda: _train(model, pairs, settings, layout)


def loop_training(spec: LoopSpec) -> Work:
    """Return the training of W1's first round, on the pairs that the loop makes."""
    folder = Path(tempfile.mkdtemp())
    options = Options(stories=story_folder(STORIES))
    recipe, _ = loop_recipe(replace(spec, rounds=1), options)
    run(recipe, folder)
    stored = load_artifact(folder / "round-000" / "4-batches", TokenizedPair)
    assert stored is not None  # run() has made it
    settings = TrainSettings(learning_rate=spec.learning_rate, pairs_per_step=spec.pairs_per_step)

    def work() -> None:
        model = load(str(story_model(options)), cache=False).model
        _train(model, PairStore(stored), settings, choose_layout(model)[0])

    return work


def _train(model: Any, pairs: Any, settings: TrainSettings, layout: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            model=model.requires_grad_(True),
            pairs=pairs,
            loss=DPO(beta=BETA),
            settings=settings,
            layout=layout,
            seed=SEED,
            state_folder=Path(folder),
            reference=None,
            starts_at_reference=False,
        )
        train(job, Quiet(), lambda: False)


def sampling(spec: LoopSpec) -> Work:
    """Return the sampling of W5."""
    options = Options(stories=story_folder(STORIES))
    folder = str(story_model(options))
    policy = PolicyRef(folder, folder_digest(Path(folder)), -1)
    context = RoundContext(SEED, 0, policy, policy)
    sampler = Hf(completions=spec.completions, max_new_tokens=spec.new_tokens, device="cpu")
    prompts = round_prompts(spec, 0, options)
    return lambda: sampler(prompts, context)


def kind_of(event: Any, decoding: bool) -> str:
    """Return what an operation of the profile belongs to."""
    ancestors = {event.name}
    while event.cpu_parent is not None:
        event = event.cpu_parent
        ancestors.add(event.name)
    if ancestors & {"_TargetLogps", "_TargetLogpsBackward"}:
        return "LM head with log-softmax, forward and backward"
    if ancestors & set(ATTENTION if decoding else ATTENTION[3:]) or any("flash_attention" in a for a in ancestors):
        return "attention: scores, softmax, sums"
    if ancestors & set(PRODUCTS):
        return "matrix products of the layers" + (", and of the LM head" if decoding else "")
    if any("adamw" in a or "foreach" in a for a in ancestors):
        return "optimizer and gradient norm"
    return "other operations: norms, rotary turns, activations, copies"


def shares(events: Iterable[Any], seconds: float, decoding: bool) -> Counter[str]:
    """Return microseconds by kind; what is in no operation is Python."""
    found: Counter[str] = Counter()
    for event in events:
        found[kind_of(event, decoding)] += event.self_cpu_time_total
    found["Python, and starting operations"] = max(0.0, seconds * 1e6 - sum(found.values()))
    return found


def main(arguments: list[str]) -> None:
    """Profile the workload that `arguments` name."""
    torch.set_num_threads(1)
    name, *sizes = arguments
    precision = "fp32"
    if name == "W2":
        prompt, completion, precision = int(sizes[0]), int(sizes[1]), sizes[2]
        work = training(TrainSpec(ModelSpec(), prompt, completion, precision=precision))
    else:
        work = {"W1": loop_training, "W5": sampling}[name](LoopSpec())
    work()
    clocks = []
    for _ in range(3):
        began = time.process_time()
        work()
        clocks.append(time.process_time() - began)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as recorded:
        began = time.perf_counter()  # as the profiler's own clock
        work()
        seconds = time.perf_counter() - began
    console = Console(soft_wrap=True)
    console.print(
        f"`{machine.command(arguments).replace('benchmarks', 'benchmarks.profile')}` · {machine.machine('cpu')}"
    )
    console.print(
        f"{min(clocks):.2f} CPU s without the profiler, {seconds:.2f} s with it; load {machine.load():.1f}",
        highlight=False,
    )
    found = shares(recorded.events(), seconds, name == "W5")
    for kind, used in found.most_common():
        console.print(f"| {kind} | {100 * used / found.total():.0f} % |", highlight=False)
    counted = [e for e in recorded.key_averages() if e.flops]
    for event in sorted(counted, key=lambda e: -e.flops)[:3]:
        # Its share of the time without the profiler, so that other work on the machine does not count.
        rate = event.flops / (event.self_cpu_time_total / found.total() * min(clocks)) / 1e9
        console.print(f"{event.key}: {event.flops / 1e9:.1f} G operations at {rate:.0f} G/s", highlight=False)
    console.print(f"matrix peak {matrix_peak(Options(), precision) / 1e9:.0f} G/s", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
