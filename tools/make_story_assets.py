"""Make the story model and the story prompts that ship with the package.

    python tools/make_story_assets.py --teacher DIR --out src/prefloop/assets

DIR is a `save_pretrained` folder of stories260K. Steps: sample a corpus from it, train a
byte-level BPE tokenizer and a small Llama on the corpus, measure them, write the assets.
Each step keeps its result under `--work` and is skipped when it is already there; an
interrupted training resumes from its last checkpoint. Settings that differ from those
which made the work folder are refused. Takes about an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from score_story_text import score_texts
from story_corpus import CorpusSettings, drop_rare_words, read_stories, sample_corpus
from story_gold import gold_continuations
from story_model import (
    BOS_ID,
    CONTEXT,
    EOS_ID,
    PAD_ID,
    TrainSettings,
    pack_stories,
    train_model,
    train_tokenizer,
)
from story_prompts import PromptSettings, build_prompts
from story_sampling import LlamaSampler, generate

HELD_OUT = 500  # stories kept from training, the first of the corpus
BAR_SAMPLES, BAR_TOKENS, BAR_SEED = 256, 120, 1
BAR_NATS = 1.7
CARD = Path(__file__).with_name("story_model_card.md")


@dataclass(frozen=True)
class Quality:
    """Loss of the model's text under the teacher, in nats per teacher token.

    samples: from BOS, temperature 1, 120 new tokens. continuations: of the shipped
    prompts, the same way, prompt tokens not counted. with_prompts: the same texts, all
    tokens counted. ended: part of whole stories (up to 512 tokens) that stop on EOS.
    mean_story_tokens: their mean length in the model's own tokens.
    """

    samples: float
    continuations: float
    with_prompts: float
    ended: float
    mean_story_tokens: float


def _once(path: Path, make: Callable[[Path], None]) -> Path:
    """Run `make` on a temporary path and rename it, unless `path` exists."""
    if not path.exists():
        part = path.with_name(path.name + ".part")
        if part.is_dir():
            shutil.rmtree(part)
        make(part)
        part.replace(path)
    return path


def _check_settings(work: Path, name: str, settings: dict) -> None:
    """Refuse to mix results of other settings into `work`."""
    path = work / f"{name}.settings.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise SystemExit(f"{path} holds other settings: delete its results, or use a new --work")
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _sample_texts(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    max_new: int,
) -> tuple[list[str], list[list[int]]]:
    """Continuations at temperature 1 (special tokens dropped), and their token ids."""
    new = []
    ids = tokenizer(prompts)["input_ids"]
    for start in range(0, len(ids), 128):
        new += generate(
            LlamaSampler(model),
            ids[start : start + 128],
            stop_id=EOS_ID,
            max_new=max_new,
            temperature=1.0,
            seed=BAR_SEED + start,
        )
    return tokenizer.batch_decode(new, skip_special_tokens=True), new


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    teacher: str,
    work: Path,
) -> Quality:
    """The figures of `Quality`; leaves the texts under `work` for `score_story_text.py`."""
    model = model.eval()
    free, _ = _sample_texts(model, tokenizer, [""] * BAR_SAMPLES, BAR_TOKENS)
    rest, _ = _sample_texts(model, tokenizer, prompts, BAR_TOKENS)
    joined = [prompt + text for prompt, text in zip(prompts, rest, strict=True)]
    _, whole = _sample_texts(model, tokenizer, [""] * BAR_SAMPLES, CONTEXT)
    _write_jsonl(work / "samples.jsonl", [{"text": text} for text in free])
    pairs = zip(prompts, joined, strict=True)
    _write_jsonl(work / "continuations.jsonl", [{"prompt": p, "text": t} for p, t in pairs])
    return Quality(
        samples=score_texts(free, teacher).nats,
        continuations=score_texts(joined, teacher, prompts).nats,
        with_prompts=score_texts(joined, teacher).nats,
        ended=sum(row[-1] == EOS_ID for row in whole) / len(whole),
        mean_story_tokens=sum(map(len, whole)) / len(whole),
    )


def write_assets(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, str]],
    card: str,
    out: Path,
) -> None:
    """Write the model folder and the prompt rows under `out`, one file swapped in at a time."""
    fresh = out / ".story_model.part"
    shutil.rmtree(fresh, ignore_errors=True)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        do_sample=True,
        temperature=1.0,
        top_k=0,  # transformers keeps only the best 50 tokens otherwise
    )
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh, save_jinja_files=False)
    for path in fresh.iterdir():
        path.chmod(0o644)
    (fresh / "README.md").write_text(card, encoding="utf-8")
    target = out / "story_model"
    target.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in fresh.iterdir()}
    for path in fresh.iterdir():
        os.replace(path, target / path.name)
    for path in target.iterdir():
        if path.name not in names:
            path.unlink()
    fresh.rmdir()
    part = out / ".story_prompts.part"
    _write_jsonl(part, rows)
    part.replace(out / "story_prompts.jsonl")


def _parse() -> argparse.Namespace:
    corpus, train = CorpusSettings(""), TrainSettings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--teacher", required=True, help="stories260K as a save_pretrained folder")
    add("--out", type=Path, required=True, help="folder the assets are written to")
    add("--work", type=Path, default=Path("build/story"), help="intermediate results")
    add("--shards", type=int, default=corpus.shards, help="corpus files of 2048 draws each")
    add("--temperature", type=float, default=corpus.temperature, help="of the teacher's draws")
    add("--vocab", type=int, default=1536, help="tokenizer size, special tokens included")
    add("--tokens", type=int, default=train.tokens, help="training tokens")
    add("--lr", type=float, default=train.lr, help="peak learning rate")
    add("--workers", type=int, default=2, help="sampling processes, one thread each")
    add("--threads", type=int, default=1, help="torch threads of training and measuring")
    return parser.parse_args()


def main() -> None:
    """Run the steps that are still missing and write the assets."""
    args = _parse()
    torch.set_num_threads(args.threads)
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    corpus = CorpusSettings(args.teacher, temperature=args.temperature, shards=args.shards)
    train = TrainSettings(tokens=args.tokens, lr=args.lr)
    chosen = PromptSettings()
    of_corpus = {k: v for k, v in asdict(corpus).items() if k != "teacher"}
    _check_settings(work, "corpus", of_corpus)
    stories = drop_rare_words(read_stories(sample_corpus(corpus, work / "corpus", args.workers)))
    held, stories = stories[:HELD_OUT], stories[HELD_OUT:]
    _check_settings(work, "train", {**of_corpus, **asdict(train), "vocab": args.vocab})
    folder = _once(work / "tokenizer", lambda path: train_tokenizer(stories, args.vocab).save_pretrained(path))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    packed = pack_stories(stories, tokenizer, train.seed)
    model, figures = train_model(packed, pack_stories(held, tokenizer, 0), len(tokenizer), train, work / "train")
    _check_settings(work, "prompts", {**of_corpus, **asdict(chosen)})
    found = _once(
        work / "prompts.jsonl",
        lambda path: _write_jsonl(path, [{"prompt": p} for p in build_prompts(args.teacher, stories, chosen)]),
    ).read_text(encoding="utf-8")
    prompts = [json.loads(line)["prompt"] for line in found.splitlines()]
    quality = measure(model, tokenizer, prompts, args.teacher, work)
    facts = {
        **asdict(quality),
        **figures,
        **asdict(train),
        "temperature": args.temperature,
        "parameters": model.num_parameters(),
        "vocab": len(tokenizer),
        "stories": len(stories),
        "characters": sum(map(len, stories)),
        "corpus_tokens": int((packed != PAD_ID).sum()),
        "minutes": figures["seconds"] / 60,
    }
    (work / "figures.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    card = CARD.read_text(encoding="utf-8").format(**facts)
    gold = gold_continuations(prompts, args.teacher)
    rows = [{"prompt": p, "gold": g} for p, g in zip(prompts, gold, strict=True)]
    write_assets(model, tokenizer, rows, card, args.out)
    print(json.dumps(facts, indent=2))
    if quality.samples > BAR_NATS:
        raise SystemExit(f"samples score {quality.samples:.3f} nats per token, bar {BAR_NATS}")


if __name__ == "__main__":
    main()
