"""Models that several ranks hold together: all open them at once, and none ever has all weights."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefloop.models import causal_lm
from prefloop.models.causal_lm import CausalLM
from prefloop.models.head import decoder_of
from prefloop.models.reward_head import load_reward_model, reward_model_skeleton
from prefloop.models.shares import Checkpoint
from prefloop.models.skeleton import causal_lm_skeleton, hollow
from prefloop.models.training import checkpoint_activations
from prefloop.models.value_head import ValueModel, decoder_checkpoint, folder_of, stored_beside, value_model_for
from prefloop.team import Team
from prefloop.train.settings import TrainSettings
from prefloop.train.sharding import lowered, place, shard, sharding_of, share

WHOLE_FIRST = (
    "{path}: transformers converts weights of this architecture as it reads them, so that each rank loads all of them "
    "before it keeps its share"
)


@dataclass(frozen=True)
class Opened:
    """A causal LM. With a `checkpoint` its weights are stand-ins, which `shard` fills from there; else they are all."""

    lm: CausalLM
    checkpoint: Checkpoint | None


def open_trainable(path: str, settings: TrainSettings, team: Team, say: Callable[[str], None]) -> Opened:
    """Open a model of the caller's own to train, in float32: to be given to `shard` once it is ready for training.

    Raises:
        ConfigError, DataError: see `causal_lm.load`.

    """
    return _opened(path, "fp32", settings, team, say, cache=False)


@dataclass(frozen=True)
class Frozen:
    """A model for reading, whole on each rank, or in shares (`shared`): then all ranks score at once."""

    lm: CausalLM
    shared: bool


def open_frozen(
    path: str,
    settings: TrainSettings,
    team: Team,
    *,
    precision: str = "auto",
    lower: bool = False,
    cache: bool = True,
) -> Frozen:
    """Open a model whose weights take no gradient; `lower`: shares of float32 are gathered as training gathers them.

    Raises:
        ConfigError, DataError: see `causal_lm.load`.

    """
    opened = _opened(path, precision, settings, team, lambda _: None, cache)
    if opened.checkpoint is None:
        return Frozen(opened.lm, shared=False)
    opened.lm.model.requires_grad_(False)
    as_they_are = settings if lower else settings.model_copy(update={"precision": "fp32"})
    shard(opened.lm.model, team, as_they_are, opened.checkpoint)
    return Frozen(opened.lm, shared=True)


@dataclass(frozen=True)
class OpenedReward:
    """A reward model to train, its tokenizer, and whether its head is fresh; see `Opened`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fresh: bool
    checkpoint: Checkpoint | None


def open_reward_model(path: str, settings: TrainSettings, team: Team, seed: int) -> OpenedReward:
    """Open a causal LM or a reward model as a reward model to train, in float32.

    Raises:
        DataError: see `load_reward_model`.

    """
    device = causal_lm.choose_device(settings.device)
    if sharding_of(settings, team, device.type) != "replicate":
        found = reward_model_skeleton(Path(path), settings.device, seed)
        if found is not None:
            skeleton, tokenizer, fresh = found
            return OpenedReward(skeleton.model, tokenizer, fresh, skeleton.checkpoint)
    return OpenedReward(*load_reward_model(Path(path), settings.device, seed), None)


def open_value(policy: nn.Module, settings: TrainSettings, team: Team) -> ValueModel:
    """Open the value model beside a policy's weights to train: whole on each rank, or in shares.

    Raises:
        DataError: see `value_model_for`.

    """
    folder = folder_of(policy)
    opened = open_trainable(str(folder), settings, team, lambda _: None)
    if opened.checkpoint is None:
        value, _ = value_model_for(policy, settings.device)
    else:
        value = ValueModel(opened.lm.model)
    if settings.gradient_checkpointing:
        checkpoint_activations(value.model)
    if opened.checkpoint is not None:
        checkpoint = stored_beside(folder, value) or decoder_checkpoint(value, opened.checkpoint)
        device = value.model.device
        value.model.set_output_embeddings(nn.Identity())  # nobody uses it
        hollow(value)
        share(decoder_of(value.model), device, team, settings, lowered(settings, device.type))
        share(value.head, device, team, settings, lower=False)  # an optimizer takes shares or whole weights, not both
        place(value, device)
        checkpoint.fill(dict(value.trained()))
    return value


def _opened(
    path: str, precision: str, settings: TrainSettings, team: Team, say: Callable[[str], None], cache: bool
) -> Opened:
    device = causal_lm.choose_device(settings.device)
    if sharding_of(settings, team, device.type) != "replicate":
        gc.collect()  # shared models hold themselves: those that nobody uses any more go now
        found = causal_lm_skeleton(path, precision=precision, device=settings.device)
        if found is not None:
            return Opened(*found)
        if team.main:
            say(WHOLE_FIRST.format(path=path))
    lm = causal_lm.load(path, precision=precision, device=settings.device, cache=cache)
    return Opened(lm, None)
