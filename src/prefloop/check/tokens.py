"""What the tokenizer makes of the data: exact examples, special tokens, boundaries, lengths and what is dropped."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prefloop.check.finding import Finding, counted, quantiles, short
from prefloop.errors import DataError
from prefloop.models import causal_lm
from prefloop.recipe import Recipe
from prefloop.rows import VERBATIM, Prompt

MOST = 2000
"""Prompts that are tokenized, evenly spread over the data."""
EXAMPLES = 3
MERGED = 0.05
"""Share of examples above which merged tokens are a warning, our own choice: some words simply end in a prompt."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and the completions that its data hold, as token ids; each completion with its end token."""

    prompt: Prompt
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    completions: tuple[tuple[int, ...], ...]


def encode(tokenizer: Any, prompts: Sequence[Prompt]) -> tuple[list[Encoded], list[str]]:
    """Tokenize an even sample of prompts, each with its best and worst candidate or its answer; say what cannot be."""
    found, refused = [], []
    for prompt in prompts[:: -(-len(prompts) // MOST) or 1]:
        rated = sorted((c for c in prompt.candidates if c.score is not None), key=lambda c: c.score or 0.0)
        texts = (rated[-1].text, rated[0].text) if len(rated) > 1 else () if prompt.gold is None else (prompt.gold,)
        stop = tokenizer.eos_token_id is not None
        try:
            ids = tuple(causal_lm.encode_prompt(tokenizer, prompt))
        except DataError as error:
            refused.append(str(error))
            continue
        sides = tuple(tuple(causal_lm.encode_completion(tokenizer, text, stop)) for text in texts)
        found.append(Encoded(prompt, ids, texts, sides))
    return found, refused


def token_findings(recipe: Recipe, tokenizer: Any, encoded: Sequence[Encoded], on_data: bool) -> Iterator[Finding]:
    """Yield what the token ids of the data show; `on_data` says that the data's completions are trained on."""
    if tokenizer.eos_token_id is None:
        yield Finding("end_token", "error", "the tokenizer has no end token", advice="set eos_token in the tokenizer")
    for number, one in enumerate(encoded[:EXAMPLES]):
        yield Finding("example", "info", f"{number + 1}, {one.prompt.source}", examples=tuple(_shown(tokenizer, one)))
    yield from _special(tokenizer, encoded)
    yield from _prefix(tokenizer, encoded)
    yield from _lengths(recipe, encoded, on_data)


def _shown(tokenizer: Any, one: Encoded) -> Iterator[str]:
    def cut(ids: Sequence[int]) -> str:
        return "|".join(tokenizer.decode([i]).replace("\n", "⏎") for i in ids)

    yield f"prompt      {cut(one.ids)}"
    names = ("chosen", "rejected") if len(one.completions) > 1 else ("answer",)
    yield from (f"{name:<12}{cut(ids)}" for name, ids in zip(names, one.completions, strict=False))


def _special(tokenizer: Any, encoded: Sequence[Encoded]) -> Iterator[Finding]:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins = Counter(one.ids.count(begin) for one in encoded)
    ends = Counter(ids.count(end) for one in encoded for ids in one.completions)
    yield Finding(
        "special_tokens",
        "info",
        f"beginning-of-sequence tokens in a prompt: {sorted(begins)}; end tokens in a completion: "
        f"{_counts(ends) or 'no data'}",
    )
    yield from counted(
        "beginning_tokens",
        [
            f"{one.prompt.source}: {one.ids.count(begin)}"
            for one in encoded
            if begin not in (None, end) and one.ids.count(begin) > 1
        ],
        "prompts have more than one beginning-of-sequence token",
        "remove it from the text or from the chat template",
    )
    if len(begins) > 1 and begins[0]:
        yield Finding(
            "beginning_tokens_differ",
            "warning",
            f"{begins[0]} prompts have no beginning token and others have one",
            begins[0],
            advice="write all prompts in one form: text, or conversations",
        )
    special = set(tokenizer.all_special_ids)
    written = [t for t in tokenizer.all_special_tokens if t.strip()]
    yield from counted(
        "special_tokens_in_text",
        [
            f"{one.prompt.source}: {short(text)}"
            for one in encoded
            for text in (*(m.content for m in one.prompt.messages), *one.texts)
            if any(t in text for t in written)
        ],
        "texts hold the model's own special tokens, such as the end token or a role marker",
        "remove them: the model reads them as marks and not as text",
    )
    yield from counted(
        "end_tokens",
        [
            f"{one.prompt.source}: {ids.count(end)}"
            for one in encoded
            for ids in one.completions
            if end is not None and (ids.count(end) != 1 or ids[-1] != end or special & set(ids[:-1]) - {end})
        ],
        "completions have not exactly one end token, at the end",
        "remove special tokens from the texts",
    )


def _counts(counts: Counter[int]) -> str:
    return ", ".join(f"{number} in {times}" for number, times in sorted(counts.items()))


def _prefix(tokenizer: Any, encoded: Sequence[Encoded]) -> Iterator[Finding]:
    """Compare with the ids of prompt and completion tokenized as one text: the prompt's must come first."""
    checked, broken = 0, []
    for one in encoded:
        for text in one.texts[:1]:
            whole = _as_one(tokenizer, one.prompt, text)
            if whole is not None and text:
                checked += 1
                if tuple(whole[: len(one.ids)]) != one.ids:
                    broken.append(f"{one.prompt.source}: …{one.prompt.text[-20:]!r} + {text[:20]!r}")
    many = len(broken) > MERGED * checked
    text = f"{len(broken)} of {checked} prompts are no token prefix of prompt and completion as one text"
    if broken:
        yield Finding(
            "prompt_prefix",
            "warning" if many else "info",
            f"{text}: where they meet, tokens merge",
            len(broken),
            tuple(broken[:3]),
            "end prompts without a space and begin completions with it, or mend the chat template" if many else "",
        )
    else:
        yield Finding("prompt_prefix", "info", text, 0)


def _as_one(tokenizer: Any, prompt: Prompt, text: str) -> list[int] | None:
    if prompt.messages[0].role == VERBATIM:
        joined = f"{prompt.messages[0].content}{text}"
        return list(tokenizer(joined, add_special_tokens=True)["input_ids"])
    turns = [{"role": m.role, "content": m.content} for m in prompt.messages]
    turns.append({"role": "assistant", "content": text})
    try:
        ids = list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))
    except causal_lm.TEMPLATE_FAULTS:
        return None  # a template for prompts only: then there is nothing to compare with
    begin = tokenizer.bos_token_id
    return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids


def _lengths(recipe: Recipe, encoded: Sequence[Encoded], on_data: bool) -> Iterator[Finding]:
    if not encoded:
        return
    yield Finding("prompt_tokens", "info", quantiles([len(one.ids) for one in encoded]))
    lengths = [len(ids) for one in encoded for ids in one.completions]
    if lengths:
        yield Finding("completion_tokens", "info", f"of the data, end token included: {quantiles(lengths)}")
    limit = recipe.train.max_tokens
    new = int(recipe.sampler.settings().get("max_new_tokens", 256))
    if not on_data:
        yield from counted(
            "dropped_too_long",
            [f"{one.prompt.source}: {len(one.ids)} tokens" for one in encoded if len(one.ids) + new > limit],
            f"prompts leave no room for sampler.max_new_tokens={new} below train.max_tokens={limit}: their longer "
            "pairs would be dropped",
            "raise train.max_tokens, or shorten the prompts",
        )
        return
    pairs = [one for one in encoded if len(one.completions) > 1]
    longest = [(one, len(one.ids) + max(map(len, one.completions))) for one in pairs]
    reasons = Counter(
        too_long=sum(n > limit for _, n in longest),
        same_tokens=sum(one.completions[0] == one.completions[1] for one in pairs),
    )
    yield Finding(
        "drops",
        "info",
        f"of {len(pairs)} pairs looked at {reasons['too_long']} are longer than train.max_tokens={limit} and "
        f"{reasons['same_tokens']} have the same tokens on both sides; nothing is ever truncated",
        reasons.total(),
    )
    yield from counted(
        "dropped_too_long",
        [f"{one.prompt.source}: {n} tokens" for one, n in longest if n > limit],
        f"pairs are longer than train.max_tokens={limit} and would be dropped",
        "raise train.max_tokens, or shorten the data",
    )
