"""What a run says of its judges: recomputed from its files, with a second judge and with people."""

import json
import sqlite3
from itertools import combinations

import pytest
from typer.testing import CliRunner

from prefloop import loop, trust
from prefloop.artifact import load_artifact, read_json
from prefloop.cli import app
from prefloop.evaluate.agreement import cohen_kappa
from prefloop.label.desk import Desk
from prefloop.label.pairs import load_round
from prefloop.label.store import CHOSEN, REJECTED, Click, open_store
from prefloop.launch import read_recipe
from prefloop.rows import JudgedGroup, PreferencePair
from scripted_endpoint import ScriptedEndpoint, in_form, material, taste

SMALL = [
    "prompts_per_round=12",
    "rounds=2",
    "sampler.max_new_tokens=12",
    "sampler.completions=3",
    "train.pairs_per_step=8",
    "evaluate.prompts=6",
    "evaluate.second_opinion=8",
    "gate.kind=always",
]


def by_place(request, number):
    """Goes by taste where that is clear, else by the place."""
    texts = material(request)
    a, b = taste(texts["COMPLETION A"]), taste(texts["COMPLETION B"])
    return in_form(request, "A" if a >= b - 1 else "B")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("trust") / "run"
    with ScriptedEndpoint(by_place) as endpoint:
        judge = f"judge={{kind: llm, model: judge, base_url: '{endpoint.url}', mode: compare}}"
        recipe, _ = read_recipe("iterative_dpo", [judge, "eval_judge=lexicon", *SMALL])
        loop.run(recipe, root)
        asked = len(endpoint.requests)
        loop.run(recipe, root)
        assert len(endpoint.requests) == asked
    return root


def pairs_of(root):
    return [p for number in (0, 1) for p in load_artifact(root / f"round-00{number}" / "3-pairs", PreferencePair)]


def test_flips_and_places_are_those_of_the_stored_replies(root):
    store = sqlite3.connect(root / "judge-store" / "verdicts.sqlite")
    first_wins: dict[tuple[str, ...], bool] = {}
    for shown, verdict in store.execute("select shown, verdict from replies"):
        first_wins[tuple(json.loads(shown))] = json.loads(verdict) == ["A"]
    store.close()
    prompts: dict[str, list[tuple[bool, float]]] = {}
    for number in (0, 1):
        for group in load_artifact(root / f"round-00{number}" / "2-judged", JudgedGroup):
            for one, two in combinations(dict.fromkeys(c.text for c in group.completions), 2):
                ids = {c.text: c.completion_id for c in reversed(group.completions)}
                forward, backward = first_wins[ids[one], ids[two]], first_wins[ids[two], ids[one]]
                found = prompts.setdefault(group.prompt.prompt_id, [])
                found.append((forward == backward, (forward + backward) / 2 - 0.5))
    metrics = read_json(root / "summary.json")["judging"]["judge"]["metrics"]

    def mean(place):
        means = [sum(item[place] for item in items) / len(items) for items in prompts.values()]
        return 100 * sum(means) / len(means)

    assert metrics["order_flips"]["value"] == pytest.approx(mean(0))
    assert metrics["position_bias"]["value"] == pytest.approx(mean(1))
    assert metrics["position_bias"]["low"] > 0
    assert metrics["order_flips"]["n"] == len(prompts)
    assert metrics["answered"]["value"] == 100.0
    assert "score_saturation" not in metrics  # it grades nothing


def test_the_second_judge_is_asked_about_some_pairs_and_compared(root):
    found = read_json(root / "summary.json")["judging"]
    (entry,) = found["agreement"]
    assert entry["raters"] == ["judge", "eval_judge"]
    own, other, prompts = [], [], []
    for number in (0, 1):
        opinions = list(load_artifact(root / f"round-00{number}" / "6-report" / trust.OPINIONS, JudgedGroup))
        assert 0 < len(opinions) <= 8
        assert {group.judge for group in opinions} == {"lexicon"}
        by_ids = {frozenset(c.completion_id for c in g.completions): g for g in opinions}
        for pair in pairs_of(root):
            group = by_ids.get(frozenset((pair.chosen.completion_id, pair.rejected.completion_id)))
            if group is not None:
                score = {c.completion_id: s for c, s in zip(group.completions, group.scores, strict=True)}
                chosen_first = group.completions[0].completion_id == pair.chosen.completion_id
                gain = score[pair.chosen.completion_id] - score[pair.rejected.completion_id]
                own.append(1 if chosen_first else 2)
                other.append("tie" if gain == 0 else 1 if (gain > 0) == chosen_first else 2)
                prompts.append(pair.prompt.prompt_id)
    assert {1, 2} == set(own)  # the chosen side is not always shown first
    assert entry["items"] == len(own)
    same = {p: [a == b for a, b, q in zip(own, other, prompts, strict=True) if q == p] for p in prompts}
    mean = 100 * sum(sum(items) / len(items) for items in same.values()) / len(same)
    assert entry["metrics"]["same"]["value"] == pytest.approx(mean)
    if "kappa" in entry["metrics"]:
        assert entry["metrics"]["kappa"]["value"] == pytest.approx(cohen_kappa(own, other, clusters=prompts).value)


def test_people_come_into_the_report_when_it_is_written_anew(root):
    pairs = load_round(root, 1)
    with open_store(root) as store:
        for place, item in enumerate(pairs.items):
            for name, verdict in (("Ana", CHOSEN), ("Ben", REJECTED if place % 3 == 0 else CHOSEN)):
                store.add(1, pairs.judged, [Click(f"event-{place}-{name}", name, item, verdict)])
        assert Desk(pairs, store).agreement()["people"][0]["with_labels"] == 100.0
    assert CliRunner().invoke(app, ["report", str(root)]).exit_code == 0
    found = {tuple(entry["raters"]): entry for entry in read_json(root / "summary.json")["judging"]["agreement"]}
    assert found["judge", "person:Ana"]["metrics"]["accuracy"]["value"] == 100.0
    agreed = len(pairs.items) - len(pairs.items[::3])
    assert found["judge", "person:Ben"]["metrics"]["accuracy"]["value"] == pytest.approx(
        100 * agreed / len(pairs.items)
    )
    # Where the two disagree nobody has the majority.
    assert found["judge", "people"]["items"] == agreed
    everyone = found["judge", "eval_judge", "person:Ana", "person:Ben"]
    assert everyone["metrics"]["kappa"]["estimator"].startswith("Fleiss' kappa, 4 ratings an item")

    html = (root / "report.html").read_text(encoding="utf-8")
    assert "How far the judges can be trusted" in html
    assert "the judge and Ana" in html
    assert "verdict changes with the order shown" in html
    said = CliRunner().invoke(app, ["show", str(root)]).output
    assert "judging: the judge and Ben on" in said
    assert "judging: The judge prefers what is shown first" in said


@pytest.mark.parametrize(
    ("judge", "eval_judge", "warned"),
    [
        ("lexicon", None, "The judge that made the training pairs also scored"),
        ("lexicon", "lexicon", "The judge that made the training pairs also scored"),
        ("{kind: llm, model: m, base_url: 'http://127.0.0.1:1/v1', mode: compare}", "lexicon", ""),
        (
            "{kind: llm, model: m, base_url: 'http://127.0.0.1:1/v1', mode: compare}",
            "{kind: llm, model: m, base_url: 'http://127.0.0.1:1/v1', template: ten}",
            "The model that judged the training pairs also scored",
        ),
    ],
)
def test_a_judge_that_judges_its_own_pupil_is_warned_about(judge, eval_judge, warned):
    settings = [f"judge={judge}", *([f"eval_judge={eval_judge}"] if eval_judge else [])]
    recipe, _ = read_recipe("iterative_dpo", settings)
    warnings = loop.judge_warnings(recipe, loop.build_parts(recipe))
    assert len(warnings) == (warned != "")
    assert all(warning.startswith(warned) for warning in warnings)
