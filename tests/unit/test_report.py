"""The report page, from synthetic run folders."""

import json
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from prefloop.artifact import Building, Key, open_artifact
from prefloop.errors import CorruptArtifact, DataError
from prefloop.evaluate.charts import Line, Point, line_chart, round_numbers, thinned
from prefloop.evaluate.report import write_report
from prefloop.evaluate.report_charts import histograms
from prefloop.evaluate.report_examples import few_pairs
from prefloop.evaluate.report_pairs import stored_pairs
from prefloop.rows import (
    HOLDOUT,
    TRAIN,
    JudgedGroup,
    PreferencePair,
    Prompt,
    SampleGroup,
)
from synthetic_run import ATTACK, SyntheticRun, metric_json_named


class Page(HTMLParser):
    """Checks that a page is balanced, and collects what it loads, its text, and its tags."""

    void = frozenset({"meta", "br", "wbr", "img", "link", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "data", "action", "srcset", "xlink:href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    run = SyntheticRun(tmp_path_factory.mktemp("runs") / "demo")
    run.begin(warnings=["only 24 held-out prompts"])
    run.round(0, 0.4)
    run.round(1, 0.7)
    run.round(2, 0.6, accepted=False)
    run.summary |= {"state": "done", "verdict": "2 of 3 rounds were accepted."}
    run.save()
    path = write_report(run.root)
    assert path == run.root / "report.html"
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_a_finished_run_shows_everything(finished):
    html, page = finished
    for wanted in (
        "2 of 3 rounds were accepted.",
        "only 24 held-out prompts",
        "win_rate_vs_best 71.0 % [66.0, 75.5] excludes 50 %",
        "kl_policy_start (nats per token)",
        "k1, samples at temperature 1",
        "Win rate",
        "Saturation",
        "Scores of held-out completions",
        "Gained most",
        "Lost most",
        "Chosen without looking at scores",
        "largest margin",
        "smallest margin",
        "Unpaired: prompts",
        "start: 50.0 % by definition",
        "round-001/3-pairs",
        "round-001/6-report/2-judged",
        "dropped: 2",
        "digest bbbb1",
        "kind: lexicon",
        "beta: 0.1",
        "prefloop 0.1.0",
    ):
        assert wanted in page.text, wanted
    # The decision, the sentence about refused rounds, and the frontier's legend.
    assert page.text.count("refused") == 3
    assert page.tags.count("svg") == 7 + 3 + 6
    assert len(html) < 300_000


def test_counts_come_from_the_artifacts(finished):
    html, _ = finished
    row = re.search(r"<tr><th>1</th><td>12</td>(.*?)</tr>", html)
    assert row is not None
    assert re.findall(r"<td>(.*?)</td>", row[1]) == ["48", "0", "10", "2", "10", "30", "2,000", "9,000", "3.5 min"]


def test_the_page_loads_nothing_and_runs_nothing(finished):
    html, page = finished
    assert page.loads == []
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name in page.attributes)
    assert not re.search(r"https?://|url\(|@import|//cdn", html)
    assert "default-src 'none'" in html


def test_the_same_run_gives_the_same_page(tmp_path):
    pages = []
    for name in "ab":
        run = SyntheticRun(tmp_path / name / "demo")
        run.begin()
        run.round(0, 0.4)
        pages.append(write_report(run.root).read_bytes())
    assert pages[0] == pages[1]


def test_untrusted_text_stays_text(tmp_path):
    run = SyntheticRun(tmp_path / "demo", text=ATTACK.replace("{", "{{").replace("}", "}}") + " {0}")
    run.holdout = [run.prompt(f"{ATTACK} {i}", HOLDOUT) for i in range(3)]
    run.train = [run.prompt(f"{ATTACK} {i}", TRAIN) for i in range(4)]
    run.begin(name=ATTACK, recipe=ATTACK, verdict=ATTACK, warnings=[ATTACK], judge={ATTACK: ATTACK})
    run.round(0, 0.4)
    run.summary["rounds"][0] |= {"why": [ATTACK], "seconds": {ATTACK: 1.0}, "tokens": {}}
    run.summary["rounds"][0]["metrics"][ATTACK] = metric_json_named(ATTACK)
    (run.root / "recipe.yaml").write_text(ATTACK, encoding="utf-8")
    run.save()
    html = write_report(run.root).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name in page.attributes)
    assert "{{ 7*7 }}" in page.text
    assert "&lt;script&gt;" in html
    assert ATTACK in page.text


def test_judges_notes_are_escaped_and_shown(tmp_path):
    run = SyntheticRun(tmp_path / "demo", holdout=2)
    run.begin()
    original = run.group
    run.group = lambda *a: original(*a) if a[2] < 0 else _with_note(original(*a))  # type: ignore[method-assign]
    run.round(0, 0.4)
    page = Page(write_report(run.root).read_text(encoding="utf-8"))
    assert f"Judge's note: {ATTACK}" in page.text
    assert "no score" in page.text


def _with_note(group: JudgedGroup) -> JudgedGroup:
    scores = (None, *group.scores[1:])
    return JudgedGroup(
        group.prompt, group.completions, group.policy, group.round, 1.0, 1.0, scores, None, group.judge,
        (ATTACK, *group.notes[1:]),
    )  # fmt: skip


def test_a_run_that_has_only_begun(tmp_path):
    run = SyntheticRun(tmp_path / "demo")
    run.begin()
    page = Page(write_report(run.root).read_text(encoding="utf-8"))
    assert "The run is not finished: no round has a result yet." in page.text
    assert "Scores of held-out completions" in page.text
    assert page.tags.count("svg") == 1


def test_a_round_in_progress_is_named_with_its_finished_stages(tmp_path):
    run = SyntheticRun(tmp_path / "demo")
    run.begin()
    run.round(0, 0.4)
    run.write("round-001/0-prompts", Prompt, run.train)
    open_artifact(run.root / "round-001" / "1-samples", Key("sample", {}), SampleGroup)
    page = Page(write_report(run.root).read_text(encoding="utf-8"))
    assert "round-001 is not finished; done so far: 0-prompts." in page.text


def test_before_the_first_artifact(tmp_path):
    run = SyntheticRun(tmp_path / "demo")
    run.root.mkdir()
    run.summary = {
        "prefloop": "0.1.0", "name": "demo", "recipe": "spin", "seed": 0, "state": "failed", "rounds": [],
        "policy_start": {"path": "p", "digest": "d"}, "policy_best": {"path": "p", "digest": "d", "round": -1},
    }  # fmt: skip
    run.save()
    page = Page(write_report(run.root).read_text(encoding="utf-8"))
    assert "The run failed: no round has a result yet." in page.text


def test_nothing_accepted_shows_the_refused_policy(tmp_path):
    run = SyntheticRun(tmp_path / "demo")
    run.begin()
    run.round(0, 0.9, accepted=False)
    page = Page(write_report(run.root).read_text(encoding="utf-8"))
    assert "No round was accepted; these are the refused policy's numbers, of round 0" in page.text
    assert "policy of round 0 (refused)" in page.text
    assert "best policythe start: models/start" in re.sub(r"\s*\n\s*", "", page.text)


def test_size_stays_bounded(tmp_path):
    run = SyntheticRun(tmp_path / "demo", text="{0} " * 4000, holdout=6)
    run.begin()
    run.round(0, 0.4, steps=1000)
    entry = run.summary["rounds"][0]
    entry["why"] = ["x" * 5000]
    run.summary["rounds"] = [{**entry, "round": n} for n in range(300)]
    run.summary["warnings"] = ["w" * 10_000] * 100
    (run.root / "recipe.yaml").write_text("a: b\n" * 100_000, encoding="utf-8")
    run.save()
    path = write_report(run.root)
    page = Page(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 2_000_000
    assert "more characters)" in page.text
    assert "260 rounds in the middle are not shown" in page.text


def test_a_lone_surrogate_does_not_stop_the_page(tmp_path):
    run = SyntheticRun(tmp_path / "demo")
    run.begin()
    (run.root / "summary.json").write_text(json.dumps({**run.summary, "verdict": "bad \ud800 text"}), encoding="utf-8")
    assert "bad ? text" in write_report(run.root).read_text(encoding="utf-8")


def test_no_run_here(tmp_path):
    with pytest.raises(DataError, match=r"no summary\.json here"):
        write_report(tmp_path)


def test_a_summary_without_its_fields(tmp_path):
    (tmp_path / "summary.json").write_text('{"name": "demo"}')
    with pytest.raises(DataError, match="lacks prefloop, recipe"):
        write_report(tmp_path)


def test_a_damaged_artifact_is_named(tmp_path):
    run = SyntheticRun(tmp_path / "demo")
    run.begin()
    (run.root / "start" / "2-judged" / "part-00000.parquet").write_bytes(b"no")
    with pytest.raises(CorruptArtifact, match="start/2-judged"):
        write_report(run.root)


def test_pairs_are_chosen_by_margin_and_by_id_over_all_parts(tmp_path):
    run = SyntheticRun(tmp_path / "demo")
    pairs = [run.pair(run.group(p, 0.3, 0, 4), 0) for p in run.train]
    by_margin = sorted(pairs, key=lambda p: p.margin)
    whole = few_pairs([pairs])
    assert [e.pair.pair_id for e in whole[:2]] == [by_margin[-1].pair_id, by_margin[0].pair_id]
    rest = sorted(p.pair_id for p in by_margin[1:-1])
    assert [e.pair.pair_id for e in whole[2:]] == rest[:2]
    assert few_pairs([pairs[:5], [], pairs[5:]]) == whole
    assert [e.rule for e in few_pairs([pairs[:1]])] == ["largest margin"]
    assert few_pairs([]) == []
    # From files: the same choice, whatever is in which part, and only the chosen rows are read whole.
    for name, parts in (("one", [pairs]), ("three", [pairs[:5], [], pairs[5:]]), ("few", [pairs[:1]]), ("none", [])):
        building = open_artifact(tmp_path / name, Key(name, {}), PreferencePair)
        assert isinstance(building, Building)
        for index, part in enumerate(parts):
            building.write_part(index, part)
        assert stored_pairs(building.finish({}).part_paths()) == few_pairs(parts)


def test_ten_thousand_pairs_take_less_than_five_seconds_and_five_megabytes(tmp_path):
    run = SyntheticRun(tmp_path / "demo", holdout=128)
    run.begin()
    run.round(0, 0.4)
    shutil.rmtree(run.root / "round-000" / "3-pairs")
    pairs = [run.pair(run.group(p, 0.3, 0, 4), 0) for p in run.train]
    building = open_artifact(run.root / "round-000" / "3-pairs", Key("pairs", {}), PreferencePair)
    assert isinstance(building, Building)
    many = [replace(pairs[i % 12], pair_id=f"{i:016x}", margin=float(i)) for i in range(10_000)]
    for index in range(0, 10_000, 512):  # as many in a part as a run writes
        building.write_part(index // 512, many[index : index + 512])
    building.finish()
    began = time.process_time()
    page = write_report(run.root)
    assert time.process_time() - began < 5
    assert page.stat().st_size < 5_000_000
    assert "margin 9999.000" in page.read_text(encoding="utf-8")
    assert ">10,000<" in page.read_text(encoding="utf-8")


def test_equal_scores_still_make_a_histogram(tmp_path):
    run = SyntheticRun(tmp_path / "demo")
    group = run.group(run.holdout[0], 0.0, 0, 2)
    same = JudgedGroup(group.prompt, group.completions, "p", 0, 1.0, 1.0, (1.0, 1.0), None, "j", (None, None))
    (chart,) = histograms([same], {0: [same]})
    assert chart.about == "2 completions, mean 1.000"
    assert histograms([], {0: []}) == []


def test_a_chart_leaves_out_what_is_not_finite():
    points = tuple(Point(float(x), y) for x, y in enumerate((1.0, float("nan"), 2.0, float("inf"))))
    drawing = line_chart([Line("loss", points)], "loss")
    assert drawing.count(",") == 2
    assert "nan" not in drawing
    assert "inf" not in drawing
    assert "nothing to draw yet" in line_chart([Line("loss", points[1:2])], "loss")


def test_a_chart_of_one_value_and_of_equal_values():
    assert "<circle" in line_chart([Line("kl", (Point(0.0, 0.2),))], "kl")
    assert "nan" not in line_chart([Line("flat", (Point(0.0, 0.0), Point(1.0, 0.0)))], "flat")


def test_long_lines_are_thinned_to_means():
    points = [Point(float(i), float(i)) for i in range(1000)]
    few = thinned(points, 10)
    assert [p.y for p in few] == [49.5 + 100 * i for i in range(10)]
    assert thinned(points[:10], 10) == tuple(points[:10])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 0.1), (1e-7, 3e-7), (99.0, 101.0), (0.0, 123456.0)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = round_numbers(low, high)
    assert 3 <= len(ticks) <= 7
    assert all(low - 1e-9 <= t <= high * (1 + 1e-9) + 1e-12 for t in ticks)
