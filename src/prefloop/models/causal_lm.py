"""A causal language model with its tokenizer: find, load, encode, decode, export.

A policy is an ordinary `save_pretrained` folder or a hub id. Weights are read from safetensors only and code that
comes with a model is never run.
"""

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from prefloop.artifact import file_digest
from prefloop.disk import machine_errors, native_writes
from prefloop.errors import ConfigError, DataError
from prefloop.rows import VERBATIM, Prompt

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What `precision` may be beside `auto`, which is fp32 on CPU and bf16 on CUDA."""

TEMPLATE_FAULTS = (
    *(TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError),
    *(NameError, SyntaxError),
)
"""What a chat template can raise: jinja's errors, and those of the Python values that it works on."""
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json")
_POLICY_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.j*",
    *_TOKENIZER_FILES,
)
_KEPT = 2
_cache: OrderedDict[tuple[str, torch.dtype, str], "CausalLM"] = OrderedDict()
_loading = threading.RLock()
"""Held while the cache is looked at or filled: threads that work ahead load models too."""
_elsewhere: list[Callable[[], None]] = []


@dataclass
class CausalLM:
    """A model on its device, with the tokenizer that belongs to it.

    `digest` is `folder_digest` of `path`. A generated token in `stop_ids` ends a completion: the end tokens of the
    generation config, the config and the tokenizer, and the beginning-of-sequence token, which some models emit
    between documents.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: str
    digest: str
    stop_ids: frozenset[int]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device


def locate(path: str, revision: str | None = None) -> Path:
    """Return the local folder of a policy. A hub id is downloaded first, or taken from the hub's own cache.

    `revision` is a hub branch, tag or commit; a local folder has none.

    Raises:
        ConfigError: there is no such folder, and no such hub id can be had.

    """
    folder = Path(path)
    if path and folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(path):
        raise ConfigError(f"policy: no folder {path or repr(path)}; give a save_pretrained folder or a hub id")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=_HUB_PATTERNS))
    except (OSError, HFValidationError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0]
        raise ConfigError(
            f"policy: no folder {path}, and hub id {path} (revision {revision or 'main'}) could not be downloaded "
            f"({reason}); give a save_pretrained folder, or a hub id while online"
        ) from error


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be a policy, without loading it.

    Raises:
        DataError: the folder has no config, no safetensors weights, or no tokenizer.

    """
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no config.json; give a folder written by save_pretrained")
    if not any(folder.glob("model*.safetensors")):
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        if pickled:
            raise DataError(
                f"{folder}: only pickle weights ({pickled[0]}), which are not loaded because a pickle can run code; "
                "convert them where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new)"
            )
        raise DataError(f"{folder}: no model*.safetensors; give a folder with weights written by save_pretrained")
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise DataError(f"{folder}: no tokenizer; put one there with tokenizer.save_pretrained(folder)")


def folder_digest(folder: Path, reread: bool = False) -> str:
    """Return 16 hexadecimal digits that depend on the names and bytes of the files which make the policy.

    These are configuration, weights, tokenizer and chat template; not the model card, manifests, training state or
    sub-folders. A file's hash is remembered for as long as its inode, size and modification time stay the same, unless
    `reread`.
    """
    digest = file_digest if reread else _digest_of_file
    names = {path.name for pattern in _POLICY_FILES for path in folder.glob(pattern) if path.is_file()}
    lines = [f"{name} {digest(folder / name)}" for name in sorted(names)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def load(
    path: str,
    *,
    revision: str | None = None,
    precision: str = "auto",
    device: str = "auto",
    cache: bool = True,
) -> CausalLM:
    """Load a policy in evaluation mode.

    With `cache` the two models used last are kept and shared, so they are for reading only: their parameters take
    no gradient. Pass `cache=False` for a model to train; it takes gradients and is the caller's own.

    Args:
        path: a `save_pretrained` folder or a hub id.
        revision: a hub branch, tag or commit.
        precision: `fp32`, `bf16`, or `auto`: fp32 on CPU, bf16 on CUDA.
        device: a torch device, or `auto`: CUDA where there is one, else CPU.
        cache: whether the model may be shared.

    Raises:
        ConfigError: no such folder or hub id, unknown precision, or a device that is not there.
        DataError: the folder lacks something, or its weights do not fit its config.

    """
    folder = locate(path, revision)
    check_folder(folder)
    place = choose_device(device)
    dtype = choose_dtype(precision, place)
    digest = folder_digest(folder)
    if not cache:
        return _loaded(folder, digest, dtype, place)
    key = (digest, dtype, str(place))
    with _loading:
        if key not in _cache:
            _cache[key] = _loaded(folder, digest, dtype, place)
            _cache[key].model.requires_grad_(False)
            if len(_cache) > _KEPT:
                _cache.popitem(last=False)
        _cache.move_to_end(key)
        return replace(_cache[key], path=str(folder))


def _loaded(folder: Path, digest: str, dtype: torch.dtype, place: torch.device) -> CausalLM:
    make_room()
    with quiet():
        tokenizer = load_tokenizer(folder)
        model = _load_model(folder, dtype).to(place).eval()
    return CausalLM(model, tokenizer, str(folder), digest, stop_ids(model, tokenizer))


def forget() -> None:
    """Drop every model that `load` keeps."""
    with _loading:
        _cache.clear()


def make_room() -> None:
    """Drop what other libraries keep on the device, such as an inference engine: a model is about to be loaded."""
    for drop in list(_elsewhere):
        drop()


def kept_elsewhere(drop: Callable[[], None]) -> None:
    """Have `drop` called whenever room is made for a model."""
    _elsewhere.append(drop)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the token ids that a completion of `prompt` follows.

    A plain-text prompt is tokenized as it is: with the beginning-of-sequence token if the tokenizer adds one, and
    without the end token that some add. An empty one becomes the beginning-of-sequence token. Any other prompt goes
    through the chat template once, which opens the assistant's turn; a beginning-of-sequence token stands there once.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the messages, or nothing is left.

    """
    if len(prompt.messages) == 1 and prompt.messages[0].role == VERBATIM:
        ids = _encode_text(tokenizer, prompt.messages[0].content)
    else:
        ids = _encode_chat(tokenizer, prompt)
    if not ids:
        raise DataError(
            f"prompt {prompt.prompt_id} ({prompt.source}): no tokens, and the tokenizer has no beginning-of-sequence "
            "token to start from; remove the prompt or give it text"
        )
    return ids


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str, stop: bool) -> list[int]:
    """Return the token ids of a completion that was not sampled, such as a gold answer.

    The ids are those of `text` after other text: a tokenizer that marks the start of a text with a space does not
    do so here. No special token is added, but the end token where `stop` is true.

    Raises:
        DataError: `stop` is true and the tokenizer has no end token.

    """
    before = _plain_ids(tokenizer, "\n")
    ids = _plain_ids(tokenizer, text)
    if decode_completion(tokenizer, before, ids) != text:
        joined = _plain_ids(tokenizer, "\n" + text)
        if joined[: len(before)] == before:
            ids = joined[len(before) :]
    if not stop:
        return ids
    if tokenizer.eos_token_id is None:
        raise DataError("tokenizer: no end token (eos_token), so a finished completion cannot be marked; set one")
    return [*ids, tokenizer.eos_token_id]


def decode_completion(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of a completion as it follows its prompt, so that prompt text + result is the whole text.

    Special tokens are left out and spaces are kept as they are. The last prompt tokens are decoded along, because
    some tokenizers drop a space at the start of a text.
    """
    before = list(prompt_ids[-4:])
    context = tokenizer.decode(before, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode([*before, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if whole.startswith(context):
        return str(whole[len(context) :])
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def export(
    lm_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    generation_config: GenerationConfig | None = None,
) -> None:
    """Write a policy as plain `transformers` reads it; the same weights give the same bytes.

    Weights are saved as safetensors in the model's own dtype, with the tokenizer, its chat template, the generation
    config (the model's own unless given) and `card` as README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet(), native_writes(folder):
        lm_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if generation_config is not None:
            generation_config.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    if ids and ids[-1] == end and _plain_ids(tokenizer, text)[-1:] != [end]:
        ids.pop()
    return ids if ids or start is None else [start]


def _encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    if not tokenizer.chat_template:
        raise DataError(
            f"prompt {prompt.prompt_id} ({prompt.source}): the policy's tokenizer has no chat template; use plain-text "
            "prompts (role `text`), or a tokenizer with a template"
        )
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    try:
        ids = list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        )
    except TEMPLATE_FAULTS as error:
        raise DataError(
            f"prompt {prompt.prompt_id} ({prompt.source}): the chat template refuses its messages ({error}); change "
            "the roles, or use a tokenizer with another template"
        ) from error
    start = tokenizer.bos_token_id
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a policy folder.

    Raises:
        DataError: it cannot be read.

    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"{folder}: the tokenizer cannot be read ({_first_line(error)}); write it again with "
            "tokenizer.save_pretrained(folder)"
        ) from error


def _load_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with machine_errors():  # memory that runs out is no fault of the folder
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise DataError(
            f"{folder}: not a causal language model that transformers can read ({_first_line(error)}); "
            "write it again with save_pretrained"
        ) from error
    except RuntimeError as error:
        raise DataError(
            f"{folder}: the weights do not match config.json ({_first_line(error)}); "
            "take both from the same save_pretrained"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        named = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise DataError(
            f"{folder}: {len(missing)} weights that config.json asks for are missing ({named}); "
            "take config and weights from the same save_pretrained"
        )
    return model


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end a completion; see `CausalLM`."""
    return _stop_ids(model.config, model.generation_config, tokenizer)


def stop_ids_of(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the `CausalLM.stop_ids` of a policy folder whose model is not loaded."""
    options = {"local_files_only": True}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    written = (folder / "generation_config.json").is_file()
    return _stop_ids(config, GenerationConfig.from_pretrained(folder, **options) if written else None, tokenizer)


def _stop_ids(config: Any, generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    config = config.get_text_config()
    sources: list[Any] = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    # Not every config class has these attributes, and a model that cannot generate has no generation config.
    sources += [getattr(config, "eos_token_id", None), getattr(config, "bos_token_id", None)]
    sources += [getattr(generation, "eos_token_id", None)]
    ids: set[int] = set()
    for source in sources:
        ids.update(source if isinstance(source, list) else [] if source is None else [source])
    return frozenset(ids)


def choose_device(name: str) -> torch.device:
    """Return the device that `name` means; auto is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: no such device.

    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is not a torch device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name!r} asked for, but {torch.cuda.device_count()} CUDA devices found; use auto")
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of weights: fp32 or bf16; auto is bf16 on CUDA, else fp32.

    Raises:
        ConfigError: no such precision.

    """
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: must be auto, {' or '.join(PRECISIONS)}, got {precision!r}")
    return PRECISIONS[precision]


def _digest_of_file(path: Path) -> str:
    stat = path.stat()
    return _digest_of_version(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest_of_version(path: Path, inode: int, size: int, modified: int) -> str:
    return file_digest(path)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and log lines off the terminal."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
