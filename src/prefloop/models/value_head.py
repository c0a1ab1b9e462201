"""A value model: a language model's decoder and a linear head that says how much reward is still to come."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from prefloop.disk import native_writes
from prefloop.errors import DataError
from prefloop.models import causal_lm
from prefloop.models.adapters import whole
from prefloop.models.head import decoder_of
from prefloop.models.logps import TokenGroup
from prefloop.models.shares import Checkpoint

FILE = "value.safetensors"
"""What a value model is called beside the policy whose rewards it foretells."""


class ValueModel(nn.Module):
    """V(x, y_<t) = w·h_t + b, where h_t is the hidden state from which the policy would predict token t.

    The decoder is the model's own and is trained along; its LM head is not used. The head starts at 0, so that a fresh
    value model says 0 everywhere.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Take over `model`, which becomes the value model's own."""
        super().__init__()
        self.model = model
        width = model.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, device=model.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, groups: Sequence[TokenGroup]) -> Float[Tensor, "row token"]:
        """Return the value before each completion token, float32; rows are completions by group, right-padded with 0.

        Raises:
            ValueError: a context is empty.

        """
        pairs = [(group.context, completion) for group in groups for completion in group.completions]
        if not all(context for context, _ in pairs):
            raise ValueError("ValueModel: a context is empty; start it with a bos token")
        rows = [[*context, *completion[:-1]] for context, completion in pairs]
        width = max(map(len, rows), default=0)
        device = self.head.weight.device
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        hidden = decoder_of(self.model)(tokens, attention_mask=mask, use_cache=False).last_hidden_state
        with torch.autocast(device.type, enabled=False):  # returns are sums: 8 bits of mantissa are too few
            values = self.head(hidden.float()).squeeze(-1)
        scored = [
            row[len(context) - 1 : len(context) - 1 + len(completion)]
            for row, (context, completion) in zip(values, pairs, strict=True)
        ]
        return pad_sequence(scored, batch_first=True)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what training moves, by name: decoder and head."""
        for name, parameter in decoder_of(self.model).named_parameters():
            yield f"decoder.{name}", parameter
        for name, parameter in self.head.named_parameters():
            yield f"head.{name}", parameter

    def save(self, folder: Path, write: bool = True) -> None:
        """Write decoder and head to `folder`; ranks that share them call this together, and one of them has `write`."""
        found = {}
        for name, parameter in self.trained():
            tensor = whole(parameter.detach())
            if write:
                found[name] = tensor.cpu().contiguous()
        if write:
            with native_writes(folder / FILE):
                save_file(found, folder / FILE)


def folder_of(model: nn.Module) -> Path:
    """Return the folder that a policy was read from, its adapter's base where it has one."""
    plain = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
    return Path(plain.name_or_path)


def value_model_for(policy: nn.Module, device: str) -> tuple[ValueModel, bool]:
    """Return the value model that lies beside the policy's weights, and whether there was one.

    Where there is none, the policy's own decoder with a head of zeros takes its place.

    Raises:
        DataError: the file beside the policy is damaged, or of another architecture.

    """
    folder = folder_of(policy)
    lm = causal_lm.load(str(folder), precision="fp32", device=device, cache=False)
    value = ValueModel(lm.model)
    stored = stored_beside(folder, value)
    if stored is not None:
        stored.fill(dict(value.trained()))
    return value, stored is not None


def stored_beside(folder: Path, value: ValueModel) -> Checkpoint | None:
    """Return the value model that lies in a policy's folder, `None` if there is none; `value` is of its shape.

    Raises:
        DataError: the file is damaged, or of another architecture.

    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        stored = Checkpoint.of([path])
        shapes = stored.shapes
    except SafetensorError as error:
        raise DataError(f"{path}: not a value model that can be read ({error}); remove it to start anew") from error
    if shapes != {name: tuple(p.shape) for name, p in value.trained()}:
        raise DataError(f"{path}: the value model of another architecture; remove it to start anew")
    return stored


def decoder_checkpoint(value: ValueModel, checkpoint: Checkpoint) -> Checkpoint:
    """Return where a policy's `checkpoint` has the weights of `value`, whose head is fresh."""
    outside = {id(p): checkpoint.names.get(name, name) for name, p in value.model.named_parameters()}
    names = {name: outside[id(p)] for name, p in value.trained() if id(p) in outside}
    fresh = {name: p.detach() for name, p in value.trained() if id(p) not in outside}
    return Checkpoint(checkpoint.files, names, fresh)
