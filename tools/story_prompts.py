"""Build the story openings that ship with the model, most of them from templates.

A drawn opening is the start of a fresh teacher sample, cut after a word. A template
opening is a sentence of `story_openings.py` with its blanks filled. Both kinds are kept only
where every word is common in the corpus and the teacher finds the line likely, and no two
share their first 40 characters. Each pool is split by mood, with a short word list, so
that sad, neutral and happy situations are equally frequent.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from score_story_text import score_texts
from story_corpus import load_teacher, words_of
from story_openings import MOODS, TEMPLATES, fill
from story_sampling import generate

SAD_TEXT = """
sad cry cried crying lost scared afraid hurt angry mad broke broken alone lonely sick hungry
worried fell mean upset dark storm dangerous bad stuck
"""
HAPPY_TEXT = """
happy smile smiled laughed fun excited best sunny birthday loved love beautiful hugged proud
shiny pretty kind nice friends special yummy joyful
"""
SAD_WORDS, HAPPY_WORDS = frozenset(SAD_TEXT.split()), frozenset(HAPPY_TEXT.split())
UNFINISHED = ("a", "an", "the", "of")  # bad last words


@dataclass(frozen=True)
class PromptSettings:
    """How many openings, and what is good enough.

    from_templates, drawn: openings of each kind, multiples of 3. draws: teacher samples cut
    into drawn openings. temperature: of those. min_word: times a word must occur in the
    corpus. template_nats, drawn_nats: highest loss of an opening under the teacher, in nats
    per teacher token; the teacher's own text scores lower.
    """

    from_templates: int = 540
    drawn: int = 60
    draws: int = 24576
    temperature: float = 0.7
    min_word: int = 100
    template_nats: float = 2.4
    drawn_nats: float = 1.0
    seed: int = 99_000_000


def mood(text: str) -> str:
    """`sad`, `happy` or `neutral`, by which word list the text meets more often."""
    words = words_of(text)
    sad, happy = (sum(w in group for w in words) for group in (SAD_WORDS, HAPPY_WORDS))
    return "neutral" if sad == happy else "sad" if sad > happy else "happy"


def template_openings(rng: random.Random, each: int) -> dict[str, list[str]]:
    """`each` fillings of every template, by mood; templates take turns."""
    return {
        name: [fill(template, rng) for _ in range(each) for template in templates]
        for name, templates in TEMPLATES.items()
    }


def drawn_openings(teacher: str, settings: PromptSettings, rng: random.Random) -> dict:
    """Openings cut from fresh teacher samples, by mood; half end with a sentence."""
    sampler, tokenizer = load_teacher(teacher)
    pools: dict[str, list[str]] = {name: [] for name in MOODS}
    for start in range(0, settings.draws, 256):
        rows = generate(
            sampler,
            [[tokenizer.bos_token_id]] * 256,
            stop_id=tokenizer.bos_token_id,
            max_new=64,
            temperature=settings.temperature,
            seed=settings.seed + start,
        )
        for text in tokenizer.batch_decode(rows, skip_special_tokens=True):
            words = text.split("\n")[0].split()[:-1]  # the last word may be cut
            ends = [n for n in range(8, min(25, len(words)) + 1) if words[n - 1][-1] in ".!?"]
            if rng.random() < 0.5 and len(words) > 10:
                ends = [rng.randint(10, min(22, len(words)))]
            if ends:
                opening = " ".join(words[: ends[0]])
                pools[mood(opening)].append(opening)
    return pools


def _passes(opening: str, common: set[str]) -> bool:
    words = opening.split()
    return (
        6 <= len(words) <= 25
        and opening[-1] not in ",;:-"
        and (opening[0].isupper() or opening[0] == '"')
        and not any(a == b for a, b in pairwise(words))
        and all(w in common for w in words_of(opening))
        and words[-1] not in UNFINISHED
    )


def build_prompts(teacher: str, stories: list[str], settings: PromptSettings) -> list[str]:
    """The openings, in random order; raises ValueError where a pool is too small."""
    rng = random.Random(settings.seed)
    counts = Counter(w for story in stories for w in words_of(story))
    common = {w for w, n in counts.items() if n >= settings.min_word}
    chosen: dict[str, str] = {}
    sources = (
        (template_openings(rng, each=16), settings.from_templates, settings.template_nats),
        (drawn_openings(teacher, settings, rng), settings.drawn, settings.drawn_nats),
    )
    for pools, wanted, max_nats in sources:
        for name, pool in pools.items():
            kept = [text for text in pool if _passes(text, common)]
            losses = score_texts(kept, teacher).per_text
            target = len(chosen) + wanted // len(MOODS)
            for text, nats in zip(kept, losses, strict=True):
                if nats <= max_nats and len(chosen) < target:
                    chosen.setdefault(text[:40], text)
            if len(chosen) < target:
                raise ValueError(
                    f"story_prompts: {target - len(chosen)} {name} openings too few: raise draws or the limits of nats"
                )
    prompts = list(chosen.values())
    rng.shuffle(prompts)
    return prompts
