"""Make a loaded model trainable: randomness off; activations recomputed and layers compiled where asked for."""

import os
import shutil

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefloop.errors import ConfigError

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


def compile_layers(model: PreTrainedModel) -> None:
    """Let torch.compile make the code of the decoder layers, when it first runs; names of weights stay as they are.

    The parts of each layer and not the whole model: layers share their code, what lies around them has new shapes in
    every microbatch, and parts are compiled inside gradient checkpointing too, a whole layer is not.

    Raises:
        ConfigError: `model` has no layers that transformers marks as such, or there is no C++ compiler.

    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"train.compile: {type(model).__name__} has no known decoder layers; set it to false")
    compiler = os.environ.get("CXX", "g++")
    if model.device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"train.compile: there is no C++ compiler {compiler}; install it, name one in CXX, or set it to false"
        )
    for layer in layers:
        for part in layer.children():
            # Sequence lengths differ from microbatch to microbatch: code for any length, made once.
            part.compile(dynamic=True)


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout rate of `model` to 0; its config is left as it is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
