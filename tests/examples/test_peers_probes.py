"""The probes of TRL 1.16 that docs/peers_probes.md lists, each repeated on prefloop through its public functions."""

import re
from pathlib import Path

import pytest

from prefloop.artifact import file_digest
from prefloop.check.data import data_findings
from prefloop.check.tokens import encode, token_findings
from prefloop.errors import ConfigError, DataError, Interrupted
from prefloop.inputs import embedded_policy, resolve_prompts
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.models import causal_lm
from prefloop.protocols import Quiet
from tiny import write_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "peers_probes.md"
SETTINGS = [
    *(
        "policy=embedded",
        "rounds=1",
        "prompts.holdout=0.5",
        "sampler.kind=given",
        "judge.kind=given",
        "gate.kind=always",
    ),
    *("eval_sampler.kind=hf", "eval_sampler.max_new_tokens=4", "eval_judge.kind=lexicon", "evaluate.prompts=4"),
    *("train.max_tokens=100", "train.pairs_per_step=4", "train.checkpoint_every=2", "train.learning_rate=1e-3"),
]


def rows(count=60):
    return [
        {"prompt": f"Story {i} begins", "chosen": f" well and ends {i} glad", "rejected": f" badly, all {i} of it sad"}
        for i in range(count)
    ]


def recipe_of(tmp_path, given, *more):
    path = write_jsonl(tmp_path / "pairs.jsonl", given)
    return read_recipe("iterative_dpo", [f"prompts={path}", *SETTINGS, *more])[0]


def said(recipe):
    """What `check` warns of, by name; `run` notes the same warnings in its summary."""
    return {f.name: f for f in data_findings(recipe) if f.severity != "info"}


def trained_on(root):
    """Facts of the batches: pairs trained on, and dropped ones by reason."""
    facts = run_summary(root)["rounds"][0]["facts"]["batches"]
    return facts["pairs"], facts["dropped"]


_SUMMARIES = {}


def run_summary(root):
    return _SUMMARIES[root]


def finished(recipe, root):
    _SUMMARIES[root] = run(recipe, root)
    return _SUMMARIES[root]


class StopAt(Quiet):
    """Asks for a stop in the fourth step."""

    steps = 0
    training = False

    def start(self, label, total, unit, done=0):
        object.__setattr__(self, "training", label == "train")

    def advance(self, amount=1, note=""):
        if self.training:
            object.__setattr__(self, "steps", self.steps + amount)

    def asked(self):
        return self.steps >= 3


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without a stop: its recipe and the digest of its weights."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = recipe_of(folder, rows())
    finished(recipe, folder / "run")
    return recipe, file_digest(folder / "run" / "round-000" / "5-policy" / "model.safetensors")


def stopped(recipe, root):
    """Stop in training after four steps and return the folders of the states, oldest first."""
    progress = StopAt()
    # The step under way when a stop is asked for is finished first.
    with pytest.raises(Interrupted):
        run(recipe, root, progress=progress, stop=progress.asked)
    states = sorted(root.rglob("step-*"))
    assert [int(s.name.removeprefix("step-")) for s in states][-1] == 4
    assert len(states) == 2
    return states


def resumed(recipe, root):
    run(recipe, root)
    return file_digest(root / "round-000" / "5-policy" / "model.safetensors")


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "nothing": lambda state: None,
    "weights cut in half": lambda state: half(state / "weights.safetensors"),
    "state.json deleted": lambda state: (state / "state.json").unlink(),
    "optimizer moments deleted": lambda state: (state / "moments.safetensors").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_resume(straight, tmp_path, damage):
    recipe, expected = straight
    states = stopped(recipe, tmp_path / "run")
    DAMAGE[damage](states[-1])
    assert resumed(recipe, tmp_path / "run") == expected


def test_chosen_equals_rejected_in_every_row(tmp_path):
    recipe = recipe_of(tmp_path, [row | {"rejected": row["chosen"]} for row in rows()])
    assert said(recipe)["identical_pairs"].number == 60
    with pytest.raises(DataError, match="no pair"):
        run(recipe, tmp_path / "run")


def test_half_of_the_prompts_are_too_long(tmp_path):
    long = [row | {"prompt": f"{row['prompt']} {'and on ' * 60}"} if i % 2 else row for i, row in enumerate(rows())]
    recipe = recipe_of(tmp_path, long)
    dropped = too_long(recipe)
    assert dropped["dropped_too_long"].number == 30
    summary = finished(recipe, tmp_path / "run")
    pairs, counts = trained_on(tmp_path / "run")
    train = len(resolve_prompts(recipe).train)
    assert counts == {"longer than train.max_tokens=100": train - pairs}
    assert 0 < pairs < train
    assert summary["state"] == "done"


def test_pairs_that_differ_only_after_the_cut(tmp_path):
    shared = " and then" * 60
    cut = [row | {"chosen": f"{shared} glad", "rejected": f"{shared} sad"} for row in rows()]
    recipe = recipe_of(tmp_path, cut)
    assert too_long(recipe)["dropped_too_long"].number == 60
    with pytest.raises(DataError, match=r"no pair is left to train on; dropped: .*longer than train\.max_tokens=100"):
        run(recipe, tmp_path / "run")


def too_long(recipe):
    tokenizer = causal_lm.load_tokenizer(embedded_policy())
    encoded, refused = encode(tokenizer, resolve_prompts(recipe).prompts)
    assert refused == []
    return {f.name: f for f in token_findings(recipe, tokenizer, encoded, True)}


def test_an_empty_chosen_answer(tmp_path):
    given = rows()
    given[3]["chosen"] = ""
    recipe = recipe_of(tmp_path, given)
    assert "pairs.jsonl:4" in said(recipe)["empty_completions"].examples[0]
    assert any("empty completion" in warning for warning in finished(recipe, tmp_path / "run")["warnings"])


def test_contradictory_labels_under_the_same_prompt(tmp_path):
    given = rows()
    given.append(given[5] | {"chosen": given[5]["rejected"], "rejected": given[5]["chosen"]})
    recipe = recipe_of(tmp_path, given)
    assert "pairs.jsonl:61 prefers what" in said(recipe)["contradictory_pairs"].examples[0]
    assert any("say the opposite" in warning for warning in finished(recipe, tmp_path / "run")["warnings"])


def test_one_rejected_answer_is_none(tmp_path):
    given = rows()
    given[7]["rejected"] = None
    recipe = recipe_of(tmp_path, given)
    assert said(recipe)["half_pairs"].examples == (f"{tmp_path}/pairs.jsonl:8: no rejected completion",)
    assert said(recipe)["half_pairs"].severity == "error"
    assert f"{tmp_path}/pairs.jsonl:8" in {p.source for p in resolve_prompts(recipe).train}
    with pytest.raises(DataError, match=r"pairs\.jsonl:8: no completions to choose from"):
        run(recipe, tmp_path / "run")


def test_an_option_that_does_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"unknown key train\.padding_free"):
        read_recipe("iterative_dpo", ["train.padding_free=true"])


def test_the_page_names_a_test_of_this_file_for_every_probe():
    table = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert len(table) == 11
    for line in table:
        named = re.findall(r"`tests/([\w/]+\.py)::(\w+)", line)
        assert named, line
        for file, test in named:
            assert f"def {test}(" in (PAGE.parents[1] / "tests" / file).read_text(encoding="utf-8"), line
