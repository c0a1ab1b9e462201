"""Prompts on disk against all of them in memory, as `benchmarks.plain_prompts` reads them."""

import gc
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plain_prompts import read_plainly, shuffled
from prefloop import spool
from prefloop.artifact import Key, open_artifact
from prefloop.prompts.choice import Margins, by_id, drawn, first_by_id
from prefloop.prompts.dataset import PromptSet, read_prompts
from prefloop.prompts.domains import Domains
from prefloop.prompts.easy_first import EasyFirst
from prefloop.prompts.shuffled import Shuffled
from prefloop.prompts.store import MadePrompts, ids_of, index_of, pick, sides_of
from prefloop.protocols import Allotment
from prefloop.rows import HOLDOUT, TRAIN, Message, Prompt, digest_of, digest_of_list
from prefloop.spool import Spool
from prefloop.stages import prompt_parts
from tiny import SHARED, needs_shared, write_jsonl


@pytest.fixture(params=[4096, 7, 1])
def in_memory(request, monkeypatch) -> int:
    """How many records a spool holds before it writes them."""
    monkeypatch.setattr(spool, "ROWS", request.param)
    monkeypatch.setattr(spool, "AT_ONCE", 5)
    return request.param


def rows(count: int = 300) -> list[dict]:
    """Rows of all kinds, repeated near and far: conversations, gold answers, labels, ratings, origins, odd signs."""
    draw = random.Random(0)
    texts = [f"prompt {i} \u2028 ü \U0001f600 {'x' * (i % 40)}" for i in range(count // 3)]
    found = []
    for _ in range(count):
        row: dict = {"prompt": draw.choice(texts), "source": draw.choice(["a", "b", None])}
        kind = draw.randrange(5)
        if kind == 0:
            row |= {"completion": f"text {draw.randrange(4)}", "label": draw.random() < 0.5}
        elif kind == 1:
            row |= {"chosen": "yes", "rejected": f"no {draw.randrange(3)}"}
        elif kind == 2:
            row |= {"gold": f"gold {draw.randrange(2)}"}
        elif kind == 3:
            row |= {"prompt": [{"role": "user", "content": row["prompt"]}]}
        else:
            row |= {"completions": ["a", "b", "a"], "scores": [0.1, None, 3]}
        found.append(row)
    return found


def assert_same(path: Path, **options: str) -> PromptSet:
    found, (prompts, dropped) = read_prompts(str(path), **options), read_plainly(str(path), **options)
    assert list(found.prompts) == prompts
    assert [found.prompts[i] for i in range(len(prompts))] == prompts
    assert found.dropped == dropped
    assert list(found.train) == [p for p in prompts if p.split == TRAIN]
    assert list(found.holdout) == [p for p in prompts if p.split == HOLDOUT]
    return found


def test_rows_of_all_kinds_are_read_as_in_memory(tmp_path, in_memory):
    path = write_jsonl(tmp_path / "p.jsonl", rows())
    found = assert_same(path)
    assert "duplicate prompts dropped" in found.dropped[0]
    assert "with another gold answer" in found.dropped[0]
    assert max(len(p.candidates) for p in found.prompts) > 3  # labelled rows were put together


@needs_shared
@pytest.mark.parametrize(
    ("name", "column"),
    [("gsm8k/train.jsonl", "question"), ("llmbar/natural.json", "input"), ("prompts/ifeval_en_input.jsonl", "prompt")],
)
def test_real_data_are_read_as_in_memory_and_rounds_take_the_same(name, column, monkeypatch):
    monkeypatch.setattr(spool, "ROWS", 64)
    found = assert_same(SHARED / name, column=column)
    train = list(found.train)
    for number in range(3):
        taken = Shuffled()(found.train, Allotment(number, 3, 40, 5, {}))
        assert list(taken) == shuffled(train, 5, 40 * number, min(40, len(train)))
    assert list(Shuffled()(found.train, Allotment(1, 3, None, 5, {}))) == shuffled(train, 5, len(train), len(train))
    assert list(first_by_id(found.holdout, 9)) == sorted(found.holdout, key=lambda p: p.prompt_id)[:9]


def test_orders_take_what_sorting_all_prompts_takes(tmp_path, in_memory):
    path = write_jsonl(tmp_path / "p.jsonl", [{**row, "source": row["source"] or "c"} for row in rows()])
    found = read_prompts(str(path)).prompts
    prompts, draw = list(found), random.Random(1)
    margins = {p.prompt_id: draw.choice([-1.5, 0.0, 2.0, draw.random()]) for p in prompts}
    ranked = sorted(prompts, key=lambda p: (-margins[p.prompt_id], p.prompt_id))
    stored = Margins(margins.items())
    for number in range(3):
        share = ranked[len(ranked) * number // 3 : len(ranked) * (number + 1) // 3]
        assert list(EasyFirst(by="margin")(found, Allotment(number, 3, None, 0, stored))) == share
        taken = Domains()(found, Allotment(number, 3, 10, 7, {}))
        name = list(dict.fromkeys(p.origin for p in prompts))[number]
        wanted = sorted((p for p in prompts if p.origin == name), key=lambda p: digest_of(7, p.prompt_id))
        assert list(taken) == wanted[:10]
        ask = Allotment(number, 3, None, 0, margins)
        assert list(EasyFirst()(found, Allotment(number, 3, None, 0, stored))) == list(EasyFirst()(prompts, ask))


def test_digests_are_those_of_whole_lists(tmp_path, in_memory):
    found = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows()))).prompts
    assert digest_of_list(ids_of(found)) == digest_of([p.prompt_id for p in found])
    assert digest_of_list(sides_of(found)) == digest_of([(p.prompt_id, p.split) for p in found])
    texts = [(p.prompt_id, [c.text for c in p.candidates]) for p in found]
    assert digest_of_list(iter(texts)) == digest_of(texts)
    margins = {p.prompt_id: i / 7 for i, p in enumerate(found)}
    assert digest_of_list(by_id(Margins(margins.items()))) == digest_of(sorted(margins.items()))
    assert digest_of_list([]) == digest_of([])
    assert digest_of_list(range(5000)) == digest_of(list(range(5000)))
    assert digest_of_list(["\ud800", "é"]) == digest_of(["\ud800", "é"])


def test_margins_are_found_by_id_and_the_last_of_an_id_counts():
    margins = Margins([("00000000000000ff", 1.0), ("ffffffffffffffff", 2.0), ("00000000000000ff", 3.0)])
    assert dict(margins) == {"00000000000000ff": 3.0, "ffffffffffffffff": 2.0}
    assert "0000000000000001" not in margins
    assert dict(Margins([])) == {}


def test_an_artifact_of_prompts_has_parts_and_is_read_back(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr("prefloop.stages.PROMPTS_PER_PART", 30)
    found = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows()))).prompts
    opened = open_artifact(tmp_path / "prompts", Key("prompts", {}), Prompt)
    for number, part in enumerate(prompt_parts(found)):
        opened.write_part(number, part)
    made = MadePrompts(opened.finish())
    assert len(list((tmp_path / "prompts").glob("part-*"))) > 2
    assert made == found
    assert list(ids_of(made)) == [p.prompt_id for p in found]
    for name in ("ids", "held_out", "has_gold", "origins"):
        assert np.array_equal(getattr(index_of(made), name), getattr(index_of(list(found)), name)), name
    assert [p.source for p in made[::-7]] == [p.source for p in list(found)[::-7]]
    assert made[-1] == found[-1]
    with pytest.raises(IndexError):
        made[len(made)]


def test_parts_are_cut_by_characters_too(monkeypatch):
    monkeypatch.setattr("prefloop.stages.CHARACTERS_PER_PART", 100)
    prompts = [Prompt(f"{i:016x}", (Message("text", "x" * 60),), None, TRAIN, "f") for i in range(5)]
    assert [len(part) for part in prompt_parts(prompts)] == [2, 2, 1]
    assert [len(part) for part in prompt_parts([])] == [0]


def test_views_of_views_read_the_same_prompts(tmp_path, in_memory):
    found = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows()))).prompts
    plain = list(found)
    assert found[10:50][::3][2:] == plain[10:50][::3][2:]
    assert plain[10:13] == found[10:13]
    assert found[10:13] != plain[11:14]
    assert list(pick(plain, drawn(plain, 3))) == list(pick(found, drawn(found, 3)))
    assert found[0:0] == []


def test_a_spool_gives_back_what_was_appended(in_memory):
    numbers: Spool[int] = Spool(lambda number: b"%d" % number, int)
    for number in range(100):
        numbers.append(number)
        assert numbers[number] == number
        assert numbers[number // 2] == number // 2
    assert list(numbers) == list(range(100))
    assert numbers[-3:] == [97, 98, 99]
    assert len(numbers) == 100
    with pytest.raises(IndexError):
        numbers[100]


def test_long_texts_are_written_before_there_are_many(monkeypatch):
    monkeypatch.setattr(spool, "CHARACTERS", 1000)
    texts: Spool[str] = Spool(str.encode, bytes.decode)
    for number in range(8):
        texts.append(f"{number}" * 600, 600)
    assert len(texts._tail) == 0
    assert [text[0] for text in texts] == list("01234567")


def test_a_full_disk_is_told_with_the_place(monkeypatch, tmp_path):
    monkeypatch.setattr(spool, "ROWS", 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    numbers: Spool[int] = Spool(lambda number: b"%d" % number, int)
    numbers.append(1)
    with pytest.raises(OSError, match=r"gone \(TMPDIR\)"):
        numbers.append(2)


def test_nothing_is_left_where_temporary_files_lie(monkeypatch, tmp_path):
    monkeypatch.setattr(spool, "ROWS", 4)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = write_jsonl(tmp_path / "p.jsonl", rows())
    assert len(read_prompts(str(path)).prompts) > 50
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


def test_few_prompts_are_objects_and_the_index_takes_few_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "ROWS", 32)
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"{i} {'word ' * 20}"} for i in range(2000)])
    found = read_prompts(str(path)).prompts
    gc.collect()
    alive = [one for one in gc.get_objects() if type(one) is Prompt and one.source.startswith(f"{path}:")]
    assert len(found) == 2000
    assert len(alive) <= 32
    known = index_of(found)
    assert known.ids.nbytes + known.held_out.nbytes + known.has_gold.nbytes + known.origins.nbytes == 14 * 2000
