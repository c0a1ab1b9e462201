"""The log-prob engine: log-probabilities of completions under a causal LM, in three layouts that agree exactly.

    padded   one row for each completion: context + completion, padded on the right. Works for every causal LM.
    packed   all rows laid end to end in one, without padding.
    shared   packed, and the context of a group is computed once, with what its completions have in common.

Only positions that predict a completion token reach the LM head, and the head never holds their logits at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel

from prefloop.errors import ConfigError
from prefloop.models.head import decoder_of, head_of, target_logps_and_squares
from prefloop.models.segments import IMPLEMENTATION, Segments, use_segments
from prefloop.tensors import CompletionLogps

LAYOUTS = ("auto", "padded", "packed", "shared")


@dataclass(frozen=True)
class TokenGroup:
    """Token ids of one context and the completions that follow it. A pair is a group of two."""

    context: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]


def completion_logps(
    model: nn.Module,
    groups: Sequence[TokenGroup],
    *,
    layout: str = "auto",
    temperature: float = 1.0,
    head_chunk: int | None = None,
    squares: bool = False,
) -> CompletionLogps:
    """Return log π(token | context, tokens before) of every completion token, nats, float32.

    Rows are the completions in the order of groups, then completions. An empty completion is a row without tokens.
    Differentiable with respect to the model's parameters where gradients are enabled; saves nothing otherwise.

    `packed` and `shared` change the model's attention implementation to one of ours, for good; without segments it
    is transformers' SDPA attention, so generation and other forward passes stay what they were.

    Args:
        model: a causal LM of transformers, or a PEFT model around one; its train or eval mode is respected.
        groups: contexts with their completions.
        layout: padded, packed, shared, or auto: what `choose_layout` says.
        temperature: divides the logits.
        squares: give `CompletionLogps.log_squares` too.
        head_chunk: logits held at a time; `None` takes 2²⁰ on a CPU and 2²⁶ on a GPU. Changes memory, not results.

    Raises:
        ValueError: a context is empty, so that no position predicts the first token of its completions; or there
            is no completion at all.
        ConfigError: unknown layout, temperature ≤ 0, or a model that the engine or the layout cannot serve.

    """
    causal_lm = _causal_lm(model)
    if layout == "auto":
        layout, _ = choose_layout(model)
    if layout not in LAYOUTS:
        raise ConfigError(f"train.layout (models/logps.py): must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout != "padded" and (reason := _objection(causal_lm, layout)):
        raise ConfigError(f"train.layout (models/logps.py): {layout} cannot be used: {reason}; use padded")
    _require_contexts(groups)
    _require_known_logits(causal_lm)
    return _score(causal_lm, groups, layout, temperature, head_chunk, squares)


def choose_layout(model: nn.Module) -> tuple[str, str]:
    """Return the fastest layout that is exact for `model`, and why in words. Looked into once for each model.

    The answer is `shared` where attention goes through transformers' attention interface, layers mix tokens by full
    or sliding-window attention only, and a made-up batch gives the same log-probs as `padded`; else `padded`.

    Raises:
        ConfigError: the engine cannot serve the model in any layout.

    """
    causal_lm = _causal_lm(model)
    _require_known_logits(causal_lm)
    reason = _objection(causal_lm, "shared")
    return ("padded", reason) if reason else ("shared", "verified against padded")


def verify_layout(model: nn.Module, layout: str = "shared") -> str:
    """Return "" if `layout` gives the log-probs of `padded` on a made-up batch, else how far they are apart.

    Sliding windows are shortened during the check, so that the batch is longer than they are. Where the layouts
    differ, the model gets its former attention implementation back.
    """
    causal_lm = _causal_lm(model)
    groups = _made_up_groups(causal_lm.config.get_text_config().vocab_size)
    before = causal_lm.config._attn_implementation
    with torch.no_grad(), _evaluation(causal_lm), _short_windows(causal_lm):
        expected = _score(causal_lm, groups, "padded")
        got = _score(causal_lm, groups, layout)
    gap = _gap(got.token_logps, expected.token_logps, expected.mask)
    if gap <= _tolerance(causal_lm):
        return ""
    causal_lm.set_attn_implementation(before)
    return f"{layout} and padded log-probs of {type(causal_lm).__name__} differ by {gap:.2g} nats a token"


_OBJECTIONS: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()
_KNOWN_LOGITS: WeakSet[nn.Module] = WeakSet()
_GATHERED_LOWER: WeakSet[nn.Module] = WeakSet()
_MIXERS = {"full_attention", "sliding_attention"}
_CHECK_WINDOW = 3


@dataclass
class _Batch:
    """What the model reads, as rows of tokens, and where each completion token's log-prob comes from.

    `sources` are indices into the model's flat output, `targets` the token each one predicts; `rows` holds for each
    completion the indices of its scores. Completions with a common beginning point to the same scores.
    """

    tokens: list[list[int]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: Segments | None = None
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)

    def score(self, first: int, targets: Sequence[int]) -> list[int]:
        """Score `targets`, predicted at consecutive places from `first` on; return the indices of the scores."""
        start = len(self.targets)
        self.sources.extend(range(first, first + len(targets)))
        self.targets.extend(targets)
        return list(range(start, len(self.targets)))


def _pad(groups: Sequence[TokenGroup]) -> _Batch:
    batch = _Batch()
    pairs = [(group.context, completion) for group in groups for completion in group.completions]
    # The last token of a completion predicts nothing that is scored.
    batch.tokens = [[*context, *completion[:-1]] for context, completion in pairs]
    width = max((len(row) for row in batch.tokens), default=0)
    for index, (context, completion) in enumerate(pairs):
        batch.rows.append(batch.score(index * width + len(context) - 1, completion))
    return batch


def _pack(groups: Sequence[TokenGroup], share: bool) -> _Batch:
    if not share:
        groups = [TokenGroup(group.context, (c,)) for group in groups for c in group.completions]
    batch = _Batch(tokens=[[]])
    lengths: list[int] = []
    parents: list[int | None] = []

    def append(tokens: Sequence[int], position: int, parent: int | None) -> int:
        start = len(batch.tokens[0])
        batch.tokens[0].extend(tokens)
        batch.positions.extend(range(position, position + len(tokens)))
        lengths.append(len(tokens))
        parents.append(parent)
        return start

    for group in groups:
        if not group.completions:
            continue
        common = _common_beginning(group.completions)
        tails = [completion[len(common) :] for completion in group.completions]
        trunk = group.context + common
        segment = len(lengths)
        # A token is computed only if a scored token comes after it.
        start = append(trunk if any(tails) or not common else trunk[:-1], 0, None)
        shared = batch.score(start + len(group.context) - 1, common)
        for tail in tails:
            row = shared + batch.score(start + len(trunk) - 1, tail[:1])
            if len(tail) > 1:
                row += batch.score(append(tail[:-1], len(trunk), segment), tail[1:])
            batch.rows.append(row)
    batch.segments = Segments(tuple(lengths), tuple(parents))
    return batch


def _common_beginning(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    for place, tokens in enumerate(zip(*rows, strict=False)):
        if len(set(tokens)) > 1:
            return rows[0][:place]
    return min(rows, key=len)


def _require_contexts(groups: Sequence[TokenGroup]) -> None:
    for index, group in enumerate(groups):
        if not group.context:
            raise ValueError(f"completion_logps: the context of group {index} is empty; start it with a bos token")
    if not any(group.completions for group in groups):
        raise ValueError(f"completion_logps: {len(groups)} groups without a completion; give at least one")


def _score(
    model: PreTrainedModel,
    groups: Sequence[TokenGroup],
    layout: str,
    temperature: float = 1.0,
    head_chunk: int | None = None,
    squares: bool = False,
) -> CompletionLogps:
    batch = _pad(groups) if layout == "padded" else _pack(groups, share=layout == "shared")
    how = _How(temperature, head_chunk, squares)
    # A sharded model gathers its weights around what it calls itself; see `share_weights`.
    run = getattr(model, _SHARDED, None)
    scores, squared = run(batch, how) if run is not None else _scores(model, batch, how)
    found = _rows(scores, batch.rows)
    return replace(found, log_squares=_rows(squared, batch.rows).token_logps) if squares else found


@dataclass(frozen=True)
class _How:
    """How hidden states become log-probs."""

    temperature: float
    head_chunk: int | None
    squares: bool


_SHARDED = "prefloop_scores"
"""Method of a sharded model by which it is run."""


def forget_gathered(model: nn.Module) -> None:
    """Let a shared model be its shares again, where weights are still gathered from a pass without a backward one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def share_weights(model: nn.Module, lower: bool) -> None:
    """Let the engine run `model` after `fully_shard`, which gathers weights only around what a module calls itself.

    `lower` says that weights are gathered in bf16. From now on all ranks score together: where the engine looks into a
    model before it first uses it, as `choose_layout` does, that is a call on all of them too.
    """
    causal_lm = _causal_lm(model)
    setattr(causal_lm, _SHARDED, MethodType(_scores, causal_lm))
    register_fsdp_forward_method(causal_lm, _SHARDED)
    if lower:
        _GATHERED_LOWER.add(causal_lm)


def _scores(
    model: PreTrainedModel, batch: _Batch, how: _How
) -> tuple[Float[Tensor, " score"], Float[Tensor, " score"]]:
    """Return the log-probs of all targets of a batch, and what `target_logps_and_squares` gives beside them."""
    head, facts = head_of(model, how.temperature)
    device = head.weight.device
    sources = torch.tensor(batch.sources, dtype=torch.long, device=device)
    targets = torch.tensor(batch.targets, dtype=torch.long, device=device)
    hidden = _hidden_states(model, batch, device).flatten(0, 1).index_select(0, sources)
    return target_logps_and_squares(hidden, head, targets, facts, how.head_chunk, how.squares)


def _hidden_states(model: PreTrainedModel, batch: _Batch, device: torch.device) -> Float[Tensor, "row token width"]:
    """Run the decoder without its head."""
    inputs: dict[str, Any]
    if batch.segments is None:
        width = max(map(len, batch.tokens))
        padding = [width - len(row) for row in batch.tokens]
        tokens = [row + [0] * more for row, more in zip(batch.tokens, padding, strict=True)]
        mask = [[1] * (width - more) + [0] * more for more in padding]
        inputs = {"attention_mask": torch.tensor(mask, device=device)}
    else:
        use_segments(model)
        tokens = batch.tokens
        inputs = {
            "position_ids": torch.tensor([batch.positions], device=device),
            # A four-dimensional mask is handed to the layers as it is: no mask of the whole row is built.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            "segments": batch.segments,
        }
    decoder = decoder_of(model)
    output: Tensor = decoder(torch.tensor(tokens, device=device), use_cache=False, **inputs).last_hidden_state
    return output


def _rows(scores: Float[Tensor, " score"], rows: Sequence[Sequence[int]]) -> CompletionLogps:
    """Lay scores out as one right-padded row for each completion; padding takes the zero put at the end."""
    width = max(map(len, rows), default=0)
    nothing = len(scores)
    index = torch.tensor([[*row, *[nothing] * (width - len(row))] for row in rows], dtype=torch.long)
    index = index.reshape(len(rows), width).to(scores.device)
    ended = torch.cat([scores, scores.new_zeros(1)])
    return CompletionLogps(ended.index_select(0, index.flatten()).view_as(index), index != nothing)


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper, whose layers carry the adapter."""
    if isinstance(model, PreTrainedModel):
        return model
    inner: PreTrainedModel = model.get_base_model()  # type: ignore[operator]
    return inner


def _objection(model: PreTrainedModel, layout: str) -> str:
    """Return why `layout` cannot be used, or "". Looked into once for each model."""
    known = _OBJECTIONS.setdefault(model, {})
    if layout not in known:
        known[layout] = _obstacle(model) or verify_layout(model, layout)
    return known[layout]


def _obstacle(model: PreTrainedModel) -> str:
    """Return why sequences cannot share a row of this model, or ""."""
    name = type(model).__name__
    if not decoder_of(model)._supports_attention_backend:
        return f"{name} does not attend through transformers' attention interface"
    attention = model.config._attn_implementation
    if attention not in ("eager", "sdpa", IMPLEMENTATION):
        return f"{name} uses {attention} attention; load it with attn_implementation='sdpa'"
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _MIXERS
    if others:
        return f"{name} has layers of type {', '.join(sorted(others))}, which mix tokens across a row"
    return ""


def _require_known_logits(model: PreTrainedModel) -> None:
    """Compare with the model's own logits once, so that no unknown step after the decoder goes unseen.

    Raises:
        ConfigError: they differ.

    """
    if model in _KNOWN_LOGITS:
        return
    group = _made_up_groups(model.config.get_text_config().vocab_size)[0]
    context, completion = group.context, group.completions[0]
    with torch.no_grad(), _evaluation(model):
        ours = _score(model, [TokenGroup(context, (completion,))], "padded")
        logits = model(torch.tensor([context + completion], device=model.device), use_cache=False).logits
    predicted = logits[:, len(context) - 1 : -1].float().log_softmax(-1)
    own = predicted.gather(2, torch.tensor(completion, device=logits.device)[None, :, None]).squeeze(2)
    gap = _gap(own, ours.token_logps, ours.mask)
    if not gap <= _tolerance(model):
        raise ConfigError(
            f"policy: log-probs of {type(model).__name__} from its decoder and head differ from those of its own "
            f"logits by {gap:.2g} nats a token: it does something to its logits that head_of (models/head.py) does not "
            "know; use another architecture, or teach head_of about it"
        )
    _KNOWN_LOGITS.add(model)


def _gap(one: Tensor, other: Tensor, mask: Tensor) -> float:
    return float(((one - other).abs() * mask).sum() / mask.sum())


def _tolerance(model: PreTrainedModel) -> float:
    """Largest mean difference a token, nats, that rounding explains; a wrong mask or position gives far more."""
    if model.dtype in (torch.bfloat16, torch.float16) or model in _GATHERED_LOWER:
        return 0.2
    # A GPU may multiply float32 with the mantissa of TF32.
    return 1e-3 if model.device.type == "cpu" else 0.02


def _made_up_groups(vocabulary: int) -> list[TokenGroup]:
    """Two groups that differ in every way that a layout can get wrong."""
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(vocabulary, (24,), generator=generator).tolist())
    return [
        TokenGroup(ids[:7], (ids[7:12], ids[12:15])),
        TokenGroup(ids[15:16], (ids[16:20], (*ids[16:18], *ids[20:23]))),
    ]


@contextmanager
def _evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Switch off dropout and autocast; run compiled layers as they were written, as compiling takes a minute."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.autocast(model.device.type, enabled=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
        forget_gathered(model)  # what is trained are the shares


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Give every sliding window a few tokens, so that a short batch shows whether a layout respects it."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    holders = [*model.modules(), *configs.values(), model.config.get_text_config()]
    windows = [(h, vars(h)["sliding_window"]) for h in holders if vars(h).get("sliding_window") is not None]
    for holder, _ in windows:
        holder.sliding_window = _CHECK_WINDOW
    try:
        yield
    finally:
        for holder, window in windows:
            holder.sliding_window = window
