"""What every sampler in this process asks of a model: a cache, room for a completion, where a stop string ends."""

from collections.abc import Sequence
from inspect import signature

from prefloop.errors import ConfigError, SamplerError
from prefloop.models.causal_lm import CausalLM, decode_completion, load
from prefloop.rows import Prompt


def load_decoder(path: str, precision: str, device: str) -> CausalLM:
    """Return a model that can decode token by token.

    Raises:
        ConfigError, DataError: it cannot be loaded, or keeps no key-value cache.

    """
    lm = load(path, precision=precision, device=device)
    if "past_key_values" not in signature(lm.model.forward).parameters:
        raise ConfigError(
            f"sampler (sample/hf.py): {lm.model.config.model_type} models keep no key-value cache, which this "
            "sampler needs; choose another policy, or a sampler that asks a server"
        )
    return lm


def room(lm: CausalLM, prompt: Prompt, ids: list[int], limit: int) -> int:
    """Return how many tokens `lm` lets follow the ids of `prompt`, at most `limit`.

    Raises:
        SamplerError: none, or it does not know one of the ids.

    """
    # Some architectures, such as ALiBi's, have no longest length.
    longest = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None:
        limit = min(limit, longest - len(ids))
    if limit < 1:
        raise SamplerError(
            f"prompt {prompt.prompt_id} ({prompt.source}): {len(ids)} tokens, but the policy takes {longest} in "
            "all, so no room is left for a completion; shorten or drop this prompt"
        )
    entries = lm.model.get_input_embeddings().weight.shape[0]
    if max(ids) >= entries:
        raise SamplerError(
            f"prompt {prompt.prompt_id} ({prompt.source}): token id {max(ids)}, but the policy knows {entries} "
            f"tokens; {lm.path} has another model's tokenizer, put its own there"
        )
    return limit


def end_of_string(
    lm: CausalLM, prompt_ids: Sequence[int], ids: Sequence[int], start: int, stop: Sequence[str]
) -> int | None:
    """Return after how many tokens, more than `start`, one of the strings `stop` stands in the text; else `None`."""
    # A token is at least one byte of text, so no match that ends after `start` begins before this one.
    first = max(0, start - max(len(text.encode()) for text in stop))
    before = [*prompt_ids, *ids[:first]]

    def complete(end: int) -> bool:
        text = decode_completion(lm.tokenizer, before, ids[first:end])
        return any(string in text for string in stop)

    if not complete(len(ids)):
        return None
    return next(end for end in range(start + 1, len(ids) + 1) if complete(end))
