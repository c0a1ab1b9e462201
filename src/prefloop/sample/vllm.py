"""Sampling with vLLM on this machine, without a server."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from prefloop.errors import ConfigError, SamplerError
from prefloop.models.causal_lm import (
    PRECISIONS,
    choose_device,
    choose_dtype,
    decode_completion,
    encode_prompt,
    stop_ids_of,
)
from prefloop.protocols import RoundContext
from prefloop.rows import Completion, Prompt, SampleGroup, digest_of
from prefloop.sample import _vllm_engine
from prefloop.sample._server_reader import Reader
from prefloop.sample.hf import stream_seed

FINISHED = ("stop", "length")
"""What vLLM calls the end of a completion that is whole, or as long as it may be."""


@dataclass(frozen=True)
class Vllm:
    """Draw completions with vLLM on this machine: many at once, batched by vLLM as they come and go.

    Needs `pip install 'prefloop[vllm]'`. vLLM gets the policy's token ids and returns the completion's, with log-probs
    at temperature 1 and before top-k or top-p; whether these stand for the reference's is measured before they are
    used: see `sampler_gap` in 4-batches. The engine is kept for the parts of a stage; it ends, and its memory is free,
    before another model is loaded, such as a judge's or the one to train. With several ranks the main one samples.

    Every completion has a seed of its own. vLLM's sums depend on what is computed together, so a part that is drawn
    again may differ.

    Raises:
        ConfigError: a field is out of range, or vLLM is not installed.

    """

    completions: int = 4
    """K: completions for each prompt. ≥ 1; default 4."""
    max_new_tokens: int = 256
    """Most tokens of one completion, the end token included. ≥ 1; the model's own maximum length is kept as well."""
    temperature: float = 1.0
    """Divides the logits. ≥ 0, 0 takes the most probable token; default 1: draws from the policy itself."""
    top_p: float = 1.0
    """Keep the most probable tokens whose probabilities reach this sum. In (0, 1]; default 1: all tokens."""
    top_k: int = 0
    """Keep the k most probable tokens. ≥ 0; default 0: all tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; it is cut after the token that completes the string. Default none."""
    precision: str = "auto"
    """`fp32`, `bf16`, or `auto` (default): fp32 on CPU, bf16 on CUDA, as the reference is computed."""
    context: int | None = None
    """Most tokens of a prompt with its completion, ≥ 2; default: as many as the policy takes. vLLM keeps memory for
    one such row at least."""
    memory: float = 0.9
    """Share of a GPU's memory that vLLM takes, in (0, 1]. On a CPU VLLM_CPU_KVCACHE_SPACE says how many GiB."""
    gpus: int = 1
    """GPUs over which each layer is split (tensor parallel), ≥ 1."""
    eager: bool = False
    """Compile nothing and capture no CUDA graphs: starts sooner, decodes slower."""

    one_process: ClassVar[bool] = True
    without_effect: ClassVar[tuple[str, ...]] = ("memory", "gpus", "eager")
    """Settings that change no completion but for rounding."""

    def __post_init__(self) -> None:
        for name, holds, rule in self._rules():
            if not holds:
                raise ConfigError(f"sampler.{name} (sample/vllm.py): must be {rule}, got {getattr(self, name)!r}")
        _vllm_engine.require()

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        for name in ("completions", "max_new_tokens", "gpus"):
            yield name, getattr(self, name) >= 1, "≥ 1"
        yield "temperature", 0 <= self.temperature < math.inf, "≥ 0 (0 is greedy)"
        yield "top_p", 0 < self.top_p <= 1, "in (0, 1]"
        yield "top_k", self.top_k >= 0, "≥ 0 (0 keeps all tokens)"
        yield "stop", all(self.stop), "strings that are not empty"
        yield "precision", self.precision in ("auto", *PRECISIONS), "auto, fp32 or bf16"
        yield "context", self.context is None or self.context >= 2, "≥ 2"
        yield "memory", 0 < self.memory <= 1, "in (0, 1]"

    def __call__(self, prompts: Sequence[Prompt], context: RoundContext) -> list[SampleGroup]:
        """Return one group of `completions` for each prompt, in order.

        Raises:
            ConfigError: vLLM cannot be imported.
            DataError: the policy's folder cannot be read, or a prompt cannot be encoded.
            SamplerError: vLLM cannot load the policy, or failed, or a prompt leaves no room for a token.

        """
        if not prompts:
            return []
        reader = self._reader(context)
        folder = Path(context.policy.path)
        stops = stop_ids_of(folder, reader.tokenizer)
        asked = [self._asked(prompt, reader, sorted(stops), context) for prompt in prompts]
        with _vllm_engine.engine(self._engine(folder, context.policy.digest)) as engine:
            drawn = iter(self._generated(engine, [one for some in asked for one in some]))
        groups = []
        for prompt, some in zip(prompts, asked, strict=True):
            made = [
                self._completion(prompt, index, one, next(drawn), (reader, stops, context))
                for index, one in enumerate(some)
            ]
            policy, number = context.policy.digest, context.round
            groups.append(SampleGroup(prompt, tuple(made), policy, number, self.temperature, self.top_p))
        return groups

    def _reader(self, context: RoundContext) -> Reader:
        reader = Reader.of(context)
        limits = [limit for limit in (reader.longest, self.context) if limit is not None]
        return replace(reader, longest=min(limits, default=None))

    def _engine(self, folder: Path, digest: str) -> _vllm_engine.Wanted:
        dtype = choose_dtype(self.precision, choose_device("auto"))
        arguments: dict[str, Any] = {
            "model": str(folder.resolve()),
            "dtype": str(dtype).removeprefix("torch."),
            "load_format": "safetensors",  # never a pickle
            "trust_remote_code": False,
            "generation_config": "vllm",  # no filters but those that we name
            "gpu_memory_utilization": self.memory,
            "tensor_parallel_size": self.gpus,
            "enforce_eager": self.eager,
            "disable_log_stats": True,
        }
        if self.context is not None:
            arguments["max_model_len"] = self.context
        return _vllm_engine.Wanted(digest, tuple(arguments.items()))

    def _asked(
        self, prompt: Prompt, reader: Reader, stops: list[int], context: RoundContext
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """Return the prompt's ids and the arguments of vLLM's SamplingParams, for each completion."""
        if prompt.media:
            raise SamplerError(
                f"prompt {prompt.prompt_id} ({prompt.source}): this sampler takes text only, and here are images or "
                "videos; drop the prompt"
            )
        ids = encode_prompt(reader.tokenizer, prompt)
        common = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": list(self.stop),
            "stop_token_ids": stops,
            "max_tokens": reader.limit(prompt, self.max_new_tokens),
            "logprobs": 0,  # of the drawn token alone
        }
        seeds = [stream_seed(context.seed, context.round, prompt.prompt_id, i) for i in range(self.completions)]
        return [(ids, {**common, "seed": seed}) for seed in seeds]

    def _generated(self, engine: Any, asked: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Any]:
        """Return vLLM's output for each request, in order."""
        library = _vllm_engine.package()
        try:
            found = engine.generate(
                [{"prompt_token_ids": ids} for ids, _ in asked],
                [library.SamplingParams(**arguments) for _, arguments in asked],
                use_tqdm=False,
            )
        except _vllm_engine.failures() as error:
            _vllm_engine.drop()
            raise SamplerError(
                f"sampler.kind: vllm failed ({type(error).__name__}: {error}); the same command goes on after the last "
                "finished part, or set sampler.kind=hf"
            ) from error
        return [one.outputs[0] for one in found]

    def _completion(
        self,
        prompt: Prompt,
        index: int,
        asked: tuple[list[int], dict[str, Any]],
        drawn: Any,
        by: tuple[Reader, frozenset[int], RoundContext],
    ) -> Completion:
        reader, stops, context = by
        ids = tuple(int(token) for token in drawn.token_ids)
        logps = tuple(float(step[token].logprob) for step, token in zip(drawn.logprobs or (), ids, strict=True))
        if not ids or drawn.finish_reason not in FINISHED or not all(map(math.isfinite, logps)):
            raise SamplerError(
                f"{context.policy.path}: vllm ended the completion of prompt {prompt.prompt_id} ({prompt.source}) as "
                f"{drawn.finish_reason!r} after {len(ids)} tokens, or its log-probs are not finite; the weights may "
                "have diverged, use another policy, or set sampler.kind=hf"
            )
        # An end token need not be a special one, so it is not left to the tokenizer to skip it.
        shown = ids[:-1] if ids[-1] in stops else ids
        return Completion(
            completion_id=digest_of(context.policy.digest, context.round, prompt.prompt_id, index),
            text=decode_completion(reader.tokenizer, asked[0], shown),
            token_ids=ids,
            sampler_logps=logps,
            finish_reason=drawn.finish_reason,
            seed=asked[1]["seed"],
            source=context.policy.digest,
        )
