"""A reward model: the policy's backbone with a linear head on the last token, a sequence classifier of transformers.

It is trained, stored and read as `AutoModelForSequenceClassification` with one logit, so that plain transformers and
`judge.kind=reward_model` load what training wrote.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from prefloop.disk import machine_errors
from prefloop.errors import DataError
from prefloop.models.adapters import ALL_LINEAR
from prefloop.models.causal_lm import (
    TEMPLATE_FAULTS,
    check_folder,
    choose_device,
    load_tokenizer,
    make_room,
    quiet,
)
from prefloop.models.skeleton import Skeleton, classifier_skeleton, head_of_classifier
from prefloop.rows import VERBATIM, Prompt


def load_reward_model(folder: Path, device: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Load a causal LM or a reward model as a classifier with one logit, float32, in evaluation mode.

    Return it with its tokenizer, and whether its head is fresh: it is where the folder holds none, drawn from `seed`.
    Texts of different length are padded; where the config names no padding token, the tokenizer's is noted in it, or
    its end token.

    Raises:
        DataError: the folder cannot be read, or transformers has no classifier of its architecture.

    """
    check_folder(folder)
    tokenizer = load_tokenizer(folder)
    make_room()
    try:
        with quiet(), machine_errors(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, found = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=1,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise DataError(
            f"{folder}: cannot be the backbone of a reward model ({reason}); transformers has sequence classifiers of "
            "many causal LMs, such as Llama, Qwen, Gemma and GPT-NeoX: choose one of them as policy"
        ) from error
    head = {name for name, _ in head_of_classifier(model)}
    missing = sorted(set(found["missing_keys"]) - head)
    if missing:
        raise DataError(f"{folder}: {len(missing)} weights of the backbone are missing ({missing[0]}, …)")
    _note_padding(model, tokenizer)
    return model.to(choose_device(device)).eval(), tokenizer, bool(head & set(found["missing_keys"]))


def reward_model_skeleton(
    folder: Path, device: str, seed: int
) -> tuple[Skeleton, PreTrainedTokenizerBase, bool] | None:
    """Return what `load_reward_model` would, without weights, for ranks that share them; see `models/skeleton.py`.

    Raises:
        DataError: the folder has no config, weights or tokenizer.

    """
    check_folder(folder)
    tokenizer = load_tokenizer(folder)
    found = classifier_skeleton(folder, choose_device(device), seed)
    if found is None:
        return None
    skeleton, fresh = found
    _note_padding(skeleton.model, tokenizer)
    return skeleton, tokenizer, fresh


def _note_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        config.pad_token_id = next(i for i in ids if i is not None)


def add_lora(model: PreTrainedModel, rank: int, alpha: float, targets: str | Sequence[str], seed: int) -> PeftModel:
    """Freeze the backbone and put a low-rank adapter on it, drawn from `seed`; the head is trained whole.

    `models.adapters.add_lora` is for causal LMs: peft wraps these for generation, which a classifier cannot do.
    """
    layers = [name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted({name.rpartition(".")[2] for name in layers}) if targets == ALL_LINEAR else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        # PEFT 0.21 asks for it by the name that transformers 5.23 has deprecated.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        torch.manual_seed(seed)
        adapted = PeftModel(model, config).train(training)
    for _, parameter in head_of_classifier(model):
        parameter.requires_grad_(True)
    return adapted


def exchange_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> list[int]:
    """Return the token ids of prompt and completion as `judge.kind=reward_model` reads them, without a limit.

    A plain-text prompt and its completion are one text; a conversation goes through the chat template, or is joined by
    a line break where there is none.

    Raises:
        DataError: there are no tokens.

    """
    is_plain = len(prompt.messages) == 1 and prompt.messages[0].role == VERBATIM
    if is_plain or not tokenizer.chat_template:
        text = prompt.text + ("" if is_plain else "\n") + completion
        ids = list(tokenizer(text, verbose=False)["input_ids"])
    else:
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        messages.append({"role": "assistant", "content": completion})
        try:
            rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except TEMPLATE_FAULTS as error:
            raise DataError(
                f"prompt {prompt.prompt_id} ({prompt.source}): the chat template refuses its messages ({error}); "
                "change the roles, or use a tokenizer with another template"
            ) from error
        ids = list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise DataError(f"prompt {prompt.prompt_id} ({prompt.source}): prompt and completion have no tokens; remove it")
    return ids


def rewards(model: nn.Module, rows: Sequence[Sequence[int]], pad: int) -> Float[Tensor, " row"]:
    """Return the classifier's logit of each row of token ids, float32. Rows are padded on the right with `pad`."""
    device = next(model.parameters()).device
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float()
    return found


def pad_id(model: nn.Module) -> int:
    """Return the padding token of a model that `load_reward_model` returned, with or without an adapter."""
    plain: Any = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
    return int(plain.config.get_text_config().pad_token_id)
