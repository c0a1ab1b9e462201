"""Completions to train on that exist before the run: one file for each seed, the same for every arm."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from prefloop.inputs import embedded_policy, embedded_prompts
from prefloop.judge.lexicon import Lexicon
from prefloop.models.causal_lm import folder_digest
from prefloop.prompts.dataset import read_prompts
from prefloop.protocols import RoundContext
from prefloop.rows import PolicyRef, Prompt, SampleGroup, digest_of
from prefloop.sample.hf import Hf

Row = dict[str, Any]
PART = 64
"""Prompts sampled together."""


def prompts_file(kind: str, seed: int, folder: Path, new_tokens: int, limit: int | None) -> str:
    """Return what `prompts.path` is set to; makes the file if it is not there."""
    path = folder / f"{kind}-{new_tokens}-{limit or 'all'}-seed-{seed}.jsonl"
    if not path.exists():
        prompts = read_prompts(str(embedded_prompts("embedded")), limit=limit).prompts
        rows = MAKERS[kind](prompts, seed, new_tokens)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        unfinished.replace(path)
    return str(path)


def _sampled(prompts: Sequence[Prompt], seed: int, sampler: Hf) -> list[SampleGroup]:
    model = embedded_policy()
    policy = PolicyRef(str(model), folder_digest(model), round=-1)
    context = RoundContext(seed, 0, policy, policy)
    parts = [prompts[start : start + PART] for start in range(0, len(prompts), PART)]
    return [group for part in parts for group in sampler(part, context)]


def rated(prompts: Sequence[Prompt], seed: int, new_tokens: int) -> Iterable[Row]:
    """Four completions of each prompt by the starting policy, rated by VADER."""
    groups = _sampled(prompts, seed, Hf(completions=4, max_new_tokens=new_tokens))
    for group, ratings in _with_vader(groups):
        yield {"prompt": group.prompt.text, "completions": [c.text for c in group.completions], "scores": ratings}


def sources(prompts: Sequence[Prompt], seed: int, new_tokens: int) -> Iterable[Row]:
    """Two sources of unlike difficulty, as in `tools/story_preferences.py`; the seed says which prompt is in which.

    `writer`: the reference continuation against an own one at temperature 1.5, which is garbled. `mood`: of four own
    ones at temperature 1 the happiest against the saddest by VADER; ties are left out.
    """
    ordered = sorted(prompts, key=lambda p: digest_of("sources", seed, p.prompt_id))
    garbled = _sampled(ordered[0::2], seed, Hf(completions=1, max_new_tokens=new_tokens, temperature=1.5))
    for group in garbled:
        yield _pair(group.prompt, group.prompt.gold or "", group.completions[0].text, "writer")
    for group, ratings in _with_vader(_sampled(ordered[1::2], seed, Hf(completions=4, max_new_tokens=new_tokens))):
        best, worst = ratings.index(max(ratings)), ratings.index(min(ratings))
        if ratings[best] > ratings[worst]:
            yield _pair(group.prompt, group.completions[best].text, group.completions[worst].text, "mood")


def _pair(prompt: Prompt, chosen: str, rejected: str, source: str) -> Row:
    return {"prompt": prompt.text, "chosen": chosen, "rejected": rejected, "source": source}


def _with_vader(groups: Sequence[SampleGroup]) -> Iterable[tuple[SampleGroup, list[float]]]:
    nobody = PolicyRef("", "", round=-1)
    verdicts = Lexicon()(groups, RoundContext(0, 0, nobody, nobody))
    for group, found in zip(groups, verdicts, strict=True):
        yield group, [score for score in found.scores if score is not None]


MAKERS: dict[str, Callable[[Sequence[Prompt], int, int], Iterable[Row]]] = {"rated": rated, "sources": sources}
