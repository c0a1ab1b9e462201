"""Sample a corpus of whole stories from the teacher, in shards that can be resumed."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from story_openings import random_opening
from story_sampling import LlamaSampler, generate

BATCH = 64  # rows a batch: measured fastest on one thread, the cache stays near the L2
RARE = 10  # a word in fewer stories is most often one the teacher made up
_PLAIN = re.compile(r"[\x20-\x7e\n]+")


@dataclass(frozen=True)
class CorpusSettings:
    """What decides the text of a corpus.

    teacher: folder of a Llama checkpoint whose stories start and end with BOS.
    temperature: of the draws; below 1 gives cleaner text than the teacher's own.
    shards, shard_stories: number of files, and of stories drawn for each.
    free_shards: files drawn from BOS alone; in the others each story starts with a filled
    template of `story_openings.py`, for more names, animals and moods than the teacher's
    favourites (without it two thirds of the stories are about Lily or Timmy).
    seed: shard `i` uses batch seeds `seed + 10_000 * i + batch`.
    """

    teacher: str
    temperature: float = 0.7
    shards: int = 39
    free_shards: int = 25
    shard_stories: int = 2048
    seed: int = 20_000_000


def clean_story(text: str) -> str | None:
    """The story with tidy white space, or None where it is too short or not plain ASCII."""
    text = "\n".join(" ".join(line.split()) for line in text.strip().split("\n") if line.strip())
    if len(text) < 120 or not _PLAIN.fullmatch(text) or text[-1] not in ".!?\"'":
        return None
    return text


def words_of(text: str) -> list[str]:
    """The words of `text` in lower case, inner apostrophes kept."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def drop_rare_words(stories: list[str], least: int = RARE) -> list[str]:
    """The stories all of whose words occur in at least `least` stories."""
    counts = Counter(word for story in stories for word in set(words_of(story)))
    return [story for story in stories if all(counts[w] >= least for w in words_of(story))]


def load_teacher(folder: str) -> tuple[LlamaSampler, AutoTokenizer]:
    """The teacher as a sampler, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return LlamaSampler(model), AutoTokenizer.from_pretrained(folder)


def _write_shard(settings: CorpusSettings, index: int, path: Path) -> int:
    torch.set_num_threads(1)  # two threads spin on matrices this small
    sampler, tokenizer = load_teacher(settings.teacher)
    bos = tokenizer.bos_token_id
    stories = []
    for batch in range(settings.shard_stories // BATCH):
        seed = settings.seed + 10_000 * index + batch
        rng, opened = random.Random(seed), index >= settings.free_shards
        heads = [random_opening(rng) if opened else "" for _ in range(BATCH)]
        prompts = [[bos, *ids] for ids in tokenizer(heads, add_special_tokens=False)["input_ids"]]
        rows = generate(
            sampler,
            prompts,
            stop_id=bos,
            max_new=sampler.max_positions,
            temperature=settings.temperature,
            seed=seed,
        )
        # A row without BOS was cut by the context: it has no ending to learn from.
        ended = [head[1:] + row[:-1] for head, row in zip(prompts, rows, strict=True) if row[-1] == bos]
        stories += [s for s in map(clean_story, tokenizer.batch_decode(ended)) if s]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps({"text": s}) + "\n" for s in stories), encoding="utf-8")
    part.replace(path)
    return len(stories)


def sample_corpus(settings: CorpusSettings, folder: Path, workers: int) -> list[Path]:
    """Write the missing shards `00000.jsonl`, ... under `folder`; return all paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:05d}.jsonl" for i in range(settings.shards)]
    missing = [(i, path) for i, path in enumerate(paths) if not path.exists()]
    with ProcessPoolExecutor(workers) as pool:
        jobs = {pool.submit(_write_shard, settings, i, path): path for i, path in missing}
        for job in as_completed(jobs):
            print(f"sampled {jobs[job].name}: {job.result()} stories", flush=True)
    return paths


def read_stories(paths: list[Path]) -> list[str]:
    """The texts of JSONL files, in order, exact repeats dropped."""
    lines = (line for path in paths for line in path.read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(json.loads(line)["text"] for line in lines))
