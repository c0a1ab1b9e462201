"""Clicks on disk, names, the order of pairs, marked differences, and verdicts as files; no HTTP."""

import dataclasses
import json
import random
import sqlite3
import threading
import time

import pytest

from label_run import pair, write_run
from prefloop.artifact import Key, open_artifact
from prefloop.errors import ConfigError, DataError
from prefloop.label.consensus import agreement_of, as_json, majority
from prefloop.label.desk import Desk, chosen_is_left
from prefloop.label.difference import differences
from prefloop.label.exchange import export_verdicts, import_verdicts
from prefloop.label.pairs import load_round
from prefloop.label.sessions import IDLE, NameInUse, Sessions
from prefloop.label.store import Click, Given, open_store
from prefloop.pair.corrected import Corrected
from prefloop.pair.ranked import Ranked
from prefloop.protocols import RoundContext
from prefloop.rows import (
    ABSENT,
    VERBATIM,
    Completion,
    JudgedGroup,
    Judgement,
    Message,
    PolicyRef,
    Prompt,
    prompt_id,
)
from tiny import write_jsonl


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", [pair(i) for i in range(6)])


@pytest.fixture
def desk(run):
    with open_store(run) as store:
        yield Desk(load_round(run), store)


def judge_all(desk, name, verdict, count=99):
    """Judge `count` pairs by what `verdict` says of a pair: a side of the run, or tie, both_bad, skip."""
    for number in range(count):
        shown = desk.next(name)["pair"]
        if shown is None:
            return
        item = desk.pairs.by_key[shown["key"]]
        said = verdict(item)
        if said in ("chosen", "rejected"):
            said = "left" if (said == "chosen") == chosen_is_left(item.key, name) else "right"
        desk.click(name, key=item.key, said=said, event=f"{name}-click-{number}", skipped=False)


# The store


def test_a_click_is_on_disk_for_another_process_before_it_is_answered(run, desk):
    desk.click("ana", key=desk.pairs.items[0].key, said="tie", event="12345678", skipped=False)
    with sqlite3.connect(f"file:{run / 'labels.sqlite'}?mode=ro", uri=True) as other:
        assert other.execute("select annotator, verdict from standing").fetchall() == [("ana", "tie")]
    other.close()
    ask = desk.store.read
    assert (ask("pragma journal_mode")[0][0], ask("pragma synchronous")[0][0]) == ("wal", 2)


def test_a_click_sent_twice_is_stored_once_and_an_undo_sent_twice_undoes_one(desk):
    first, second = (item.key for item in desk.pairs.items[:2])
    for _ in range(2):
        desk.click("ana", key=first, said="tie", event="event-one", skipped=False)
    desk.click("ana", key=second, said="tie", event="event-two", skipped=False)
    for _ in range(2):
        found = desk.undo("ana", event="undo-one", skipped=False)
        assert found["pair"]["key"] == second
        assert found["progress"]["judged"] == 1
    assert desk.undo("ana", event="undo-two", skipped=False)["can_undo"] is False
    assert desk.undo("ana", event="undo-three", skipped=False)["progress"]["judged"] == 0
    assert desk.store.read("select count(*) from events where verdict is not null") == [(2,)]


def test_a_second_verdict_replaces_the_first_and_its_undo_brings_that_back(desk):
    key = desk.pairs.items[0].key
    for event, said in (("event-one", "tie"), ("event-two", "both_bad")):
        desk.click("ana", key=key, said=said, event=event, skipped=False)
    assert [one.verdict for one in desk.store.given(0)] == ["both_bad"]
    desk.undo("ana", event="undo-one", skipped=False)
    assert [one.verdict for one in desk.store.given(0)] == ["tie"]


def test_undo_takes_back_ones_own_clicks_only(desk):
    judge_all(desk, "ana", lambda item: "tie", 2)
    judge_all(desk, "bo", lambda item: "tie", 1)
    desk.undo("bo", event="undo-one", skipped=False)
    desk.undo("bo", event="undo-two", skipped=False)
    assert {one.annotator for one in desk.store.given(0)} == {"ana"}
    assert len(desk.store.given(0)) == 2


def test_threads_and_connections_lose_nothing(run):
    def work(name):
        with open_store(run) as store:
            desk = Desk(load_round(run), store)
            judge_all(desk, name, lambda item: "tie")

    threads = [threading.Thread(target=work, args=(f"p{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with open_store(run) as store:
        assert len(store.given(0)) == 4 * 6


def test_a_file_that_is_not_ours_is_refused(run):
    (run / "labels.sqlite").write_bytes(b"no database at all, and longer than a header would be" * 40)
    with pytest.raises(DataError, match=r"labels\.sqlite: cannot be used"), open_store(run):
        pass
    (run / "labels.sqlite").unlink()
    with sqlite3.connect(run / "labels.sqlite") as other:
        other.execute("create table something (x)")
    other.close()
    with pytest.raises(DataError, match="another kind of SQLite file"), open_store(run):
        pass


def test_a_failed_write_stores_nothing(desk):
    item, other = desk.pairs.items[:2]
    broken = dataclasses.replace(other, prompt_id=None)
    with pytest.raises(sqlite3.IntegrityError):
        desk.store.add(0, "j", [Click("event-one", "ana", item, "tie"), Click("event-two", "ana", broken, "tie")])
    assert desk.store.given(0) == []
    judge_all(desk, "ana", lambda item: "tie", 1)
    assert len(desk.store.given(0)) == 1


# What is asked, and in which order


def test_the_latest_round_is_asked_about_unless_another_is_named(run):
    write_run(run, [pair(9)], number=2)
    (run / "round-003" / "3-pairs").mkdir(parents=True)
    assert load_round(run).round == 2
    assert load_round(run, 0).round == 0
    with pytest.raises(ConfigError, match=r"--round: .* no finished pairs of round 1; there are 0, 2"):
        load_round(run, 1)
    with pytest.raises(DataError, match="no round has finished pairs"):
        load_round(run / "nowhere")


def test_exchanged_pairs_come_first_then_the_doubtful_then_small_margins(tmp_path):
    rows = [pair(5), pair(1), pair(2, win_prob=0.9), pair(3, win_prob=0.55), pair(4, flipped=True)]
    assert [item.margin for item in load_round(write_run(tmp_path, rows)).items] == [4, 3, 2, 1, 5]


def test_a_judge_that_contradicts_itself_makes_a_pair_doubtful(tmp_path):
    rows = [pair(1), pair(2), pair(3)]
    # Grades of chosen and rejected: of 2 × 2 comparisons the rejected side wins 0, 2 (one tie counts half), 3.
    grades = [([4.0, 5.0], [1.0, 2.0]), ([3.0, 5.0], [3.0, 4.0]), ([1.0, 3.0], [2.0, 4.0])]
    groups = []
    for row, sides in zip(rows, grades, strict=True):
        said = [
            Judgement(place, (), Completion("x", "", None, None, "stop", 0, "j"), grade)
            for place, side in enumerate(sides)
            for grade in side
        ]
        groups.append(
            JudgedGroup(
                row.prompt,
                (row.chosen, row.rejected),
                "p",
                0,
                1.0,
                1.0,
                (1.0, 0.0),
                None,
                "j",
                (None,) * 2,
                tuple(said),
            )
        )
    root = write_run(tmp_path, rows)
    opened = open_artifact(root / "round-000" / "2-judged", Key("judged", {}), JudgedGroup)
    opened.write_part(0, groups)
    opened.finish()
    items = load_round(root).items
    assert [(item.margin, item.doubt) for item in items] == [(3, 0.75), (2, 0.375), (1, 0.0)]


def test_pairs_without_a_choice_are_left_out(tmp_path):
    rows = [pair(1, "same", "same"), pair(2), pair(3, rejected=None)]
    rows[2] = dataclasses.replace(rows[2], rejected=ABSENT)
    assert [item.margin for item in load_round(write_run(tmp_path / "a", rows)).items] == [2]
    with pytest.raises(DataError, match="no pair of two different texts"):
        load_round(write_run(tmp_path / "b", rows[:1]))
    pictured = dataclasses.replace(rows[1], chosen=dataclasses.replace(rows[1].chosen, media=("cat.png",)))
    with pytest.raises(DataError, match="the page shows texts only"):
        load_round(write_run(tmp_path / "c", [pictured]))


def test_the_artifact_is_not_changed(run, desk):
    folder = run / "round-000" / "3-pairs"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    judge_all(desk, "ana", lambda item: "rejected")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_sides_are_drawn_evenly_by_person_and_pair_and_stay():
    keys = [f"{i:016x}" for i in range(2000)]
    left = [chosen_is_left(key, "ana") for key in keys]
    assert 900 < sum(left) < 1100  # 4.5 standard deviations
    other = [chosen_is_left(key, "bo") for key in keys]
    assert 900 < sum(a == b for a, b in zip(left, other, strict=True)) < 1100
    assert left == [chosen_is_left(key, "Ana") for key in keys]


def test_the_page_learns_nothing_that_tells_the_sides_apart(desk):
    for _ in range(6):
        found = desk.next("ana")
        assert set(found["pair"]) == {"key", "prompt", "prefix", "left", "right"}
        assert not {"margin", "score", "chosen", "rejected", "builder"} & set(json.dumps(found).split('"'))
        key = found["pair"]["key"]
        texts = {side: "".join(words for words, _ in found["pair"][side]) for side in ("left", "right")}
        item = desk.pairs.by_key[key]
        said = "left" if texts["left"] == item.rejected else "right"
        desk.click("ana", key=key, said=said, event=f"click-{key}", skipped=False)
    assert {one.verdict for one in desk.store.given(0)} == {"rejected"}


def test_skipped_pairs_come_again_when_asked_for_the_longest_skipped_first(desk):
    keys = [item.key for item in desk.pairs.items]
    judge_all(desk, "ana", lambda item: "skip" if item.key in (keys[1], keys[3]) else "tie")
    found = desk.next("ana")
    assert found["pair"] is None
    assert found["progress"] == {"total": 6, "judged": 4, "skipped": 2}
    assert desk.next("ana", skipped=True)["pair"]["key"] == keys[1]
    again = desk.click("ana", key=keys[1], said="skip", event="skip-again", skipped=True)
    assert again["pair"]["key"] == keys[3]
    judged = desk.click("ana", key=keys[3], said="left", event="judged-it", skipped=True)
    assert judged["pair"]["key"] == keys[1]
    assert judged["progress"] == {"total": 6, "judged": 5, "skipped": 1}


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"key": "x" * 99}, "no pair 'x{40}'"), ({"said": "up"}, "one of left, right"), ({"event": "1"}, "8 to 64")],
)
def test_nonsense_is_refused(desk, changed, message):
    body = {"key": desk.pairs.items[0].key, "said": "tie", "event": "12345678", "skipped": False}
    with pytest.raises(ConfigError, match=message):
        desk.click("ana", **body | changed)
    assert desk.store.given(0) == []


# Marked differences


def joined(segments):
    return "".join(text for text, _ in segments)


def test_pieces_joined_are_the_text_and_unmarked_pieces_are_common():
    draw = random.Random(3)
    words = ["a ", "bee ", "c, ", "dé\n", "日本", " <b>", "🙂 "]
    for _ in range(200):
        texts = ["".join(draw.choices(words, k=draw.randrange(30))) for _ in range(2)]
        pieces = differences(*texts)
        assert [joined(side) for side in pieces] == texts
        common = ["".join(text for text, differs in side if not differs) for side in pieces]
        if any(differs for side in pieces for _, differs in side):
            assert common[0] == common[1]


def test_marks_are_on_words_and_not_torn_by_short_common_ones():
    assert differences("I saw the red big car and left.", "I saw the old big bus and left.") == (
        [("I saw the ", False), ("red big car", True), (" and left.", False)],
        [("I saw the ", False), ("old big bus", True), (" and left.", False)],
    )


def test_texts_with_little_in_common_have_no_marks_and_long_ones_do_not_stall():
    assert differences("one two", "three four") == ([("one two", False)], [("three four", False)])
    assert differences("", "three four") == ([("", False)], [("three four", False)])
    left, right = differences("the cat " * 3000, "the dog the cat " * 1500)
    assert joined(left) == "the cat " * 3000
    assert joined(right) == "the dog the cat " * 1500


# Names


@pytest.fixture
def sessions(desk):
    return Sessions(desk.store)


def test_a_session_outlives_the_process_and_ends_when_idle(desk, sessions, monkeypatch):
    secret = sessions.begin("ana")
    assert Sessions(desk.store).find(secret).annotator == "ana"
    assert secret not in str(desk.store.read("select * from sessions"))
    assert sessions.find("another") is None
    assert sessions.find(None) is None
    assert Sessions(desk.store, "another password").find(secret) is None
    later = time.time() + IDLE + 1
    monkeypatch.setattr("prefloop.label.sessions.time.time", lambda: later)
    assert sessions.find(secret) is None


def test_a_name_in_use_is_refused_until_the_person_says_that_it_is_theirs(desk, sessions):
    one, two = (sessions.find(sessions.begin()) for _ in range(2))
    assert sessions.claim(one, "  Ana  Li ") == "Ana Li"
    judge_all(desk, "Ana Li", lambda item: "tie", 2)
    with pytest.raises(NameInUse, match="Ana Li has judged 2 pairs of this run and is in use in another window, last"):
        sessions.claim(two, "ana li")
    assert [row[0] for row in desk.store.read("select annotator from sessions order by annotator")] == [None, "Ana Li"]
    assert sessions.claim(two, "ana li", confirmed=True) == "Ana Li"
    assert desk.store.read("select count(*) from sessions where annotator = 'Ana Li'") == [(1,)]


def test_a_preset_name_is_taken_unless_another_window_has_it(desk, sessions):
    judge_all(desk, "ana", lambda item: "tie", 1)
    first = sessions.find(sessions.begin("Ana"))
    assert first.annotator == "ana"
    assert sessions.find(sessions.begin("ana")).annotator is None
    # The same browser comes back with a new address: its old session makes room.
    assert sessions.find(sessions.begin("ana", after=first)).annotator == "ana"


@pytest.mark.parametrize("name", ["", "   ", "x" * 41, "a\x00b", "a\u202eb"])
def test_names_that_cannot_be_read_are_refused(sessions, name):
    with pytest.raises(ConfigError, match="annotator: a name has 1 to 40 visible characters"):
        sessions.claim(sessions.find(sessions.begin()), name)


# Agreement


def test_agreement_of_two_by_hand():
    """Cohen 1960 by hand on keys whose parity names the sides: 3 of 4 equal, chance 0.5, kappa 0.5."""
    keys = ["0", "2", "4", "6"]  # even: the chosen side is first
    said = {"ana": ["chosen", "chosen", "chosen", "rejected"], "bo": ["chosen", "chosen", "rejected", "rejected"]}
    given = [Given(who, key, v, "page", "", 0) for who, all_ in said.items() for key, v in zip(keys, all_, strict=True)]
    found = as_json(agreement_of(given))
    (compared,) = found["compared"]
    assert (compared["pairs"], compared["same"], compared["kappa"][0]) == (4, 75, 0.5)
    assert found["split"] == 1
    assert [(one["name"], one["judged"], one["with_labels"]) for one in found["people"]] == [
        ("ana", 4, 75),
        ("bo", 4, 50),
    ]


def test_three_people_have_fleiss_and_one_verdict_has_no_kappa(desk):
    for name in ("ana", "bo", "cy"):
        judge_all(desk, name, lambda item: "tie")
    found = desk.agreement()
    assert [len(one["people"]) for one in found["compared"]] == [2, 2, 2, 3]
    assert {(one["same"], one["kappa"], one["why"]) for one in found["compared"]} == {
        (100, None, "all verdicts are one and the same")
    }


def test_most_people_decide_by_what_happens_to_the_pair():
    assert majority(["tie", "both_bad", "chosen"]) == "tie"
    assert majority(["chosen", "rejected", "tie", "tie"]) == "tie"
    assert majority(["chosen", "tie"]) is None
    assert majority([]) is None


# Files


def groups_of(rows):
    return [
        JudgedGroup(
            row.prompt, (row.chosen, row.rejected), "p", 0, 1.0, 1.0, (row.margin + 1, 0.0), None, "j", (None, None)
        )
        for row in rows
    ]


POLICY = PolicyRef("p", "p", 0)
CONTEXT = RoundContext(0, 0, POLICY, POLICY)


def test_an_export_flows_into_the_pairs_and_survives_their_correction(tmp_path):
    groups = groups_of([pair(i) for i in range(4)])
    before = list(Ranked()(groups, CONTEXT))
    root = write_run(tmp_path / "run", before)
    effects = dict(
        zip([item.key for item in load_round(root).items], ("chosen", "rejected", "tie", "both_bad"), strict=True)
    )
    with open_store(root) as store:
        judge_all(Desk(load_round(root), store), "ana", lambda item: effects[item.key])
        done = export_verdicts(store, load_round(root), tmp_path / "c.jsonl")
    assert (done.lines, done.split, done.stale) == ({"keep": 1, "flip": 1, "drop": 2}, 0, 0)
    after = list(Corrected(corrections=str(tmp_path / "c.jsonl"))(groups, CONTEXT))
    assert [(p.chosen.text, p.flipped) for p in after] == [
        (before[0].chosen.text, False),
        (before[1].rejected.text, True),
    ]
    # The corrected pairs are judged on: what was said stays with the pair, and the next export holds all of it.
    write_run(root, after)
    with open_store(root) as store:
        desk = Desk(load_round(root), store)
        assert desk.next("ana")["progress"] == {"total": 2, "judged": 2, "skipped": 0}
        export_verdicts(store, desk.pairs, tmp_path / "d.jsonl")
    assert (tmp_path / "d.jsonl").read_text() == (tmp_path / "c.jsonl").read_text()
    assert list(Corrected(corrections=str(tmp_path / "d.jsonl"))(groups, CONTEXT)) == after


def test_verdicts_on_completions_that_were_made_again_are_left_out(run, tmp_path):
    with open_store(run) as store:
        judge_all(Desk(load_round(run), store), "ana", lambda item: "tie")
    write_run(run, [pair(0), pair(7), pair(8)], judged="made again")
    with open_store(run) as store:
        pairs = load_round(run)
        assert export_verdicts(store, pairs, tmp_path / "c.jsonl").stale == 5
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 1


def test_of_several_people_the_majority_is_exported_and_a_split_left_out(run, desk, tmp_path):
    keys = [item.key for item in desk.pairs.items]
    says = {"ana": "chosen", "bo": "rejected", "cy": "rejected"}
    for name, verdict in says.items():
        judge_all(desk, name, lambda item, v=verdict, n=name: v if item.key != keys[0] else "skip", 3)
    desk.undo("cy", event="undo-one", skipped=False)
    done = export_verdicts(desk.store, desk.pairs, tmp_path / "all.jsonl")
    assert (done.lines, done.split) == ({"keep": 0, "flip": 1, "drop": 0}, 1)
    (line,) = map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())
    assert line["verdict"] == "right"
    assert {who: one["verdict"] for who, one in line["annotators"].items()} == {
        "ana": "left",
        "bo": "right",
        "cy": "right",
    }
    assert export_verdicts(desk.store, desk.pairs, tmp_path / "ana.jsonl", "ana").lines["keep"] == 2
    with pytest.raises(ConfigError, match=r"ana\.jsonl: exists already"):
        export_verdicts(desk.store, desk.pairs, tmp_path / "ana.jsonl", "ana")
    with pytest.raises(DataError, match="no verdicts of nobody to write"):
        export_verdicts(desk.store, desk.pairs, tmp_path / "none.jsonl", "nobody")
    assert not (tmp_path / "none.jsonl").exists()


def test_an_export_imported_elsewhere_is_the_same_and_twice_is_once(run, desk, tmp_path):
    judge_all(desk, "ana", lambda item: "rejected", 4)
    judge_all(desk, "bo", lambda item: "rejected", 2)
    export_verdicts(desk.store, desk.pairs, tmp_path / "one.jsonl")
    other = write_run(tmp_path / "other", [pair(i) for i in range(6)])
    with open_store(other) as store:
        pairs = load_round(other)
        assert import_verdicts(store, pairs, tmp_path / "one.jsonl") == (6, 0)
        assert import_verdicts(store, pairs, tmp_path / "one.jsonl") == (0, 6)
        assert {(g.annotator, g.key, g.verdict) for g in store.given(0)} == {
            (g.annotator, g.key, g.verdict) for g in desk.store.given(0)
        }
        assert {g.origin for g in store.given(0)} == {"file one.jsonl"}
        assert not store.can_undo(0, "ana")


def test_a_line_by_id_means_the_side_that_its_id_says(run, desk, tmp_path):
    straight, turned = desk.pairs.items[:2]
    rows = [
        {"pair_id": straight.pair_ids[0], "verdict": "right"},
        {"pair_id": turned.pair_ids[1], "verdict": "right"},
    ]
    import_verdicts(desk.store, desk.pairs, write_jsonl(tmp_path / "c.jsonl", rows), "ana")
    assert {g.key: g.verdict for g in desk.store.given(0)} == {straight.key: "rejected", turned.key: "chosen"}


KNOWN = {"verdict": "left"}


@pytest.mark.parametrize(
    ("rows", "name", "kind", "message"),
    [
        ([KNOWN, {"pair_id": "nobody", "verdict": "left"}], "ana", DataError, r"has no pair nobody \(line 2\)"),
        (
            [KNOWN, {"prompt_id": "p", "left": "a", "right": "b", "verdict": "left"}],
            "ana",
            DataError,
            r"no pair of prompt p \(line 2\)",
        ),
        ([KNOWN], None, ConfigError, r"c\.jsonl:1: does not say whose verdict it is"),
        ([KNOWN | {"annotators": {"bo": {"verdict": "up"}}}], None, DataError, r"c\.jsonl:1: verdict of 'bo' must be"),
        ([KNOWN | {"annotators": ["bo"]}], None, DataError, "annotators must be an object"),
        ([KNOWN, KNOWN | {"by_text": True, "verdict": "right"}], "ana", DataError, "an earlier line of its own: ana"),
        ([KNOWN | {"verdict": "up"}], "ana", DataError, r"c\.jsonl:1: verdict must be one of"),
    ],
)
def test_a_wrong_file_changes_nothing(desk, tmp_path, rows, name, kind, message):
    item = desk.pairs.items[0]
    texts = {"prompt_id": item.prompt_id, "left": item.chosen, "right": item.rejected}
    lines = [
        {k: v for k, v in row.items() if k != "by_text"}
        | ({} if "pair_id" in row or "left" in row else texts if "by_text" in row else {"pair_id": item.pair_ids[0]})
        for row in rows
    ]
    file = write_jsonl(tmp_path / "c.jsonl", lines)
    with pytest.raises(kind, match=message):
        import_verdicts(desk.store, desk.pairs, file, name)
    assert desk.store.read("select count(*) from events") == [(0,)]


def test_a_file_that_contradicts_what_is_stored_changes_nothing(desk, tmp_path):
    judge_all(desk, "ana", lambda item: "chosen", 1)
    rows = [{"pair_id": item.pair_ids[0], "verdict": "right"} for item in desk.pairs.items]
    file = write_jsonl(tmp_path / "c.jsonl", rows)
    with pytest.raises(DataError, match=r"contradicts stored verdicts.*: ana on pair"):
        import_verdicts(desk.store, desk.pairs, file, "ana")
    assert len(desk.store.given(0)) == 1
    assert import_verdicts(desk.store, desk.pairs, file, "bo") == (6, 0)
    with pytest.raises(ConfigError, match=r"--import: .*none is not a file"):
        import_verdicts(desk.store, desk.pairs, tmp_path / "none")


def test_steps_after_different_beginnings_are_different_pairs(tmp_path):
    begun = [Completion(f"b{i}", f"beginning {i}", None, None, "stop", 0, "p") for i in range(2)]
    rows = [pair(0, "x", "y", prefix=begun[0]), pair(0, "x", "y", prefix=begun[1])]
    rows[1] = dataclasses.replace(rows[1], pair_id="second")
    root = write_run(tmp_path / "run", rows)
    with open_store(root) as store:
        desk = Desk(load_round(root), store)
        assert desk.next("ana")["pair"]["prefix"] in ("beginning 0", "beginning 1")
        judge_all(desk, "ana", lambda item: "chosen")
        export_verdicts(store, desk.pairs, tmp_path / "c.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert {line["pair_id"] for line in lines} == {rows[0].pair_id, "second"}


# The rule that takes corrections in


def test_without_corrections_the_pairs_are_those_of_the_other_rule():
    groups = groups_of([pair(i) for i in range(4)])
    rule = Corrected(of={"kind": "ranked", "min_margin": 2.5})
    plain = list(Ranked(min_margin=2.5)(groups, CONTEXT))
    assert [
        dataclasses.replace(p, builder=p.builder.removeprefix("corrected/")) for p in rule(groups, CONTEXT)
    ] == plain
    assert plain
    assert rule.settings == dataclasses.asdict(Ranked(min_margin=2.5))


def test_an_exchanged_pair_is_consistent(tmp_path):
    messages = (Message(VERBATIM, "Q"),)
    prompt = Prompt(prompt_id(messages), messages, None, "train", "test:1")
    sides = tuple(Completion(name, name, None, None, "stop", 0, "p") for name in ("good", "bad"))
    table = ((0.5, 0.8), (0.2, 0.5))
    group = JudgedGroup(prompt, sides, "p", 0, 1.0, 1.0, (1.0, 0.25), table, "j", (None, None))
    (plain,) = Ranked()([group], CONTEXT)
    file = write_jsonl(tmp_path / "c.jsonl", [{"pair_id": plain.pair_id, "verdict": "right"}])
    (turned,) = Corrected(corrections=str(file))([group], CONTEXT)
    assert (turned.chosen.text, turned.rejected.text, turned.flipped) == ("bad", "good", True)
    assert (turned.chosen_score, turned.rejected_score, turned.margin) == (0.25, 1.0, 0.0)
    assert turned.win_prob == pytest.approx(0.2)
    assert turned.builder == "corrected/ranked/best_vs_worst"
    assert turned.pair_id != plain.pair_id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"of": "rankd"}, r"pair_builder\.of \(pair/corrected\.py\): no pair rule 'rankd'"),
        ({"of": {"rule": "above_margin"}}, "no pair rule None"),
        ({"of": {"kind": "ranked", "rul": "x"}}, "ranked has no field 'rul'"),
        ({"of": {"kind": "ranked", "min_margin": "much"}}, r"ranked\.min_margin"),
        ({"of": {"kind": "unpaired"}}, "the pairs of unpaired cannot be exchanged"),
        ({"of": "revisions"}, "the pairs of revisions cannot be exchanged"),
        ({"of": "./nowhere.py:Rule"}, "nowhere.py cannot be read"),
        ({"corrections": "nowhere.jsonl"}, r"pair_builder\.corrections: nowhere\.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_corrected_is_refused_before_any_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        Corrected(**settings)


def test_a_pair_that_does_not_exist_is_an_error(tmp_path):
    file = write_jsonl(tmp_path / "c.jsonl", [{"pair_id": "nobody", "verdict": "tie"}])
    with pytest.raises(DataError, match=r"this round has no pair nobody \(line 1\)"):
        list(Corrected(corrections=str(file))(groups_of([pair(1)]), CONTEXT))
