"""Make a loaded model trainable: gradients on, randomness off, activations recomputed where asked for."""

from torch import nn
from transformers import PreTrainedModel

_DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout", "attn_dropout", "resid_dropout", "activation_dropout")
"""Names under which transformers' modules keep a dropout rate as a plain number."""


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them.

    `transformers` does so in training mode only, so the model is put into it, with every dropout rate set to 0: the
    stored reference log-probs were made without dropout, and the same step must give the same gradient.
    """
    switch_off_dropout(model)
    model.train()
    # The name changed in transformers 5.2x; the old one warns and goes in v6.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout rate of `model` to 0; its config is left as it is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
