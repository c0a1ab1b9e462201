"""`prefloop check`: what can be known before any work."""

import statistics
from collections.abc import Iterator

from prefloop.components import build_parts
from prefloop.inputs import held_out, policy_folder, resolve_prompts
from prefloop.models import causal_lm
from prefloop.recipe import Recipe

EXAMPLES = 3


def check_data(recipe: Recipe) -> Iterator[str]:
    """Validate components and prompts and yield what was found, a line each.

    Raises:
        ConfigError: a setting is wrong.
        DataError: a prompt cannot be used, or there are too few.

    """
    build_parts(recipe)
    yield "settings: every component and key is known"
    prompts = resolve_prompts(recipe)
    evaluated = len(held_out(recipe, prompts))
    yield f"prompts: {len(prompts.train)} to train on, {len(prompts.holdout)} held out, {evaluated} of them evaluated"
    yield from (f"prompts: {note}" for note in prompts.dropped)
    gold = sum(p.gold is not None for p in prompts.prompts)
    yield f"prompts: {gold} of {len(prompts.prompts)} have a reference answer"


def check_policy(recipe: Recipe) -> Iterator[str]:
    """Load the policy's tokenizer and yield exact token ids of a few prompts, and the lengths of all.

    Raises:
        ConfigError: no such model.
        DataError: the folder cannot be used.

    """
    folder = policy_folder(recipe)
    tokenizer = causal_lm.load_tokenizer(folder)
    yield f"policy: {folder}"
    prompts = resolve_prompts(recipe).prompts
    encoded = [causal_lm.encode_prompt(tokenizer, p) for p in prompts]
    for prompt, ids in list(zip(prompts, encoded, strict=True))[:EXAMPLES]:
        yield f"prompt {prompt.prompt_id}: {' | '.join(tokenizer.decode([i]) for i in ids)}"
    begins = {sum(i == tokenizer.bos_token_id for i in ids) for ids in encoded}
    yield f"beginning-of-sequence tokens in a prompt: {sorted(begins)}"
    lengths = sorted(len(ids) for ids in encoded)
    yield f"prompt tokens: median {statistics.median(lengths):.0f}, longest {lengths[-1]}"
