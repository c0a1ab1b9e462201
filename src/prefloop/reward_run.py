"""The rounds of a run with `trains: reward_model`: pairs become a sequence classifier, measured on held-out pairs.

The same folders as in other runs, with what differs:

    held-out/1-samples, 2-judged, 3-pairs   held-out pairs, made as the training pairs are
    start/1-samples, 2-judged               the policy's own completions, scored by `eval_judge`, if several each
    round-000/0-prompts … 4-batches         as ever; 4-batches holds prompt and completion as a reward model reads them
    round-000/5-policy                      the reward model, an ordinary `save_pretrained` folder
    round-000/6-report                      its rewards of held-out pairs and of the policy's completions, the decision
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from prefloop import ahead, evidence, ledger, stages
from prefloop.artifact import Artifact, Building, Key, load_artifact
from prefloop.components import build_parts, key_of
from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.reward_accuracy import best_of_n, longer_wins, pair_metrics
from prefloop.evaluate.reward_table import decide, reward_verdict
from prefloop.evaluate.summary import metric_json
from prefloop.judge.reward_model import RewardModel
from prefloop.models import adapters, causal_lm
from prefloop.models.pieces import export_pieces
from prefloop.models.reward_head import add_lora, exchange_ids, load_reward_model
from prefloop.models.training import checkpoint_activations, compile_layers
from prefloop.prompts.store import MadePrompts
from prefloop.protocols import Allotment, RoundContext, one_sided
from prefloop.recipe import Recipe, for_round
from prefloop.rows import JudgedGroup, PolicyRef, PreferencePair, Prompt, SampleGroup, StepLog, TokenizedPair
from prefloop.stages import PAIRS_PER_PART, Run, batched
from prefloop.train.job import Job
from prefloop.train.opening import open_reward_model
from prefloop.train.sharding import gather, shard
from prefloop.train.states import STATES
from prefloop.train.store import PairStore

TRAINS = "reward_model"
"""Value of the recipe's `trains` that chooses this."""
EVALUATION_ROUND, HELD_OUT_PAIRS = -1, -2
"""Rounds whose random streams draw the policy's completions, and those of held-out pairs."""
_WITHOUT_EFFECT = ("checkpoint_every", "log_every", "reference_cache", "remedy", "sharding", "layout", "waive_state")
_UNUSED = ("loss", "reference", "samples_from", "round_exit", "combine", "corrector", "locator")
"""Parts of a recipe that a reward model has no use for."""


@dataclass
class Recorder(ledger.Recorder):
    """Writes `summary.json`, with the verdict on a reward model."""

    def save(self, state: str) -> None:
        """Write `summary.json`, if anything new was made; `state` is running, done or failed."""
        self.summary |= {"trains": TRAINS, "state": state}
        self.summary["verdict"] = reward_verdict(self.summary)
        self.write()


@dataclass
class Standing:
    """`policy` is what the run started from, `current` the last accepted reward model, `best` that of best accuracy."""

    policy: PolicyRef
    pairs: Artifact[PreferencePair]
    pair_samples: Artifact[SampleGroup]
    samples: Artifact[SampleGroup] | None
    judged: Artifact[JudgedGroup] | None
    current: PolicyRef
    best: PolicyRef
    accuracy: float = 0.0
    trained: list[Artifact[PreferencePair]] = field(default_factory=list)


def check(recipe: Recipe) -> None:
    """Refuse settings that have no effect on a reward model, and pairs that it cannot learn from.

    Raises:
        ConfigError: names the field and what to change.

    """
    if recipe.trainer.kind != TRAINS:
        raise ConfigError(
            f"trainer.kind: {recipe.trainer.kind} trains a policy; with trains=reward_model it must be reward_model"
        )
    default = Recipe()
    for name in _UNUSED:
        if getattr(recipe, name) != getattr(default, name):
            raise ConfigError(f"{name}: has no effect with trains=reward_model; leave it out")
    if recipe.gate.kind == default.gate.kind and recipe.gate.settings():
        raise ConfigError(
            "gate: its settings are about policies and have no effect with trains=reward_model; leave out"
        )
    parts = build_parts(recipe)
    if parts.order.needs_margins:
        raise ConfigError(f"order.kind: {recipe.order.kind} goes by a policy's margins; use shuffled")
    if one_sided(parts.pair_builder):
        raise ConfigError(
            f"pair_builder.kind: {recipe.pair_builder.kind} makes completions without a rival, and a reward model "
            "compares two; choose ranked"
        )


def kept(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run without those that a reward model has no use for."""
    return {name: value for name, value in settings.items() if name not in _UNUSED}


def rounds(
    here: Run,
    policy: PolicyRef,
    prompts: Sequence[Prompt],
    holdout: list[Prompt],
    summary: dict[str, Any],
    save: Callable[[str], None],
) -> None:
    """Train and measure a reward model in each round, and tell `summary`; `save` is called after each."""
    standing = _measure_start(here, policy, holdout, summary)
    for number in range(here.recipe.rounds):
        recipe = for_round(here.recipe, number)
        _round(replace(here, recipe=recipe, parts=build_parts(recipe)), number, prompts, standing, summary)
        here.watch.round(summary["rounds"][-1])
        save("running")


def _context(here: Run, number: int, policy: PolicyRef) -> RoundContext:
    return RoundContext(here.recipe.seed, number, policy, policy, scratch=str(here.root / "judge-store"))


def _measure_start(here: Run, policy: PolicyRef, holdout: list[Prompt], summary: dict[str, Any]) -> Standing:
    """Make the held-out pairs, and sample and judge the policy's completions where a choice among them is measured."""
    drawn, _, pairs = _pairs(here, here.root / "held-out", holdout, _context(here, HELD_OUT_PAIRS, policy))
    standing = Standing(policy, pairs, drawn, None, None, policy, policy)
    recipe = here.recipe
    if recipe.evaluate.completions > 1:
        folder, context = here.root / "start", _context(here, EVALUATION_ROUND, policy)
        spec, judge = recipe.eval_sampler or recipe.sampler, recipe.eval_judge or recipe.judge
        assert judge is not None  # build_parts has refused a recipe without one
        draw = stages.Draw(here.parts.eval_sampler, key_of(here.parts.eval_sampler, spec.kind))
        named = stages.NamedJudge(here.parts.eval_judge, judge.kind)
        samples, judged = ahead.sampled_and_judged(here, folder, holdout, draw, named, context)
        standing.samples, standing.judged = samples, judged
        summary["start"] = evidence.start_facts(here, samples, judged)
    return standing


def _pairs(
    here: Run, folder: Path, prompts: Sequence[Prompt], context: RoundContext
) -> tuple[Artifact[SampleGroup], Artifact[JudgedGroup], Artifact[PreferencePair]]:
    """1-samples to 3-pairs, for training as for measuring."""
    recipe, parts = here.recipe, here.parts
    assert recipe.judge is not None  # build_parts has refused a recipe without one
    draw = stages.Draw(parts.sampler, key_of(parts.sampler, recipe.sampler.kind))
    judge = stages.NamedJudge(parts.judge, recipe.judge.kind, with_gold=parts.pair_builder.needs_gold)
    samples, judged = ahead.sampled_and_judged(here, folder, prompts, draw, judge, context)
    return samples, judged, stages.pair(here, folder / "3-pairs", judged, context)


def _round(here: Run, number: int, prompts: Sequence[Prompt], standing: Standing, summary: dict[str, Any]) -> None:
    """Pairs of the round, a reward model trained on them, and what it is worth."""
    recipe, folder = here.recipe, here.root / f"round-{number:03d}"
    start = {"initial": standing.policy, "previous": standing.current, "best": standing.best}[recipe.start_from]
    ask = Allotment(number, recipe.rounds, recipe.prompts_per_round, recipe.seed, {})
    asked = stages.take_prompts(here, folder / "0-prompts", prompts, ask)
    samples, judged, pairs = _pairs(here, folder, MadePrompts(asked), _context(here, number, standing.policy))
    replayed = standing.trained[max(0, number - recipe.replay) :]
    batches = _batch(here, folder / "4-batches", [*replayed, pairs], start)
    model = _update(here, folder / "5-policy", batches, start, number)
    longer = longer_wins(pairs)
    decision = _decide(here, folder / "6-report", model, standing, longer)

    standing.trained.append(pairs)
    facts = decision.facts
    if facts["accepted"]:
        standing.current = model
        if facts["metrics"]["accuracy"]["value"] > standing.accuracy:
            standing.best, standing.accuracy = model, facts["metrics"]["accuracy"]["value"]
            ledger.set_best(summary, model, here.root)
    done: dict[str, Artifact[Any]] = {"samples": samples, "judged": judged, "pairs": pairs, "batches": batches}
    trained = load_artifact(folder / "5-policy", StepLog)
    assert trained is not None  # _update has just returned it
    ledger.add_round(summary, number, done | {"policy": trained}, decision, model)
    here.progress.say(f"round {number}: {'accepted' if facts['accepted'] else 'refused'}: {facts['why'][0]}")


def _batch(
    here: Run, path: Path, pairs: Sequence[Artifact[PreferencePair]], start: PolicyRef
) -> Artifact[TokenizedPair]:
    """4-batches: both texts of each pair as token ids; pairs beyond `train.max_tokens` are left out and counted."""
    limit = here.recipe.train.max_tokens
    inputs = {f"pairs-{i}": p.digest for i, p in enumerate(pairs)} | {"tokenizer": start.digest}
    opened = here.open(path, Key("reward-batches", {"max_tokens": limit}, inputs), TokenizedPair)
    if isinstance(opened, Artifact):
        return opened
    tokenizer = causal_lm.load_tokenizer(Path(start.path))
    facts = {"pairs": 0, "tokens": 0, "dropped": 0}

    def tokenized() -> Iterator[TokenizedPair]:
        for pair in chain.from_iterable(pairs):
            texts = [exchange_ids(tokenizer, pair.prompt, side.text) for side in (pair.chosen, pair.rejected)]
            if max(map(len, texts)) > limit or texts[0] == texts[1]:
                facts["dropped"] += 1
                continue
            facts["pairs"] += 1
            facts["tokens"] += sum(map(len, texts))
            yield _as_pair(pair, texts[0], texts[1])

    for index, part in enumerate(batched(tokenized(), PAIRS_PER_PART)):
        opened.write_part(index, part)
    if not facts["pairs"]:
        raise DataError(f"{path}: all {facts['dropped']} pairs exceed train.max_tokens={limit} or have equal sides")
    return opened.finish(facts)


def _as_pair(pair: PreferencePair, chosen: Sequence[int], rejected: Sequence[int]) -> TokenizedPair:
    """Return both texts with what they begin with in common as the context; each side keeps a token at least."""
    most = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    return TokenizedPair(
        pair_id=pair.pair_id,
        context=tuple(chosen[:shared]),
        chosen=tuple(chosen[shared:]),
        rejected=tuple(rejected[shared:]),
        reference_chosen=None,
        reference_rejected=None,
        win_prob=pair.win_prob,
        weight=pair.weight,
        chosen_score=pair.chosen_score,
        rejected_score=pair.rejected_score,
    )


def _update(here: Run, path: Path, batches: Artifact[TokenizedPair], start: PolicyRef, number: int) -> PolicyRef:
    """5-policy: the reward model after training, with the training curve beside it."""
    train = here.recipe.train
    seed = here.recipe.seed + number
    settings = {k: v for k, v in train.model_dump(mode="json").items() if k not in _WITHOUT_EFFECT}
    if not settings["skip_nonfinite"]:  # as before there was such a setting
        del settings["skip_nonfinite"]
    settings |= {"trainer": key_of(here.parts.trainer, here.recipe.trainer.kind), "seed": seed}
    key = Key("reward-model", settings, {"batches": batches.digest, "policy": start.digest})
    opened = here.open(path, key, StepLog, together=True)
    if isinstance(opened, Building):
        opened = _train_and_export(here, opened, batches, start, seed)
    shutil.rmtree(path / STATES, ignore_errors=True)  # here, since a kill may come between the manifest and this
    return PolicyRef(str(path), opened.facts["policy_digest"], number, kind=TRAINS)


def _train_and_export(
    here: Run, building: Building[StepLog], batches: Artifact[TokenizedPair], start: PolicyRef, seed: int
) -> Artifact[StepLog]:
    began = time.monotonic()
    train, path = here.recipe.train, building.path
    opened = open_reward_model(start.path, train, here.team, seed)
    trainable = _trainable(here, opened.model, seed)
    shared = shard(trainable, here.team, train, opened.checkpoint, causal=False)
    job = Job(
        model=trainable,
        pairs=PairStore(batches),
        loss=here.parts.loss,
        settings=train,
        layout="padded",
        seed=seed,
        state_folder=path / STATES,
        reference=None,
        starts_at_reference=False,
        team=here.team,
        on_step=here.watch.step,
    )
    curve = here.parts.trainer(job, here.progress, here.stop)
    card = _card(here, start)
    if opened.checkpoint is not None:
        export_pieces(trainable, opened.tokenizer, path, card, opened.checkpoint, write=here.team.main)
    elif shared:
        model, _, _ = load_reward_model(Path(start.path), "cpu", seed) if here.team.main else (None, None, None)
        whole = None if model is None else _trainable(here, model, seed)
        gather(trainable, whole)
        trainable = whole
    if not here.team.main:
        return building.finish()
    building.write_part(0, curve)
    if opened.checkpoint is None:
        plain = adapters.merge_lora(trainable) if train.lora is not None else trainable
        causal_lm.export(plain, opened.tokenizer, path, card)
    facts = {
        "policy_digest": causal_lm.folder_digest(path),
        "steps": curve[-1].step,
        "tokens": batches.facts["tokens"] * train.epochs,
        "fresh_head": opened.fresh,
        **job.counts,
    }
    return building.finish(facts, seconds=time.monotonic() - began)


def _trainable(here: Run, model: Any, seed: int) -> Any:
    """Return the reward model with what is to be trained switched on."""
    train = here.recipe.train
    model.requires_grad_(True)
    if train.gradient_checkpointing:
        checkpoint_activations(model)
    if train.compile:
        compile_layers(model)
    if train.lora is None:
        return model
    return add_lora(model, train.lora.rank, train.lora.alpha, train.lora.targets, seed)


def _decide(here: Run, folder: Path, model: PolicyRef, standing: Standing, longer: bool) -> Artifact[Any]:
    """6-report: rewards of held-out pairs and of the policy's completions, read by the judge, and the decision."""
    judge = stages.NamedJudge(RewardModel(path=model.path, device=here.recipe.train.device), TRAINS)
    of_pairs = _rewards(here, folder / "1-held-out-rewards", standing.pair_samples, judge, standing.policy)
    inputs = {"pairs": standing.pairs.digest, "rewards": of_pairs.digest}
    of_samples = None
    if standing.samples is not None and standing.judged is not None:
        of_samples = _rewards(here, folder / "2-sample-rewards", standing.samples, judge, standing.policy)
        inputs |= {"samples": of_samples.digest, "judged": standing.judged.digest}
    settings = {"gate": key_of(here.parts.gate, here.recipe.gate.kind), "seed": here.recipe.seed, "longer": longer}
    opened: Artifact[Any] | Building[Any] = here.open(
        folder / "4-decision", Key("reward-decision", settings, inputs), None
    )
    if isinstance(opened, Artifact):
        return opened
    seed = here.recipe.seed
    metrics = pair_metrics(list(standing.pairs), _by_completion(of_pairs), longer, seed)
    if of_samples is not None and standing.judged is not None:
        metrics |= best_of_n(list(standing.judged), _by_completion(of_samples), seed)
    accepted, why = decide(metrics)
    if here.recipe.gate.kind != "gate":  # the default gate looks at policies
        decision = here.parts.gate(metrics, {})
        accepted, why = decision.accepted, (*decision.why, *why)
    return opened.finish(
        {
            "accepted": accepted,
            "why": list(why),
            "metrics": {name: metric_json(metric) for name, metric in metrics.items()},
            "warnings": [],
        }
    )


def _rewards(
    here: Run, path: Path, samples: Artifact[SampleGroup], judge: stages.NamedJudge, policy: PolicyRef
) -> Artifact[JudgedGroup]:
    return stages.judge(here, path, samples, judge, _context(here, EVALUATION_ROUND, policy))


def _by_completion(judged: Artifact[JudgedGroup]) -> dict[str, float]:
    return {
        completion.completion_id: score
        for group in judged
        for completion, score in zip(group.completions, group.scores, strict=True)
        if score is not None
    }


def _card(here: Run, start: PolicyRef) -> str:
    recipe = here.recipe
    named = recipe.policy.path if recipe.policy else start.path
    return CARD.format(name=recipe.name or recipe.recipe or "prefloop run", base=named, digest=start.digest)


CARD = """# {name}: a reward model

Trained by prefloop with the Bradley-Terry loss on preference pairs. One logit: higher is better, differences count.

- backbone: {base} (started from {digest})

    model = AutoModelForSequenceClassification.from_pretrained(folder)

reads prompt and completion as one text (plain prompts) or through the chat template. In prefloop:
`judge.kind=reward_model judge.path=FOLDER`.
"""
