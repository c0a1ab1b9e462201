"""Make the sums model and the sums prompts that ship with the package: a world in which every step can be checked.

    python tools/make_sums_assets.py src/prefloop/assets

Nothing is read. Questions come from a seed, their gold solutions from `prefloop.judge.sums`. The model is trained from
scratch on other questions than those that ship, answered by a careless writer (`sums_problems.py`), so that it solves
about half of them. Takes about two minutes on one CPU core. The same machine and torch version give the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from transformers import GenerationConfig

from prefloop.judge.sums import Sums, first_wrong_step, solution, steps
from prefloop.models.causal_lm import export, folder_digest
from prefloop.prompts.dataset import read_prompts
from prefloop.protocols import RoundContext
from prefloop.rows import PolicyRef, SampleGroup
from prefloop.sample.hf import Hf
from sums_model import BOS_ID, EOS_ID, PAD_ID, SumsSettings, make_tokenizer, train_model
from sums_problems import questions

PROMPTS, PROMPT_SEED = 1500, 20261121
SAMPLES, MAX_NEW = 8, 80
SKILL = (0.35, 0.60)
CARD = Path(__file__).with_name("sums_model_card.md")


def write_prompts(path: Path) -> frozenset[str]:
    """Write the questions with their solutions and answers; returns the questions."""
    asked = list(islice(questions(PROMPT_SEED), PROMPTS))
    rows = []
    for question in asked:
        gold = solution(question) or ""
        rows.append({"prompt": question, "gold": gold, "answer": gold.rpartition(": ")[2]})
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
    return frozenset(asked)


def sample(model: Path, prompts: Path, temperature: float, completions: int) -> list[SampleGroup]:
    """Completions of every shipped prompt."""
    policy = PolicyRef(str(model), folder_digest(model), round=-1)
    sampler = Hf(completions=completions, max_new_tokens=MAX_NEW, temperature=temperature)
    return sampler(read_prompts(str(prompts)).prompts, RoundContext(0, 0, policy, policy))


def measure(model: Path, prompts: Path) -> dict[str, float]:
    """Accuracy on the shipped prompts, and where sampled solutions go wrong, as shares of 1."""
    greedy = scores(sample(model, prompts, 0.0, 1))
    groups = sample(model, prompts, 1.0, SAMPLES)
    drawn = scores(groups)
    slips = [slip for g in groups for c in g.completions if (slip := first_slip(g.prompt.text, c.text))]
    places, kinds = (Counter(part) for part in zip(*slips, strict=True))
    return {
        "greedy": sum(map(sum, greedy)) / len(greedy),
        "sampled": sum(map(sum, drawn)) / (SAMPLES * len(drawn)),
        "mixed": sum(0 < sum(row) < SAMPLES for row in drawn) / len(drawn),
        **{f"wrong_{step}": places[step] / len(slips) for step in (1, 2, 3)},
        "wrong_later": sum(count for step, count in places.items() if step > 3) / len(slips),
        **{kind: kinds[kind] / len(slips) for kind in ("off_by_ten", "off_by_one", "other")},
    }


def first_slip(question: str, text: str) -> tuple[int, str] | None:
    """The number of the first wrong line and what is wrong there, or None for a right solution."""
    number = first_wrong_step(question, text)
    if number is None:
        return None
    wanted = [*(solution(question) or "").split("\n"), ""][number - 1]
    given = [*steps(text), ""][number - 1].strip()
    (left, _, right), (asked, _, result) = wanted.rpartition("="), given.rpartition("=")
    if left and left == asked and result.isascii() and result.isdigit():
        return number, {10: "off_by_ten", 1: "off_by_one"}.get(abs(int(result) - int(right)), "other")
    return number, "other"


def scores(groups: list[SampleGroup]) -> list[list[float]]:
    """1 or 0 for each completion of each prompt."""
    context = RoundContext(0, 0, PolicyRef("", "", -1), PolicyRef("", "", -1))
    return [[score or 0.0 for score in verdict.scores] for verdict in Sums()(groups, context)]


def main() -> None:
    """Write the prompts, train the model, measure it and write it with its card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path, help="folder the assets are written to")
    parser.add_argument("--steps", type=int, default=SumsSettings.steps, help="optimizer steps: more, better at sums")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = SumsSettings(steps=args.steps)
    prompts, target = args.assets / "sums_prompts.jsonl", args.assets / "sums_model"
    fresh = args.assets / ".sums_model.part"
    shipped = write_prompts(prompts)
    tokenizer = make_tokenizer()
    model, figures = train_model(settings, shipped, tokenizer)
    generation = GenerationConfig(
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        do_sample=True,
        temperature=1.0,
        top_k=0,  # transformers keeps only the best 50 tokens otherwise
    )
    shutil.rmtree(fresh, ignore_errors=True)
    export(model, tokenizer, fresh, "", generation)
    facts = {
        **asdict(settings),
        **figures,
        **measure(fresh, prompts),
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "prompts": PROMPTS,
        "problems": settings.steps * settings.batch,
    }
    (fresh / "README.md").write_text(CARD.read_text(encoding="utf-8").format(**facts), encoding="utf-8")
    for path in fresh.iterdir():
        path.chmod(0o644)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)
    print(json.dumps(facts, indent=2))
    if not SKILL[0] <= facts["greedy"] <= SKILL[1]:
        raise SystemExit(f"greedy accuracy {facts['greedy']:.3f} is not in {SKILL}; change --steps")


if __name__ == "__main__":
    main()
