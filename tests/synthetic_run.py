"""Run folders and finished runs as the loop leaves them, with made-up policies and no model."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefloop.artifact import Building, Key, open_artifact, write_json
from prefloop.evaluate.compare_data import Ended, Measured, Method
from prefloop.evaluate.heldout import Findings, baseline_metrics, candidate_metrics
from prefloop.evaluate.summary import metric_json
from prefloop.rows import (
    HOLDOUT,
    TRAIN,
    VERBATIM,
    Completion,
    JudgedGroup,
    Message,
    PreferencePair,
    Prompt,
    SampleGroup,
    StepLog,
    TokenizedPair,
    digest_of,
    prompt_id,
)

ATTACK = '</p><script>alert("x")</script><img src=x onerror=alert(1)>&amp; {{ 7*7 }} javascript:\u202e"\'>'
PLAIN = "Tom had a red ball and he was {0} to play in the park with his {0} dog . They ran and ran until it was {0}"


class SyntheticRun:
    """Writes a run folder as the loop does, with made-up policies that get happier by the round."""

    def __init__(self, root: Path, text: str = PLAIN, holdout: int = 24, seed: int = 0) -> None:
        self.root = root
        self.text = text
        self.random = random.Random(seed)
        self.holdout = [self.prompt(f"Once upon a time, number {i}", HOLDOUT) for i in range(holdout)]
        self.train = [self.prompt(f"One day, number {i}", TRAIN) for i in range(12)]
        self.start: list[JudgedGroup] = []
        self.summary: dict[str, Any] = {}

    def prompt(self, text: str, split: str) -> Prompt:
        messages = (Message(VERBATIM, text),)
        return Prompt(prompt_id(messages), messages, None, split, "prompts.jsonl:1")

    def group(self, prompt: Prompt, mood: float, number: int, count: int) -> JudgedGroup:
        scores = [self.random.gauss(mood, 0.3) for _ in range(count)]
        completions = []
        for index, score in enumerate(scores):
            words = "happy" if score > 0.4 else "calm" if score > 0 else "sad"
            length = self.random.randint(20, 40)
            logps = tuple(-self.random.random() for _ in range(length))
            completions.append(
                Completion(
                    digest_of(prompt.prompt_id, number, index),
                    self.text.format(words),
                    tuple(range(length)),
                    logps,
                    "stop" if self.random.random() < 0.9 else "length",
                    index,
                    f"policy{number}",
                )
            )
        return JudgedGroup(
            prompt,
            tuple(completions),
            f"policy{number}",
            number,
            1.0,
            1.0,
            tuple(scores),
            None,
            "lexicon",
            (None,) * count,
        )

    def write(self, name: str, record: type, rows: Iterable[Any], **facts: Any) -> None:
        building = open_artifact(self.root / name, Key(name, {"made": "up"}), record)
        assert isinstance(building, Building)
        building.write_part(0, rows)
        building.finish(facts)

    def judged(self, name: str, groups: list[JudgedGroup]) -> None:
        samples = [SampleGroup(g.prompt, g.completions, g.policy, g.round, g.temperature, g.top_p) for g in groups]
        self.write(
            f"{name}/1-samples",
            SampleGroup,
            samples,
            tokens=sum(len(c.token_ids or ()) for g in groups for c in g.completions),
        )
        self.write(f"{name}/2-judged", JudgedGroup, groups, unscored=0)

    def begin(self, **changes: Any) -> None:
        self.root.mkdir(parents=True)
        (self.root / "recipe.yaml").write_text(
            "recipe: iterative_dpo  # default\nloss:\n  beta: 0.1\n", encoding="utf-8"
        )
        self.start = [self.group(p, 0.1, -1, 2) for p in self.holdout]
        self.judged("start", self.start)
        self.summary = {
            "prefloop": "0.1.0",
            "name": "demo",
            "recipe": "iterative_dpo",
            "seed": 7,
            "state": "running",
            "policy_start": {"path": "models/start", "digest": "aaaa"},
            "policy_best": {"path": "models/start", "digest": "aaaa", "round": -1},
            "judge": {"kind": "lexicon", "words": None},
            "eval_judge": {"kind": "lexicon"},
            "warnings": [],
            "start": {"metrics": _json(baseline_metrics(self.start, resamples=200)), "seconds": {"samples": 4.2}},
            "rounds": [],
            "verdict": "",
            **changes,
        }
        self.save()

    def round(self, number: int, mood: float, accepted: bool = True, steps: int = 30) -> None:
        folder = f"round-{number:03d}"
        self.write(f"{folder}/0-prompts", Prompt, self.train)
        groups = [self.group(p, mood - 0.2, number, 4) for p in self.train]
        self.judged(folder, groups)
        pairs = [self.pair(g, number) for g in groups[:-2]]
        self.write(f"{folder}/3-pairs", PreferencePair, pairs, dropped=2)
        tokenized = [TokenizedPair(p.pair_id, (1,), (2,), (3,), None, None, None, 1.0) for p in pairs]
        self.write(f"{folder}/4-batches", TokenizedPair, tokenized)
        self.write(f"{folder}/5-policy", StepLog, [self.step(i, steps) for i in range(steps)], steps=steps)
        heldout = [self.group(p, mood, number, 2) for p in self.holdout]
        self.judged(f"{folder}/6-report", heldout)
        start_logps = {
            c.completion_id: tuple(x - 0.05 * (number + 1) - self.random.gauss(0, 0.02) for x in c.sampler_logps or ())
            for g in heldout
            for c in g.completions
        }
        measured = candidate_metrics(heldout, self.start, self.start, start_logps, resamples=200)
        policy = {"path": f"{folder}/5-policy", "digest": f"bbbb{number}"}
        self.summary["rounds"].append(
            {
                "round": number,
                "accepted": accepted,
                "why": ["win_rate_vs_best 71.0 % [66.0, 75.5] excludes 50 %: better than the best so far"],
                "metrics": _json(measured),
                "facts": {"pair": {"dropped": 2}},
                "seconds": {"samples": 12.5, "judged": 0.4, "policy": 200.0},
                "tokens": {"samples": 2000, "policy": 9000},
                "policy": policy,
            }
        )
        if accepted:
            self.summary["policy_best"] = {**policy, "round": number}
        self.save()

    def pair(self, group: JudgedGroup, number: int) -> PreferencePair:
        scored = sorted(zip((s or 0.0 for s in group.scores), group.completions, strict=True), key=lambda e: e[0])
        (low, rejected), (high, chosen) = scored[0], scored[-1]
        pair_id = digest_of(chosen.completion_id, rejected.completion_id)
        return PreferencePair(
            pair_id, group.prompt, chosen, rejected, high, low, high - low, None, 1.0, "max_min", number
        )

    def step(self, index: int, steps: int) -> StepLog:
        done = index / steps
        noise = self.random.gauss(0, 0.02)
        return StepLog(
            index, done, 0.69 - 0.3 * done + noise, 0.2 * done, -0.8 * done, done + noise, 0.5 + 0.4 * done + noise,
            0.5 - 0.3 * done, -60 - 2 * done + noise, -62 - 9 * done, 1 + noise, 1e-5,
        )  # fmt: skip

    def save(self) -> None:
        write_json(self.root / "summary.json", self.summary)


def _json(held_out: Findings) -> dict[str, Any]:
    return {name: metric_json(m) for name, m in held_out.metrics.items()}


def metric_json_named(estimator: str) -> dict[str, Any]:
    return {"value": 1.0, "low": None, "high": None, "n": 3, "unit": estimator, "estimator": estimator}


def ended(prompts=range(40), shift=0.0, **changes):
    scores = {f"p{i}": (shift + (i * 7) % 11,) for i in prompts}
    metric = {"value": 0.0, "low": 0.0, "high": 1.0, "n": 40, "unit": "score", "estimator": ""}
    metrics = {"judge_score": metric, "length": metric | {"unit": "tokens"}}
    values = {
        "scores": scores,
        "start": {name: (5.0,) for name in scores},
        "judge": "lexicon",
        "sampling": "temperature 1, top-p 1",
        "start_digest": "d",
        "metrics": metrics,
        "curve": (metrics, metrics),
        "accepted": 1,
        "rounds": 1,
        **dict.fromkeys(("samples", "pairs", "updates", "tokens_sampled", "tokens_trained", "tokens_evaluated"), 100),
        "seconds": 1.0,
    }
    return Ended(**(values | changes))


def method(name, *runs, target=None, varied=None):
    return Method(name, target or name, tuple(Measured(i, name, run) for i, run in enumerate(runs)), varied or {})
