"""LoRA adapters: add to a policy, merge into it, save, load and combine."""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefloop.disk import native_writes
from prefloop.errors import ConfigError, DataError

ALL_LINEAR = "all-linear"
DEFAULT = "default"
"""Name of a policy's own adapter; it has this one only, save while a trainer or a combination works on it."""
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


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that `merge_lora` would give, in float32, each under its name in the plain model.

    Changes nothing. A model without an adapter yields its parameters as they are. Shared weights come once.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: module for name, module in plain.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in plain_weights(model):
        layer, _, rest = name.rpartition(".")
        if layer in layers and rest == "weight":
            active = [module for module in layers[layer].active_adapters if module in layers[layer].lora_A]
            updates = (layers[layer].get_delta_weight(module).detach() for module in active)
            yield name, sum(updates, start=whole(parameter.detach()).float())
        else:
            yield name, whole(parameter.detach())


def plain_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights of the model under its adapters, each under its name in the plain model, once."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name for name, module in plain.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in plain.named_parameters():
        layer, _, rest = name.partition(".base_layer.")
        if layer in layers:
            yield f"{layer}.{rest}", parameter
        elif name.partition(".lora_")[0] not in layers:
            yield name, parameter


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its rows, also where each rank holds some of them; all ranks ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def add_twin(model: PeftModel, module: str) -> None:
    """Add an adapter called `module` with the settings and weights of `DEFAULT`, which stays the active one."""
    with _calling_peft(model.get_base_model(), seed=0):
        model.add_adapter(module, copy.deepcopy(model.peft_config[DEFAULT]))
    _copy_adapter(model, DEFAULT, module)


def keep_only(model: PeftModel, module: str) -> None:
    """Remove every adapter but `module`, which is called `DEFAULT` from now on."""
    if module != DEFAULT:
        _copy_adapter(model, module, DEFAULT)
    model.set_adapter(DEFAULT)
    for other in [name for name in model.peft_config if name != DEFAULT]:
        model.delete_adapter(other)


def adapter_parameters(model: PeftModel, module: str) -> dict[str, nn.Parameter]:
    """Return the parameters of the adapter called `module`, by name, trainable at the moment or not."""
    named = ((name, name.split("."), parameter) for name, parameter in model.named_parameters())
    return {name: p for name, parts, p in named if parts[-2] == module and parts[-3].startswith("lora_")}


def _copy_adapter(model: PeftModel, source: str, target: str) -> None:
    pairs = zip(adapter_parameters(model, source).values(), adapter_parameters(model, target).values(), strict=True)
    with torch.no_grad():
        for value, parameter in pairs:
            parameter.copy_(value)


def combine_products(model: PeftModel, coefficients: Mapping[str, float]) -> PreTrainedModel:
    """Merge W + Σ γ_d · (alpha_d / r_d) · B_d·A_d and return the plain model; γ_d = `coefficients` of adapter d.

    The sum is exact: A and B are laid side by side by rank, [B_1 B_2]·[γ_1 s_1 A_1; γ_2 s_2 A_2]. Mixing the A and
    the B of several adapters on their own would add cross terms B_1·A_2. Merged in float32, in place; adapters that
    are not named take no part. COFS-DPO (arXiv 2406.05534) deploys such a sum of the fast modules of its domains.

    Raises:
        ConfigError: no coefficient, or one for an adapter that the model does not have.

    """
    _require_adapters(model, list(coefficients))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                weight = layer.get_base_layer().weight
                weight.copy_(weight.float() + _side_by_side(layer, coefficients))
    plain: PreTrainedModel = model.unload()
    return plain.requires_grad_(True)


def _side_by_side(layer: LoraLayer, coefficients: Mapping[str, float]) -> Tensor | float:
    # PEFT's add_weighted_adapter does the same, but in the base's type: a bf16 base would round A and B first.
    found = [name for name in coefficients if name in layer.lora_A]
    if not found:
        return 0.0
    down = [coefficients[name] * layer.scaling[name] * layer.lora_A[name].weight.float() for name in found]
    product = torch.cat([layer.lora_B[name].weight.float() for name in found], dim=1) @ torch.cat(down)
    return product.T if layer.fan_in_fan_out else product


@contextmanager
def mixed(model: PeftModel, coefficients: Mapping[str, Tensor]) -> Iterator[None]:
    """Let `model` compute with W + Σ γ_d · (alpha_d / r_d) · B_d·A_d; differentiable with respect to the γ_d alone.

    Nothing is merged. Each coefficient is a tensor with one number, on the model's device. Afterwards the adapter
    that was active is so again, and takes gradients if it did.

    Raises:
        ConfigError: no coefficient, or one for an adapter that the model does not have.

    """
    _require_adapters(model, list(coefficients))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    scales = [dict(layer.scaling) for layer in layers]
    before = model.active_adapter
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.base_model.set_adapter(list(coefficients), inference_mode=True)
    try:
        for layer in layers:
            layer.scaling.update({name: value * layer.scaling[name] for name, value in coefficients.items()})
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling.update(scale)
        model.set_adapter(before)
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def load_adapters(model: PreTrainedModel, folders: Mapping[str, Path]) -> PeftModel:
    """Put several saved adapters, by name, onto the base policy that all of them belong to; none takes gradients.

    The first one is active.

    Raises:
        DataError: no folders, a folder has no adapter as safetensors, or an adapter does not fit the model.

    """
    if not folders:
        raise DataError("models/adapters.py: no adapters to load; give at least one folder")
    adapted: PeftModel | None = None
    for name, folder in folders.items():
        with _loading(model, folder):
            if adapted is None:
                adapted = PeftModel.from_pretrained(model, folder, adapter_name=name)
            else:
                adapted.load_adapter(folder, name)
    assert adapted is not None  # there is a folder
    return adapted.requires_grad_(False)


def _require_adapters(model: PeftModel, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in model.peft_config]
    if unknown or not names:
        raise ConfigError(
            f"models/adapters.py: coefficients are for {', '.join(names) or 'nothing'}, but the adapters are "
            f"{', '.join(model.peft_config)}; give one for each adapter that takes part"
        )


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Write the adapter alone, as PEFT reads it; the same adapter gives the same bytes."""
    with native_writes(folder):
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
    training = model.training
    with _loading(model, folder):
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    return adapted.train(training)


@contextmanager
def _loading(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: no {name}; give a folder written by save_adapter (safetensors only)")
    try:
        with _calling_peft(model, seed=0):
            yield
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"{folder}: the adapter does not fit {type(model).__name__} ({str(error).splitlines()[0]}); "
            "load it onto the base policy that it was trained on"
        ) from error


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
