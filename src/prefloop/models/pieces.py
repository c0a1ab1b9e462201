"""A policy written weight by weight, so that no process holds all of it; of a whole one, see `causal_lm.export`."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefloop.disk import native_writes
from prefloop.models.adapters import merged_weights, plain_weights
from prefloop.models.causal_lm import quiet
from prefloop.models.shares import Checkpoint

FILE_SIZE = "5GB"
"""Most bytes of a file, and of weights in memory at once, if no single weight is larger."""
NAME = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"


def export_pieces(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    checkpoint: Checkpoint,
    write: bool,
) -> None:
    """Write a policy, its adapter merged, as plain `transformers` reads it; all ranks that share `model` call this.

    Weights get the names that they had in `checkpoint`. Only the rank with `write` writes.
    """
    plain: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    stored = [name for name, _ in plain.named_buffers() if name in plain.state_dict()]
    buffers = {name: plain.get_buffer(name) for name in stored}
    named = {**dict(plain_weights(model)), **buffers}
    outside = {name: checkpoint.names.get(name, name) for name in named}
    sizes = {outside[n]: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in named.items()}
    split = split_torch_state_dict_into_shards(sizes, filename_pattern=NAME, max_shard_size=FILE_SIZE)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        _describe(plain, tokenizer, folder, card)
    held: dict[str, Tensor] = {}
    for name, tensor in _weights(model, buffers):
        if write:
            held[outside[name]] = tensor.to(named[name].dtype).cpu().contiguous()
            file = split.tensor_to_filename[outside[name]]
            if len(held) == len(split.filename_to_tensors[file]):
                with native_writes(folder / file):
                    save_file(held, folder / file, metadata={"format": "pt"})
                held = {}
    if write and split.is_sharded:
        index = {"metadata": dict(split.metadata), "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def _weights(model: nn.Module, buffers: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from merged_weights(model)
    yield from buffers.items()


def _describe(plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Write all but the weights, as `save_pretrained` does."""
    config = plain.config
    config.dtype = str(plain.dtype).removeprefix("torch.")
    config.architectures = [type(plain).__name__.removeprefix("FSDP")]
    with quiet(), native_writes(folder):
        config.save_pretrained(folder)
        if plain.can_generate():
            plain.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
