"""LoRA adapters: add to a policy, merge into it, save and load."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefloop.errors import ConfigError, DataError

ALL_LINEAR = "all-linear"
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def add_lora(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ALL_LINEAR,
    seed: int = 0,
) -> PeftModel:
    """Freeze `model` and add a trainable low-rank adapter that does nothing yet (LoRA, arXiv 2106.09685).

    The same model, settings and seed give the same adapter; the global random state stays as it was. The LM head is
    never adapted: the log-prob engine reads its plain weight.

    Args:
        model: a causal LM; its linear layers are wrapped in place.
        rank: rank of each update, ≥ 1.
        alpha: the update is scaled by alpha / rank; > 0.
        dropout: probability of dropping an input of the adapter in training, in [0, 1).
        targets: names of linear layers (their last part), or `all-linear`.
        seed: seed of the random half of each update; the other half is zero.

    Raises:
        ConfigError: a setting is out of range, or `targets` names no linear layer, or the LM head.

    """
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise ConfigError(
            "train.lora (models/adapters.py): needs rank ≥ 1, alpha > 0 and dropout in [0, 1), "
            f"got rank {rank}, alpha {alpha}, dropout {dropout}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if targets == ALL_LINEAR else _checked(model, targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    training = model.training
    with _calling_peft(model, seed):
        adapted = get_peft_model(model, config)
    return adapted.train(training)


def merge_lora(peft_model: PeftModel) -> PreTrainedModel:
    """Add the adapter's update to the weights and return the plain model, which takes gradients again.

    Each weight is merged in float32 and rounded to its own type once. The model is changed in place: the PEFT wrapper
    is of no use afterwards.
    """
    with torch.no_grad():
        for layer in peft_model.modules():
            if isinstance(layer, LoraLayer):
                base = layer.get_base_layer()
                dtype = base.weight.dtype
                layer.to(torch.float32)
                layer.merge()
                base.to(dtype)
    plain: PreTrainedModel = peft_model.unload()
    return plain.requires_grad_(True)


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Write the adapter alone, as PEFT reads it; the same adapter gives the same bytes."""
    peft_model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    path = folder / _CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    # PEFT keeps the names in a set, whose order changes from process to process.
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def load_adapter(model: PreTrainedModel, folder: Path, trainable: bool) -> PeftModel:
    """Put a saved adapter onto the base policy that it belongs to; `trainable` adapters take gradients.

    Raises:
        DataError: the folder has no adapter as safetensors, or the adapter does not fit the model.

    """
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: no {name}; give a folder written by save_adapter (safetensors only)")
    training = model.training
    try:
        with _calling_peft(model, seed=0):
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"{folder}: the adapter does not fit {type(model).__name__} ({str(error).splitlines()[0]}); "
            "load it onto the base policy that it was trained on"
        ) from error
    return adapted.train(training)


def _checked(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    names = [targets] if isinstance(targets, str) else list(targets)
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    for target in names:
        found = [m for name, m in linear.items() if name == target or name.endswith(f".{target}")]
        if not found:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name, m in linear.items() if m is not head}))
            raise ConfigError(
                f"train.lora.targets (models/adapters.py): no linear layer is called {target!r}; there are {known}"
            )
        if head in found:
            raise ConfigError(f"train.lora.targets (models/adapters.py): {target!r} is the LM head; remove it")
    return names


@contextmanager
def _calling_peft(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Draw from a stream of `seed`, and put the global random state back."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        # PEFT 0.21 asks for it by the name that transformers 5.23 has deprecated.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        torch.manual_seed(seed)
        yield
