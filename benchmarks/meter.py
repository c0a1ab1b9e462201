"""What a child reads while it works: clocks, memory, and the machine's matrix-product peak."""

import resource
import sys
import time

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.records import Measurement, Options
from benchmarks.specs import HeadSpec, ModelSpec

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
KIB = 1 if sys.platform == "darwin" else 1024
"""Unit of `ru_maxrss`."""


class Meter:
    """Times one stretch of work. `stop` may be called again: the last call counts."""

    def __init__(self, options: Options) -> None:
        """Measure on the device that `options` name."""
        self.options = options
        self.cuda = options.device == "cuda"
        self.wall = self.cpu = 0.0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.base = self._held()

    def start(self) -> None:
        """Begin the timed work."""
        self._wait()
        self._began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """End the timed work, for now."""
        self._wait()
        self.wall = time.perf_counter() - self._began[0]
        self.cpu = time.process_time() - self._began[1]

    def measurement(
        self, pairs: int = 0, tokens: int = 0, flops: float = 0.0, precision: str = "fp32", **details: float
    ) -> Measurement:
        """Return what was measured; reads memory first, then measures the machine's peak if `flops` are given."""
        peak = self._held()
        machine = matrix_peak(self.options, precision) if flops else 0.0
        return Measurement(self.wall, self.cpu, peak, self.base, pairs, tokens, flops, machine, dict(details))

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _held(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def matrix_peak(options: Options, precision: str = "fp32") -> float:
    """Return the best of several square matrix products: FLOP per CPU second, on a GPU per second."""
    cuda = options.device == "cuda"
    size = 256 if options.quick else 8192 if cuda else 2048
    left = torch.randn(size, size, device=options.device, dtype=PRECISIONS[precision])
    meter = Meter(options)
    seconds = []
    for _ in range(6):
        meter.start()
        left @ left
        meter.stop()
        seconds.append(meter.wall if cuda else meter.cpu)
    return 2 * size**3 / min(seconds)


def build_model(spec: ModelSpec, options: Options) -> PreTrainedModel:
    """Return a randomly initialised float32 Llama; the same weights in every process."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        vocab_size=spec.vocabulary,
        max_position_embeddings=spec.positions,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(options.device).eval()


def head_inputs(spec: HeadSpec, options: Options) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    """Return hidden states, the head and the targets."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    head = nn.Linear(spec.hidden, spec.vocabulary, bias=False, device=options.device, dtype=dtype)
    hidden = torch.randn(spec.tokens, spec.hidden, device=options.device, dtype=dtype, requires_grad=True)
    targets = torch.randint(spec.vocabulary, (spec.tokens,), device=options.device)
    return hidden, head, targets
