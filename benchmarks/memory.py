"""The capacity model against measured peak memory, on a CPU in float32: `python -m benchmarks.memory`.

Each case trains two steps of two microbatches of a Llama-shaped model from random weights, in a process of its own. The
growth of its resident memory's peak, from before the model was made, is compared with `prefloop plan --gpus`
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefloop.commands.plan_capacity import MIB, Shape, training_memory
from prefloop.losses.simpo import SimPO
from prefloop.models.adapters import add_lora
from prefloop.models.training import checkpoint_activations
from prefloop.protocols import Quiet
from prefloop.rows import TokenizedPair
from prefloop.train.job import Job
from prefloop.train.settings import TrainSettings
from prefloop.train.update import Update

SHAPE = {"layers": 8, "width": 384, "mlp": 1024, "keys": 128, "vocabulary": 8192}
CASES: dict[str, dict[str, Any]] = {
    "all weights, 512 tokens": {"tokens_per_microbatch": 512},
    "all weights, 2048 tokens": {"tokens_per_microbatch": 2048},
    "recomputed activations, 2048 tokens": {"tokens_per_microbatch": 2048, "gradient_checkpointing": True},
    "LoRA of rank 8, 1024 tokens": {"tokens_per_microbatch": 1024, "lora": {"rank": 8}},
}
LENGTH = 120
"""Tokens of each completion; the prompt has 16."""


def shape() -> Shape:
    """Return the model's shape, embeddings and head in one."""
    made = Shape(0, **SHAPE)
    return Shape(made.layers * made.layer + made.vocabulary * made.width, **SHAPE)


def peak() -> int:
    """Return the most memory that this process has held, in bytes."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(settings: TrainSettings) -> int:
    """Train two steps and return the growth of the peak, in bytes."""
    torch.set_num_threads(1)
    before = peak()
    made = shape()
    config = LlamaConfig(
        hidden_size=made.width,
        intermediate_size=made.mlp,
        num_hidden_layers=made.layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=made.vocabulary,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    if settings.lora is not None:
        model = add_lora(model, settings.lora.rank, settings.lora.alpha)
    pairs_of_two = settings.tokens_per_microbatch // (2 * LENGTH + 16)
    rows = [
        TokenizedPair(
            f"p{i}",
            tuple(range(5 + i, 21 + i)),
            tuple((7 * i + j) % 8000 + 5 for j in range(LENGTH)),
            tuple((11 * i + j) % 8000 + 9 for j in range(LENGTH)),
            None,
            None,
            None,
            1.0,
        )
        for i in range(4 * pairs_of_two)
    ]
    with tempfile.TemporaryDirectory() as folder:
        Update()(
            Job(model, rows, SimPO(), settings, "shared", 0, Path(folder), None, starts_at_reference=False),
            Quiet(),
            lambda: False,
        )
    return peak() - before


def settings_of(case: str) -> TrainSettings:
    """Return a case's settings, with two microbatches in each step."""
    values = CASES[case]
    pairs = 2 * (values["tokens_per_microbatch"] // (2 * LENGTH + 16))
    return TrainSettings.model_validate({"pairs_per_step": pairs, "checkpoint_every": 1000, **values})


def say(line: str) -> None:
    """Write a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Measure every case in a process of its own and print a table."""
    if len(sys.argv) > 1:
        say(json.dumps(measure(settings_of(sys.argv[1]))))
        return
    say(f"{'case':<38}{'formula':>12}{'measured':>12}{'ratio':>8}")
    for case in CASES:
        found = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", case],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            # Freed tensors go back to the system at once, so that the peak is that of tensors in use.
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        )
        measured = int(found.stdout.splitlines()[-1])
        _, parts = training_memory(shape(), settings_of(case), 1, 1, lower=False)
        wanted = sum(parts.values())
        say(f"{case:<38}{wanted / MIB:>8.0f} MiB{measured / MIB:>8.0f} MiB{measured / wanted:>8.2f}")


if __name__ == "__main__":
    main()
