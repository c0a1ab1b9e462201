"""A model without its weights, to be shared over ranks before any of them reads one.

The modules are those that transformers would build; every weight is a stand-in of the right shape, type and device that
takes no memory. `None` instead of a model means that transformers itself must read the checkpoint: it renames, joins or
splits weights of this architecture, keeps some in another type, or would refuse the folder and say why.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from prefloop.models.causal_lm import (
    CausalLM,
    check_folder,
    choose_device,
    choose_dtype,
    folder_digest,
    load_tokenizer,
    locate,
    quiet,
    stop_ids,
)
from prefloop.models.shares import Checkpoint

WEIGHTS = "model*.safetensors"
_STAND_IN = "prefloop_stand_in"
"""Attribute of a weight that is none yet."""


@dataclass(frozen=True)
class Skeleton:
    """A model whose weights are stand-ins, and where they are to be read."""

    model: PreTrainedModel
    checkpoint: Checkpoint


def causal_lm_skeleton(path: str, *, precision: str, device: str) -> tuple[CausalLM, Checkpoint] | None:
    """Return what `causal_lm.load` would with `cache=False`, without weights, and where they are to be read.

    Raises:
        ConfigError, DataError: see `causal_lm.load`.

    """
    folder = locate(path)
    check_folder(folder)
    place = choose_device(device)
    with quiet():
        tokenizer = load_tokenizer(folder)
        found = build(AutoModelForCausalLM, folder, choose_dtype(precision, place), place)
    if found is None:
        return None
    model = found.model
    lm = CausalLM(model, tokenizer, str(folder), folder_digest(folder), stop_ids(model, tokenizer))
    return lm, found.checkpoint


def classifier_skeleton(folder: Path, device: torch.device, seed: int) -> tuple[Skeleton, bool] | None:
    """Return a sequence classifier with one logit, float32, and whether its head is fresh: drawn from `seed`."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = build(AutoModelForSequenceClassification, folder, torch.float32, device, num_labels=1)
    return None if found is None else (found, bool(found.checkpoint.fresh))


def build(auto: Any, folder: Path, dtype: torch.dtype, device: torch.device, **settings: Any) -> Skeleton | None:
    """Build a model by an auto class of transformers; weights that are not the backbone's may be missing on disk."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)
        if getattr(config, "quantization_config", None) is not None:
            return None
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
        if (folder / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        checkpoint = Checkpoint.of(sorted(folder.glob(WEIGHTS)))
        shapes = checkpoint.shapes
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError):
        return None  # whoever loads it whole says what is wrong
    names = None if model._get_dtype_plan(dtype) else _names(model, shapes)
    if names is None or not _fits(model, {n: shapes[own] for n, own in names.items()}, bool(settings)):
        return None
    model.config.name_or_path = str(folder)
    fresh = _fresh(model, names.keys(), device)
    _place_buffers(model, device)
    checkpoint = Checkpoint(checkpoint.files, names, fresh)
    checkpoint.fill({n: b for n, b in model.named_buffers() if n in names})
    stand_in(model, device)
    return Skeleton(model.eval(), checkpoint)


def _names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str] | None:
    """Return what the files call each weight of the model; `None` where one is made of others, or in doubt."""
    mapping = get_model_conversion_mapping(model)
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    renamings = [m for m in mapping if not isinstance(m, WeightConverter)]
    own = model.state_dict()
    found: dict[str, str] = {}
    for name in stored:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if renamed in own and (converter is not None or renamed in found):
            return None
        if renamed in own:
            found[renamed] = name
    return found


def _fits(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], with_head: bool) -> bool:
    """Return whether every weight of the model lies on disk in its shape, and once; a classifier's head may be absent.

    `shapes` are those on disk, by the model's names.
    """
    once = {*(n for n, _ in model.named_parameters()), *(n for n, _ in model.named_buffers())}
    kept = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    absent = {name for name, _ in head_of_classifier(model)} - shapes.keys() if with_head else set()
    tied = kept.keys() - once
    return not tied & shapes.keys() and all(
        shapes.get(name) == shape for name, shape in kept.items() if name not in tied | absent
    )


def head_of_classifier(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that are not the backbone's."""
    backbone = {id(p) for p in model.base_model.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in backbone]


def _fresh(model: PreTrainedModel, known: Collection[str], device: torch.device) -> dict[str, Tensor]:
    """Draw the weights that no file has, as transformers draws them."""
    missing = [name for name, _ in model.named_parameters() if name not in known]
    for name in missing:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, last, nn.Parameter(torch.empty_like(getattr(module, last), device="cpu")))
    _initialize(model, set(missing))
    return {name: model.get_parameter(name).detach().to(device) for name in missing}


def _place_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Make all buffers real, and compute those that are on no disk, such as the rotary frequencies."""
    stored = model.state_dict().keys()
    computed = set()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
                if (full := f"{prefix}.{name}".removeprefix(".")) not in stored:
                    computed.add(full)
    _initialize(model, computed)


def _initialize(model: PreTrainedModel, wanted: set[str]) -> None:
    """Let transformers set parameters and buffers of these names, and leave all others alone."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        vars(tensor)["_is_hf_initialized"] = name not in wanted
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)
    model.initialize_weights()


def stand_in(model: nn.Module, device: torch.device) -> None:
    """Replace all weights by tensors that look like them and take no memory: one number, seen in every place."""
    _replace(model, lambda p: torch.zeros((), dtype=p.dtype, device=device).expand(p.shape))
    for parameter in model.parameters():
        vars(parameter)[_STAND_IN] = True


def hollow(model: nn.Module) -> None:
    """Put the stand-ins among a model's weights onto the meta device; real weights stay."""
    _replace(model, lambda p: torch.empty_like(p, device="meta") if is_stand_in(p) else p.data)


def is_stand_in(parameter: Tensor) -> bool:
    """Return whether a weight is one of `stand_in`."""
    return _STAND_IN in vars(parameter)


def _replace(model: nn.Module, new: Any) -> None:
    """Replace each parameter's data; what modules share, they share afterwards."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(new(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
