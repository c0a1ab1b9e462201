"""Reference continuations of the story openings: what a better writer than the shipped model would have written.

    python tools/story_gold.py --teacher DIR src/prefloop/assets/story_prompts.jsonl

Rewrites the file with a field `gold`: a continuation by stories260K at temperature 0.7, whole sentences only.
Methods that learn from human answers (SPIN, DNPO) need such a field; on the embedded model this is it.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from story_sampling import LlamaSampler, generate

STORY_END = 1  # stories260K delimits stories with BOS
MAX_NEW = 150  # of the teacher's tokens, about 60 words
TEMPERATURE = 0.7
SEED = 20261121
BATCH = 100
TRIES = 8
_SENTENCES = re.compile(r"^.*[.!?][\"”]?(?=\s|$)", re.DOTALL)


def gold_continuations(prompts: list[str], teacher: str) -> list[str]:
    """Return one continuation of each prompt, cut after its last whole sentence.

    Raises ValueError if one prompt gets no whole sentence in `TRIES` draws.
    """
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    sampler = LlamaSampler(model)
    found: dict[str, str] = {}
    for attempt in range(TRIES):
        waiting = [prompt for prompt in prompts if prompt not in found]
        for start in range(0, len(waiting), BATCH):
            part = waiting[start : start + BATCH]
            ids = tokenizer(part)["input_ids"]
            new = generate(
                sampler,
                ids,
                stop_id=STORY_END,
                max_new=MAX_NEW,
                temperature=TEMPERATURE,
                seed=SEED + 1000 * attempt + start,
            )
            for prompt, before, after in zip(part, ids, new, strict=True):
                whole = tokenizer.decode(before + after, skip_special_tokens=True)
                if whole.startswith(prompt) and (match := _SENTENCES.match(whole[len(prompt) :])):
                    found[prompt] = match.group().rstrip()
    missing = [prompt for prompt in prompts if prompt not in found]
    if missing:
        raise ValueError(f"story_gold: no whole sentence after {missing[0]!r}; raise MAX_NEW or TRIES")
    return [found[prompt] for prompt in prompts]


def main() -> None:
    """Add the field `gold` to a prompt file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="stories260K as a save_pretrained folder")
    parser.add_argument("file", type=Path, help="JSONL with a field prompt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = [json.loads(line)["prompt"] for line in args.file.read_text(encoding="utf-8").splitlines()]
    gold = gold_continuations(prompts, args.teacher)
    rows = [json.dumps({"prompt": p, "gold": g}) + "\n" for p, g in zip(prompts, gold, strict=True)]
    args.file.write_text("".join(rows), encoding="utf-8")
    print(f"{len(rows)} continuations, {sum(len(g.split()) for g in gold) / len(gold):.0f} words on average")


if __name__ == "__main__":
    main()
