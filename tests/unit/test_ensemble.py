"""Several judges as one: means, the lowest, the cautious mean and votes, each by hand; and what is refused."""

import statistics

import pytest

from prefloop.components import build, build_parts, key_of
from prefloop.errors import ConfigError
from prefloop.judge.ensemble import Ensemble
from prefloop.launch import read_recipe
from prefloop.protocols import RoundContext
from prefloop.recipe import Spec
from prefloop.rows import VERBATIM, Completion, Message, PolicyRef, Prompt, SampleGroup, prompt_id
from tiny import save_tiny_policy

POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(seed=0, round=0, policy=POLICY, start=POLICY)

# A judge of the user's own that reads its score for a text from its settings; None where it has none.
TABLE = """
from dataclasses import dataclass
from prefloop.rows import Verdict

@dataclass(frozen=True)
class Table:
    scores: tuple[float | None, ...]
    wins: bool = False

    def __call__(self, groups, context):
        found = []
        for group in groups:
            mine = [self.scores[int(c.text)] for c in group.completions]
            notes = tuple("silent" if s is None else None for s in mine)
            count = range(len(mine))
            table = tuple(tuple(0.5 if i == j else 0.9 if i < j else 0.1 for j in count) for i in count)
            found.append(Verdict(tuple(mine), notes, table if self.wins else None))
        return found
"""


@pytest.fixture
def table(tmp_path):
    (tmp_path / "table.py").write_text(TABLE)
    return lambda *scores, **fields: {"kind": f"{tmp_path}/table.py:Table", "scores": scores, **fields}


def group_of(count):
    messages = (Message(VERBATIM, "Which?"),)
    prompt = Prompt(prompt_id(messages), messages, None, "train", "test:1")
    made = tuple(Completion(f"{i}", str(i), None, None, "stop", 0, "p") for i in range(count))
    return SampleGroup(prompt, made, "p", 0, 1.0, 1.0)


def verdict(count=3, **fields):
    (found,) = Ensemble(**fields)([group_of(count)], CONTEXT)
    return found


A, B, C = (1.0, 4.0, 2.0), (3.0, 1.0, 2.0), (8.0, 1.0, 3.0)


def test_the_mean_the_lowest_and_the_cautious_mean(table):
    judges = (table(*A), table(*B), table(*C))
    columns = list(zip(A, B, C, strict=True))
    assert verdict(judges=judges).scores == pytest.approx([statistics.fmean(c) for c in columns])
    assert verdict(judges=judges, how="lowest").scores == pytest.approx([min(c) for c in columns])
    cautious = verdict(judges=judges, how="cautious", variance_weight=0.5)
    assert cautious.scores == pytest.approx([statistics.fmean(c) - 0.5 * statistics.pvariance(c) for c in columns])
    assert cautious.notes == (None,) * 3
    assert cautious.win_prob is None


def test_scores_are_brought_to_one_unit(table):
    judges = (table(*A), table(*(100 * value + 7 for value in B)))
    group = verdict(judges=judges, scale="group").scores
    plain = verdict(judges=(table(*A), table(*B)), scale="group").scores
    assert group == pytest.approx(plain)  # neither unit nor offset counts
    assert sum(group) == pytest.approx(0.0)
    given = verdict(judges=judges, scale="given", centers=(1.0, 7.0), spreads=(2.0, 100.0)).scores
    assert given == pytest.approx([((a - 1) / 2 + b) / 2 for a, b in zip(A, B, strict=True)])
    flat = verdict(judges=(table(5.0, 5.0, 5.0), table(*A)), scale="group").scores
    assert flat == pytest.approx([value / 2 for value in verdict(judges=(table(*A), table(*A)), scale="group").scores])


def test_a_judge_without_a_score_leaves_none(table):
    found = verdict(judges=(table(*A), table(None, 1.0, 2.0)))
    assert found.scores == (None, 2.5, 2.0)
    assert found.notes[0].endswith("table.py:Table): silent")
    assert found.notes[0].startswith("judge 2 (")
    assert found.notes[1:] == (None, None)


def test_the_majority_decides(table):
    found = verdict(judges=(table(*A), table(*B), table(*C)), how="vote")
    # 0 beats 1 by two votes of three, 0 beats 2 likewise, 2 beats 1 likewise.
    assert found.scores == (1.0, 0.0, 0.5)
    assert found.win_prob[0] == pytest.approx((0.5, 2 / 3, 2 / 3))
    assert found.win_prob[1] == pytest.approx((1 / 3, 0.5, 1 / 3))
    # One judge's great liking outweighs two others in the mean, not in the vote.
    assert verdict(judges=(table(9.0, 0.0), table(0.0, 1.0), table(0.0, 1.0)), count=2, how="vote").scores == (0.0, 1.0)


def test_draws_comparing_judges_and_abstentions(table):
    assert verdict(2, judges=(table(1.0, 0.0), table(0.0, 1.0)), how="vote").scores == (0.5, 0.5)
    assert verdict(2, judges=(table(1.0, 1.0), table(0.0, 1.0)), how="vote").win_prob[1] == (0.75, 0.5)
    compares = table(0.0, 1.0, wins=True)  # its scores say otherwise, but it compares
    assert verdict(2, judges=(compares, compares), how="vote").scores == (1.0, 0.0)
    silent = table(None, 0.0)
    judges = (table(1.0, 0.0), silent, silent)
    none = verdict(2, judges=judges, how="vote")
    assert none.scores == (None, None)
    assert none.win_prob is None
    assert "judge 2 (" in none.notes[0]
    assert none.notes[1].startswith("no pair with 2 votes")
    assert verdict(2, judges=judges, how="vote", quorum=1).scores == (1.0, 0.0)
    assert verdict(1, judges=(table(1.0), table(2.0)), how="vote").scores == (None,)


LEXICON = {"kind": "lexicon"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"judges": (LEXICON,)}, r"judge\.judges .*two judges or more"),
        ({"judges": (LEXICON, {"kind": "lexikon"})}, r"no judge 'lexikon'; kind must be one of .*lexicon"),
        ({"judges": (LEXICON, {"kind": "_llm_store"})}, r"no judge '_llm_store'"),
        (
            {"judges": (LEXICON, {"kind": "reward_model", "pth": "x"})},
            r"reward_model has no field 'pth'; it has .*path",
        ),
        ({"judges": (LEXICON, {"kind": "reward_model"})}, r"reward_model\.path: .*[Mm]issing|required"),
        ({"how": "median"}, r"judge\.how .*mean, lowest, cautious or vote, got 'median'"),
        ({"how": "cautious"}, r"judge\.variance_weight .*set with how=cautious"),
        ({"variance_weight": 1.0}, r"judge\.variance_weight .*only then"),
        ({"how": "cautious", "variance_weight": -1.0}, r"judge\.variance_weight .*≥ 0"),
        ({"scale": "given", "centers": (1.0,), "spreads": (1.0, 1.0)}, r"judge\.centers .*one number for each judge"),
        ({"scale": "given", "centers": (1.0, 1.0), "spreads": (1.0, 0.0)}, r"judge\.spreads .*> 0"),
        ({"centers": (1.0, 1.0)}, r"judge\.centers .*only scale=given"),
        ({"how": "vote", "scale": "group"}, r"judge\.scale .*votes have no unit"),
        ({"quorum": 1}, r"judge\.quorum .*only how=vote"),
        ({"how": "vote", "quorum": 3}, r"judge\.quorum .*number of judges, 2"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        Ensemble(**{"judges": (LEXICON, LEXICON), **fields})


def test_a_recipe_builds_it_and_its_key_knows_what_counts(tmp_path):
    folder = save_tiny_policy(tmp_path / "rm")

    def key(**more):
        llm = {"kind": "llm", "model": "m", "base_url": "http://127.0.0.1:1/v1", **more}
        judges = [llm, {"kind": "reward_model", "path": str(folder)}]
        return key_of(build("judge", Spec.model_validate({"kind": "ensemble", "judges": judges})), "ensemble")

    before = key()
    assert before == key(max_calls=7)  # a budget changes no verdict
    assert before != key(mode="compare")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert before != key()


def test_it_judges_no_held_out_prompts_where_it_cannot():
    recipe, _ = read_recipe(
        "iterative_dpo", ["judge={kind: ensemble, scale: group, judges: [{kind: lexicon}, {kind: lexicon}]}"]
    )
    with pytest.raises(
        ConfigError, match=r"eval_judge: ensemble scores a prompt's completions against each other only"
    ):
        build_parts(recipe)
    policy = "judge={kind: ensemble, judges: [{kind: lexicon}, {kind: self_likelihood}]}"
    recipe, _ = read_recipe("iterative_dpo", [policy])
    with pytest.raises(ConfigError, match=r"eval_judge: the policy itself"):
        build_parts(recipe)
