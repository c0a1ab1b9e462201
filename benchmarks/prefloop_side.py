"""prefloop's side of every workload: its own functions with their default settings."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.meter import Meter, build_model, head_inputs
from benchmarks.records import Measurement, Options
from benchmarks.specs import HeadSpec, LoopSpec, TrainSpec, token_pairs, useful_flops, useful_tokens
from benchmarks.stories import SEED, loop_recipe, round_prompts, story_model
from prefloop.loop import run
from prefloop.losses.dpo import DPO
from prefloop.models.adapters import add_lora
from prefloop.models.causal_lm import folder_digest, forget
from prefloop.models.head import HeadFacts, target_logps
from prefloop.models.logps import choose_layout
from prefloop.models.training import compile_layers
from prefloop.protocols import RoundContext
from prefloop.rows import PolicyRef, TokenizedPair
from prefloop.sample.hf import Hf
from prefloop.train.job import Job
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from prefloop.train.update import autocast, train

BETA = 0.1
LEARNING_RATE = 1e-6


class StepClock:
    """A progress that times the update loop: from the end of its first step, which warms up, to that of its last."""

    def __init__(self, meter: Meter) -> None:
        """Use `meter`."""
        self.meter = meter
        self.steps = 0

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Do nothing."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Note the end of a step."""
        self.steps += amount
        if self.steps == 1:
            self.meter.start()
        else:
            self.meter.stop()

    def finish(self) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""


def train_pairs(
    spec: TrainSpec, options: Options, layout: str = "auto", apart: bool = False, compiled: bool = False
) -> Measurement:
    """Time optimizer steps of the update loop after a first one; the reference is scored before.

    `compiled`: with train.compile; the first step compiles. With `apart`, every pair has token ids of its own, so that
    pairs of one prompt have nothing to share.
    """
    model: nn.Module = build_model(spec.model, options)
    layout = choose_layout(model)[0] if layout == "auto" else layout
    pairs = [unscored(str(i), *ids) for i, ids in enumerate(token_pairs(spec, apart))]
    settings = TrainSettings(
        learning_rate=LEARNING_RATE,
        pairs_per_step=len(pairs),
        epochs=1 + spec.steps,
        precision=spec.precision,
        device=options.device,
    )
    with autocast(torch.device(options.device), spec.precision):
        pairs = score_reference(model, pairs, layout=layout, tokens_per_batch=settings.tokens_per_microbatch)
    if compiled:
        compile_layers(model)
    if spec.lora_rank:
        model = add_lora(model, spec.lora_rank, 2.0 * spec.lora_rank)
    meter = Meter(options)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            model=model,
            pairs=pairs,
            loss=DPO(beta=BETA),
            settings=settings,
            layout=layout,
            seed=SEED,
            state_folder=Path(folder) / "state",
            reference=None,
            starts_at_reference=True,
        )
        train(job, StepClock(meter), lambda: False)
    return meter.measurement(spec.steps * len(pairs), useful_tokens(spec), useful_flops(spec), spec.precision)


def unscored(name: str, context: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> TokenizedPair:
    """Return a pair without reference log-probs."""
    return TokenizedPair(
        pair_id=name,
        context=context,
        chosen=chosen,
        rejected=rejected,
        reference_chosen=None,
        reference_rejected=None,
        win_prob=None,
        weight=1.0,
    )


def score_head(spec: HeadSpec, options: Options) -> Measurement:
    """Time the chunked log-prob head forward and backward."""
    hidden, head, targets = head_inputs(spec, options)
    meter = Meter(options)
    meter.start()
    target_logps(hidden, head, targets, HeadFacts()).sum().backward()
    meter.stop()
    return meter.measurement(tokens=spec.tokens)


def sample(spec: LoopSpec, options: Options) -> Measurement:
    """Time sampling of one round's completions."""
    folder = str(story_model(options))
    policy = PolicyRef(folder, folder_digest(Path(folder)), -1)
    context = RoundContext(SEED, 0, policy, policy)
    sampler = Hf(completions=spec.completions, max_new_tokens=spec.new_tokens, device=options.device)
    prompts = round_prompts(spec, 0, options)
    replace(sampler, max_new_tokens=4)(prompts[:4], context)
    meter = Meter(options)
    meter.start()
    groups = sampler(prompts, context)
    meter.stop()
    completions = [completion for group in groups for completion in group.completions]
    return meter.measurement(tokens=sum(len(c.token_ids) for c in completions), completions=len(completions))


def run_loop(spec: LoopSpec, options: Options) -> Measurement:
    """Time `prefloop.loop.run`: everything that `prefloop run` does after its imports, files and report included."""
    recipe, origins = loop_recipe(spec, options)
    small, _ = loop_recipe(replace(spec, rounds=1, prompts=16, new_tokens=8), options)
    meter = Meter(options)
    with tempfile.TemporaryDirectory() as folder:
        run(small, Path(folder) / "warm")
        forget()  # the loop loads its models itself, as the rival's does
        meter.start()
        summary = run(recipe, Path(folder) / "run", origins=origins)
        meter.stop()
    rounds: list[dict[str, Any]] = summary["rounds"]
    details = {
        "seconds sampling": sum(r["seconds"]["samples"] for r in rounds),
        "seconds training": sum(r["seconds"]["policy"] for r in rounds),
        "seconds evaluating": sum(v for r in rounds for k, v in r["seconds"].items() if k.startswith("evaluation")),
        "completions": sum(r["facts"]["samples"]["completions"] for r in rounds),
    }
    pairs = sum(r["facts"]["batches"]["pairs"] for r in rounds)
    tokens = sum(r["facts"]["samples"]["tokens"] for r in rounds)
    return meter.measurement(pairs, tokens, **details)
