"""Preference data for the story model, of two sources that differ in difficulty, for methods that read existing pairs.

    python tools/story_preferences.py src/prefloop/assets

Reads story_prompts.jsonl and story_model of that folder and writes story_preferences.jsonl with the columns prompt,
chosen, rejected and source:

- `writer` (even lines): the reference continuation against the story model's own at temperature 1.5, which is garbled;
- `mood` (odd lines): of four samples at temperature 1 the one with the happiest words against the saddest.
"""

import argparse
import json
from pathlib import Path

import torch

from prefloop.judge.lexicon import Lexicon
from prefloop.models.causal_lm import folder_digest
from prefloop.prompts.dataset import read_prompts
from prefloop.protocols import RoundContext
from prefloop.rows import PolicyRef, Prompt
from prefloop.sample.hf import Hf

MAX_NEW = 60
SEED = 20261121


def writer_rows(prompts: list[Prompt], context: RoundContext) -> list[dict[str, str]]:
    """The reference continuation against a garbled one."""
    groups = Hf(completions=1, max_new_tokens=MAX_NEW, temperature=1.5)(prompts, context)
    return [_row(g.prompt, g.prompt.gold or "", g.completions[0].text, "writer") for g in groups]


def mood_rows(prompts: list[Prompt], context: RoundContext) -> list[dict[str, str]]:
    """The happiest of four samples against the saddest; prompts whose samples tie are left out."""
    groups = Hf(completions=4, max_new_tokens=MAX_NEW, temperature=1.0)(prompts, context)
    rows = []
    for group, verdict in zip(groups, Lexicon()(groups, context), strict=True):
        ranked = sorted(zip(verdict.scores, group.completions, strict=True), key=lambda item: item[0])
        if ranked[0][0] < ranked[-1][0]:
            rows.append(_row(group.prompt, ranked[-1][1].text, ranked[0][1].text, "mood"))
    return rows


def _row(prompt: Prompt, chosen: str, rejected: str, source: str) -> dict[str, str]:
    return {"prompt": prompt.text, "chosen": chosen, "rejected": rejected, "source": source}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path, help="folder of story_model and story_prompts.jsonl")
    assets = parser.parse_args().assets
    torch.set_num_threads(1)
    prompts = list(read_prompts(str(assets / "story_prompts.jsonl")).prompts)
    model = assets / "story_model"
    policy = PolicyRef(str(model), folder_digest(model), round=-1)
    context = RoundContext(SEED, 0, policy, policy)
    rows = writer_rows(prompts[0::2], context) + mood_rows(prompts[1::2], context)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (assets / "story_preferences.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(rows)} pairs")


if __name__ == "__main__":
    main()
