"""Sequences that share a beginning, laid end to end in one row without padding, and attention among them.

A segment is a stretch of tokens that continues its parent segment, or starts a sequence. A token attends to the
tokens before it on its own path of segments and to no other; positions count along the path. All layers but
attention see one long row, so neither padding nor a shared beginning is computed twice.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

IMPLEMENTATION = "prefloop_segments"
"""Name of the attention below among transformers' attention implementations."""

SMALL_MASK = 1 << 18
"""Entries up to which a mask is kept as numbers too, 1 MiB in float32; what larger ones cost is lost in the scores."""


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of one row in their order: lengths in tokens (≥ 1), and each one's parent (None: a beginning).

    A parent stands before its children. `masks` and `biases` keep the masks that layers share.
    """

    lengths: tuple[int, ...]
    parents: tuple[int | None, ...]
    masks: dict[tuple[int, int, int | None], Bool[Tensor, "query key"]] = field(default_factory=dict)
    biases: dict[tuple[int, int, int | None], Float[Tensor, "query key"]] = field(default_factory=dict)

    def path(self, segment: int) -> list[int]:
        """Return the segments from the beginning to `segment`, itself included."""
        parent = self.parents[segment]
        return [segment] if parent is None else [*self.path(parent), segment]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
        """Return which of the last `keys` tokens of a path each of its last `queries` tokens attends to.

        `None` stands for plain causal attention of a segment to itself, for which kernels need no mask.
        """
        if queries == keys and (window is None or window >= queries):
            return None
        key = (queries, keys, window)
        if key not in self.masks:
            # Positions relative to the first query: distances on a path are distances in position ids.
            query_at = torch.arange(queries, device=device)[:, None]
            key_at = torch.arange(queries - keys, queries, device=device)[None, :]
            seen = key_at <= query_at
            self.masks[key] = seen if window is None else seen & (key_at > query_at - window)
        return self.masks[key]

    def bias(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """Return the mask as kernels take it: a small one as what is added to scores, of the type of `like`.

        On a CPU they would turn it into that at every call.
        """
        mask = self.mask(queries, keys, window, like.device)
        if mask is None or mask.numel() > SMALL_MASK or like.device.type != "cpu":
            return mask
        key = (queries, keys, window)
        if key not in self.biases:
            self.biases[key] = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, -torch.inf)
        return self.biases[key]


def use_segments(model: PreTrainedModel) -> None:
    """Make `model` use the attention of this file, for good: without segments it is transformers' SDPA attention.

    For good, because gradient checkpointing calls the attention again during the backward pass.
    """
    if model.config._attn_implementation != IMPLEMENTATION:
        model.set_attn_implementation(IMPLEMENTATION)


def attend(  # noqa: PLR0913  transformers' interface
    module: nn.Module,
    query: Float[Tensor, "row head query width"],
    key: Float[Tensor, "row kv_head key width"],
    value: Float[Tensor, "row kv_head key value_width"],
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "row query head value_width"], None]:
    """Attend as transformers' attention interface asks; within `segments` where they are given.

    Without them this is ordinary attention over rows with `attention_mask` (generation, the padded layout).
    `sliding_window` counts positions of a path, the token itself included. `softcap` bounds the scores (Gemma 2).
    """
    settings = _Attention(scaling, dropout, softcap)
    if segments is not None:
        return _along_paths(query, key, value, segments, sliding_window, settings), None
    if softcap is not None:
        return settings(query, key, value, attention_mask).transpose(1, 2), None
    output: tuple[Tensor, None] = AttentionInterface()["sdpa"](
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest
    )
    return output


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _along_paths(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, window: int | None, settings: "_Attention"
) -> Tensor:
    """Attend segment by segment: queries of the segment, keys and values of its path.

    Never compiled: its shapes are new in every microbatch, and nearly all of its time is inside SDPA.
    """
    if settings.softcap is None:
        key, value = _repeat(key, query), _repeat(value, query)
    # split and not slices: its backward pass is one concatenation, that of a slice a row of zeros for each segment.
    queries = query.split(segments.lengths, 2)
    keys = key.split(segments.lengths, 2)
    values = value.split(segments.lengths, 2)
    outputs = []
    for segment, length in enumerate(segments.lengths):
        path = segments.path(segment)
        path_keys = _joined([keys[s] for s in path])
        path_values = _joined([values[s] for s in path])
        if window is not None:
            reach = length + window - 1
            path_keys, path_values = path_keys[:, :, -reach:], path_values[:, :, -reach:]
        shape = (length, path_keys.shape[2], window)
        capped = settings.softcap is not None
        mask = segments.mask(*shape, query.device) if capped else segments.bias(*shape, query)
        outputs.append(settings(queries[segment], path_keys, path_values, mask).transpose(1, 2))
    return torch.cat(outputs, 1)


def _joined(stretches: list[Tensor]) -> Tensor:
    return stretches[0] if len(stretches) == 1 else torch.cat(stretches, 2)


@dataclass(frozen=True)
class _Attention:
    """Attention of some queries to some keys, [1, head, token, width]. A mask of `None` means causal."""

    scaling: float | None
    dropout: float
    softcap: float | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if self.softcap is not None:
            return self._capped(query, key, value, mask, self.softcap)
        return scaled_dot_product_attention(
            query,
            _repeat(key, query),
            _repeat(value, query),
            attn_mask=mask,
            dropout_p=self.dropout,
            is_causal=mask is None,
            scale=self.scaling,
        )

    def _capped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softcap: float) -> Tensor:
        """Attend with scores softcap · tanh(score / softcap), which no fused kernel offers."""
        key, value = _repeat(key, query), _repeat(value, query)
        scale = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = softcap * torch.tanh(query @ key.mT * (scale / softcap))
        if mask is None:
            rows, columns = scores.shape[-2:]
            mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
        return drop(weights, self.dropout) @ value


def _repeat(tensor: Tensor, query: Tensor) -> Tensor:
    """Repeat key or value heads until there are as many as query heads."""
    times = query.shape[1] // tensor.shape[1]
    return tensor if times == 1 else tensor.repeat_interleave(times, 1)


AttentionInterface.register(IMPLEMENTATION, attend)
# Plain calls get the masks of SDPA attention; calls with segments bring their own.
AttentionMaskInterface.register(IMPLEMENTATION, AttentionMaskInterface()["sdpa"])
