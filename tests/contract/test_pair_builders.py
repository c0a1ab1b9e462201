"""Every file in pair/ is tested here: its class is found by the file's name. A builder that cannot be built from its
defaults gets its arguments from `ARGUMENTS`, one line."""

import dataclasses
import importlib
import math
import pkgutil
import random

import pytest

import prefloop.pair
from prefloop.protocols import RoundContext, needs_steps, one_sided
from prefloop.rows import (
    VERBATIM,
    Completion,
    JudgedGroup,
    Message,
    PolicyRef,
    Prompt,
    Solution,
    Step,
    gold_completion,
    prompt_id,
)

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(seed=0, round=1, policy=POLICY, start=POLICY)

ARGUMENTS: dict[str, list[dict[str, object]]] = {
    "ranked": [
        {"rule": "best_vs_worst"},
        {"rule": "best_vs_random"},
        {"rule": "above_margin", "min_margin": 0.25, "max_pairs": 3},
    ],
    "dynamic_labels": [{"ties": "drop"}],
    "corrected": [{}, {"of": {"kind": "ranked", "rule": "above_margin"}}],
    "guided": [{}, {"rule": "above_margin"}],
    "meta_rewarding": [{}, {"rho": 0.0}, {"rho": 0.8}],
    "own_samples": [{}, {"keep": "all", "stopped": True}],
    "model_matrix": [{}, {"correction": "none"}, {"chosen_rungs": 0, "tie_margin": 0.25}],
    "rankings": [{"completions": 2}, {"completions": 3, "min_margin": 0.1}],
    "rejection": [{"accept": 3}, {"accept": 3, "pairing": "tournament"}],
    # Mismatched completions are those of other prompts by their nature: see tests/unit/test_unpaired.py.
    "unpaired": [{"mismatched": False}, {"rule": "rank", "best": 2, "worst": 2, "mismatched": False}],
    "steps": [{}, {"max_pairs": None}],
    "win_rates": [{}, {"keep": "all", "scale": 3.0}],
}


def builder_classes():
    """Return file name and class of every pair builder; a file without such a class holds helpers."""
    found = {}
    for item in pkgutil.iter_modules(prefloop.pair.__path__):
        module = importlib.import_module(f"prefloop.pair.{item.name}")
        wanted = item.name.replace("_", "")
        for name, value in vars(module).items():
            if isinstance(value, type) and name.lower() == wanted and value.__module__ == module.__name__:
                found[item.name] = value
    return found


BUILDERS = builder_classes()
CASES = [(kind, arguments) for kind in BUILDERS for arguments in ARGUMENTS.get(kind, [{}])]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, [case[0], *case[1].values()])))
def builder(request):
    kind, arguments = request.param
    made = BUILDERS[kind]
    needed = [
        f.name
        for f in dataclasses.fields(made)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if name not in arguments]:
        pytest.fail(
            f"pair/{kind}.py: {made.__name__} has no default for {', '.join(missing)}; add a line to ARGUMENTS in "
            "tests/contract/test_pair_builders.py"
        )
    return made(**arguments)


def judged(question, scores, texts=None, win_prob=None, gold="a gold answer"):
    messages = (Message(VERBATIM, question),)
    prompt = Prompt(prompt_id(messages), messages, gold, "train", "test:1")
    texts = texts or [f"{question} text {i}" for i in range(len(scores))]
    completions = tuple(
        Completion(f"{question}/{i}", text, (5, 6, 2), (-1.0, -1.0, -1.0), "stop", i, "p")
        for i, text in enumerate(texts)
    )
    notes = tuple("no verdict" if score is None else None for score in scores)
    return JudgedGroup(prompt, completions, "p", 1, 1.0, 1.0, tuple(scores), win_prob, "j", notes)


def many_groups():
    draw = random.Random(0)
    groups = []
    for number in range(30):
        count = draw.randrange(7)
        scores = [draw.choice([None, 0.0, 0.5, 1.0, draw.random()]) for _ in range(count)]
        texts = [draw.choice(["a", "b", f"text {i}"]) for i in range(count)]
        wins = tuple(tuple(0.5 + (i - j) / 100 for j in range(count)) for i in range(count))
        groups.append(judged(f"Q{number}", scores, texts, draw.choice([None, wins])))
    return groups


GROUPS = many_groups()


def with_gold(group):
    """The group as the loop hands it to a builder that compares scores with the gold answer's: judged too, and last."""
    gold = gold_completion(group.prompt)
    score = (len(group.prompt.text) % 3) / 2
    return dataclasses.replace(
        group,
        completions=(*group.completions, gold),
        scores=(*group.scores, score),
        notes=(*group.notes, None),
        win_prob=None,
    )


def in_steps(group):
    """The group as a corrector hands it on: a common first step, then the text; all below the best wrong there."""
    best = max((score for score in group.scores if score is not None), default=0)
    completions, solutions = [], []
    for completion, score in zip(group.completions, group.scores, strict=True):
        ids = (5, *map(ord, completion.text), 2)
        text = f"First.\n{completion.text}"
        completions.append(dataclasses.replace(completion, text=text, token_ids=ids, sampler_logps=(-1.0,) * len(ids)))
        steps = (Step("First.\n", 1), Step(completion.text, len(completion.text)))
        solutions.append(Solution(steps, 2 if score is not None and score < best else None))
    return dataclasses.replace(group, completions=tuple(completions), solutions=tuple(solutions))


def groups_for(builder):
    if needs_steps(builder):
        return [in_steps(group) for group in GROUPS]
    return [with_gold(group) for group in GROUPS] if builder.needs_gold and builder.needs_scores else GROUPS


TIES = [
    judged("empty", []),
    judged("one", [1.0], gold=None),
    judged("tie", [0.5, 0.5, 0.5], gold=None),
    judged("silent", [None, None], gold=None),
    judged("one score", [None, 1.0], gold=None),
]


def test_there_are_builders():
    assert "ranked" in BUILDERS


def test_a_builder_is_a_frozen_dataclass_with_a_docstring(builder):
    assert dataclasses.is_dataclass(builder)
    assert not type(builder).__doc__.startswith(f"{type(builder).__name__}(")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(builder, next((f.name for f in dataclasses.fields(builder)), "anything"), None)


def test_a_pair_prefers_the_higher_score(builder):
    groups = groups_for(builder)
    by_prompt = {group.prompt.prompt_id: group for group in groups}
    pairs = list(builder(groups, CONTEXT))
    assert pairs
    for pair in pairs:
        group = by_prompt[pair.prompt.prompt_id]
        assert pair.prompt == group.prompt
        assert math.isfinite(pair.margin)
        assert pair.margin >= 0
        if pair.chosen_score is not None and pair.rejected_score is not None:
            assert pair.chosen_score > pair.rejected_score
            assert pair.margin == pytest.approx(pair.chosen_score - pair.rejected_score)
        for completion, score in ((pair.chosen, pair.chosen_score), (pair.rejected, pair.rejected_score)):
            if completion in group.completions and builder.needs_scores:
                assert score == group.scores[group.completions.index(completion)]
        assert (pair.chosen.text, pair.chosen.media) != (pair.rejected.text, pair.rejected.media)
        assert pair.win_prob is None or 0 <= pair.win_prob <= 1
        assert math.isfinite(pair.weight)
        assert pair.weight > 0
        assert pair.round == group.round
        assert pair.builder
        assert not pair.flipped or builder.needs_gold


def test_no_pair_comes_twice(builder):
    groups = groups_for(builder)
    pairs = list(builder(groups, CONTEXT))
    assert len({pair.pair_id for pair in pairs}) == len(pairs)
    assert len({(p.prompt.prompt_id, p.chosen.text, p.rejected.text) for p in pairs}) == len(pairs)


def test_ties_and_missing_scores_give_no_pair(builder):
    if one_sided(builder):
        assert all(pair.chosen_score is not None for pair in builder(TIES, CONTEXT))
        return
    assert list(builder(TIES, CONTEXT)) == []
    assert list(builder([], CONTEXT)) == []


def test_the_same_call_gives_the_same_pairs(builder):
    groups = groups_for(builder)
    first = list(builder(groups, CONTEXT))
    assert list(builder(groups, CONTEXT)) == first
    assert list(builder(iter(groups), CONTEXT)) == first


def test_a_groups_pairs_do_not_depend_on_other_groups(builder):
    groups = groups_for(builder)

    def of_each(some):
        return [list(builder([group], CONTEXT)) for group in some]

    whole = list(builder(groups, CONTEXT))
    assert whole == [pair for pairs in of_each(groups) for pair in pairs]
    order = list(range(len(groups)))
    random.Random(1).shuffle(order)
    permuted = list(builder([groups[i] for i in order], CONTEXT))
    assert permuted == [pair for i in order for pair in of_each([groups[i]])[0]]
