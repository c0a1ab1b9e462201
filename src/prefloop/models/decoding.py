"""Decoding in place: a key-value cache with room ahead, and attention of one new position for each row."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from prefloop.models.segments import IMPLEMENTATION

ROOM = 64
"""Positions that a cache layer allocates ahead."""

NARROW = 16
"""Width of a head up to which its positions lie next to each other."""

DECODING_ATTENTION = "prefloop_decoding"
"""Name under which `transformers` knows `decoding_attention`."""


class RoomyLayer(DynamicLayer):
    """A cache layer with room ahead: a step writes one position instead of copying all earlier ones.

    Narrow heads that `decoding_attention` reads lie as [row head width position], which it reads in about two thirds
    of the time; others lie as [row head position width].
    """

    key_room: Tensor | None = None
    value_room: Tensor | None = None
    dim: int = 2
    both: Tensor | None = None
    """Keys and values in one room, [2 row …], once `append` was called."""
    length: int = 0
    """Positions that `both` holds."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all of them, as transformers' layers do."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            self.dim = 3 if _on_plain_cpu(key_states) and key_states.shape[3] <= NARROW else 2
            return self.keys, self.values
        self.key_room, self.keys = _extended(self.key_room, self.keys, key_states, self.dim)
        self.value_room, self.values = _extended(self.value_room, self.values, value_states, self.dim)
        return self.keys, self.values

    def append(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Append one position, [2 row head width]; return all keys and values as batches of matrices.

        These are keys [row × head, width, position] and values [row × head, position, width]. A third of the
        operations of `update`, which must not be called afterwards.
        """
        if self.both is None or self.both.shape[self.dim + 1] == self.length:
            self._move_together()
        assert self.both is not None
        self.both.select(self.dim + 1, self.length).copy_(states)
        self.length += 1
        return self._key_room.narrow(2, 0, self.length), self._value_room.narrow(1, 0, self.length)

    def _move_together(self) -> None:
        """Make a larger room for keys and values together."""
        self._settle()
        self.length = self.keys.shape[2]
        shape = _room_shape(len(self.keys), self.length + 1, self.keys, self.dim)
        both = self.keys.new_empty(2, *shape)
        for room, held in zip(both, (self.keys, self.values), strict=True):
            _used(room, self.length, self.dim).copy_(held)
        self._take_room(both)

    def _take_room(self, both: Tensor) -> None:
        self.both = both
        keys, values = both[0].flatten(0, 1), both[1].flatten(0, 1)
        self._key_room, self._value_room = (keys, values.mT) if self.dim == 3 else (keys.mT, values)

    def _settle(self) -> None:
        """Let `keys` and `values` be what `append` has made."""
        if self.both is not None:
            self.keys, self.values = (_used(room, self.length, self.dim) for room in self.both)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, with their room where there is one."""
        if self.both is not None:
            self._take_room(self.both.index_select(1, beam_idx))
            return
        if self.key_room is None or self.value_room is None:
            super().reorder_cache(beam_idx)
            return
        length = self.keys.shape[2]
        self.key_room = self.key_room.index_select(0, beam_idx)
        self.value_room = self.value_room.index_select(0, beam_idx)
        self.keys = _used(self.key_room, length, self.dim)
        self.values = _used(self.value_room, length, self.dim)

    def join(self, other: "RoomyLayer", length: int) -> None:
        """Append the rows of `other`; keep the last `length` positions of all, zeros where a row has fewer."""
        self._settle()
        other._settle()
        self.both = None
        self.key_room = _joined(self.keys, other.keys, length, self.dim)
        self.value_room = _joined(self.values, other.values, length, self.dim)
        self.keys = _used(self.key_room, length, self.dim)
        self.values = _used(self.value_room, length, self.dim)


def _used(room: Tensor, length: int, dim: int) -> Tensor:
    """Return the first `length` positions of a room, as [row head position width]."""
    used = room.narrow(dim, 0, length)
    return used.mT if dim == 3 else used


def _room_shape(rows: int, length: int, like: Tensor, dim: int) -> tuple[int, int, int, int]:
    (_, heads, _, width), length = like.shape, length + ROOM
    return (rows, heads, width, length) if dim == 3 else (rows, heads, length, width)


def _extended(room: Tensor | None, held: Tensor, new: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Write `new` behind `held`, the beginning of `room` if there is one; return the room and its used part."""
    begin, length = held.shape[2], held.shape[2] + new.shape[2]
    if room is None or room.shape[dim] < length:
        room = held.new_empty(_room_shape(len(held), length, held, dim))
        _used(room, begin, dim).copy_(held)
    room.narrow(dim, begin, length - begin).copy_(new.mT if dim == 3 else new)
    return room, _used(room, length, dim)


def _joined(first: Tensor, second: Tensor, length: int, dim: int) -> Tensor:
    """Return a room with the rows of both, which end at `length`."""
    room = first.new_zeros(_room_shape(len(first) + len(second), length, first, dim))
    used = _used(room, length, dim)
    for rows, held in ((used[: len(first)], first), (used[len(first) :], second)):
        kept = min(length, held.shape[2])
        rows[:, :, length - kept :] = held[:, :, held.shape[2] - kept :]
    return room


def decoding_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache for `model`, with room ahead in every layer that sees all positions."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _on_plain_cpu(states: Tensor) -> bool:
    return states.device.type == "cpu" and states.dtype == torch.float32


def decoding_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new position for each row, float32 on CPU; `transformers`' SDPA attention in every other case.

    Query heads that share a key-value head are one matrix product. SDPA's CPU kernel works head by head instead
    (1.5 to 2 times slower for heads of 8), and before transformers 5.18 keys and values are copied for every query
    head where there is a mask.
    """
    unusual = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    single = query.shape[2] == 1 and _on_plain_cpu(query)
    if not single or unusual or (attention_mask is not None and attention_mask.shape[1] != 1):
        output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, weights
    (rows, heads, _, width), (groups, length) = query.shape, key.shape[1:3]
    scaling = width**-0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    bias, weight = query.new_empty(1), 0
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            attention_mask = query.new_zeros(()).where(attention_mask, -torch.inf)
        bias, weight = attention_mask.expand(-1, groups, -1, -1).reshape(-1, 1, length), 1
    grouped = query.reshape(rows * groups, -1, width)
    scores = torch.baddbmm(bias, grouped, key.mT.flatten(0, 1), beta=weight, alpha=scaling)
    return scores.softmax(-1).bmm(value.flatten(0, 1)).reshape(rows, 1, heads, -1), None


AttentionInterface.register(DECODING_ATTENTION, decoding_attention)
AttentionMaskInterface.register(DECODING_ATTENTION, sdpa_mask)


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that uses SDPA attention use `decoding_attention` for a while.

    The attention of `segments` is SDPA where there are none, as here: a model draws the same whether or not it has
    scored segments before.
    """
    usual = model.config._attn_implementation
    if usual not in ("sdpa", IMPLEMENTATION):
        yield
        return
    model.set_attn_implementation(DECODING_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
