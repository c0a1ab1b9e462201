"""Rows that are decoded together, with their key-value cache: start from prompts, append tokens, drop and add rows."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefloop.models.decoding import DECODING_ATTENTION, RoomyLayer, decoding_cache
from prefloop.models.decoding_llama import LeanStep


class DecodingBatch:
    """Completions in the making, within `decoding(model)` and `torch.inference_mode`.

    All rows end at the right of the cache; what lies before a row's first token is masked.
    """

    def __init__(self, model: PreTrainedModel, lean: LeanStep | None) -> None:
        """Make a batch without rows, for `start`; `lean` takes the place of the model's forward after the prompts."""
        self.model = model
        self.lean = lean
        self.device: torch.device = model.device
        self.cache = decoding_cache(model)
        # One kind of attention over all positions: the mask of a step is the same for every layer.
        every = all(type(layer) is RoomyLayer for layer in self.cache.layers)
        self.plain = every and model.config._attn_implementation == DECODING_ATTENTION
        # Architectures without these arguments count positions themselves, or have none.
        self.takes = signature(model.forward).parameters.keys() & {"position_ids", "logits_to_keep"}
        self.can_join = every and "position_ids" in self.takes
        self.width = 0
        self.starts: list[int] = []
        self.positions = torch.empty(0, device=self.device)
        self.mask: Tensor | None = None

    def start(self, prompts: Sequence[Sequence[int]], prompt_of_row: list[int], ahead: int) -> Tensor:
        """Compute every prompt once and give it to its rows; return their first logits, [row vocabulary].

        At most `ahead` tokens may be appended.
        """
        lengths = [len(ids) for ids in prompts]
        self._align(lengths, ahead)
        padded = [[0] * (self.width - len(ids)) + list(ids) for ids in prompts]
        positions = (self.positions + torch.arange(1 - self.width, 1, device=self.device)).clamp_min(0)
        logits = self._forward(torch.tensor(padded, device=self.device), positions)
        if self.lean is not None:
            self.lean.adopt(self.cache)
        self._make_bias()
        self.keep(prompt_of_row)
        return logits[torch.tensor(prompt_of_row, device=self.device)]

    def advance(self, token: Tensor) -> Tensor:
        """Append one token to each row; return the logits of the next, [row vocabulary]."""
        self.width += 1
        self.positions = self.positions + 1
        if self.lean is not None:
            return self.lean(token, self.positions[:, 0], self._mask(), self.cache)
        return self._forward(token[:, None], self.positions)

    def keep(self, rows: list[int]) -> None:
        """Drop every row whose index is not in `rows`; an index may stand there more than once."""
        self.starts = [self.starts[row] for row in rows]
        indices = torch.tensor(rows, device=self.device)
        self.cache.reorder_cache(indices)
        self.positions = self.positions[indices]
        if self.mask is not None:
            self.mask = self.mask[indices]

    def join(self, other: "DecodingBatch", ahead: int) -> None:
        """Append the rows of `other`, which ends with that; at most `ahead` tokens may be appended to any row."""
        lengths = [batch.width - start for batch in (self, other) for start in batch.starts]
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.join(theirs, max(lengths))
        self._align(lengths, ahead)
        self._make_bias()

    def _align(self, lengths: list[int], ahead: int) -> None:
        """Set where rows begin, what is masked, and the position of each row's last token."""
        self.width = max(lengths)
        self.starts = [self.width - length for length in lengths]
        self.positions = torch.tensor(lengths, device=self.device)[:, None] - 1
        self.mask = None
        if max(self.starts) > 0:
            starts = torch.tensor(self.starts, device=self.device)[:, None]
            self.mask = torch.arange(self.width + ahead, device=self.device) >= starts

    def _make_bias(self) -> None:
        """Make once, if possible, what the model would make of the mask at every step."""
        if self.mask is not None and self.plain:
            bias = torch.zeros_like(self.mask, dtype=self.model.dtype).masked_fill(~self.mask, -torch.inf)
            self.mask = bias[:, None, None]

    def _mask(self) -> Tensor | None:
        return None if self.mask is None else self.mask[..., : self.width]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        output = self.model(
            input_ids=ids,
            attention_mask=self._mask(),
            past_key_values=self.cache,
            use_cache=True,
            **{name: options[name] for name in self.takes},
        )
        logits: Tensor = output.logits[:, -1]
        return logits
