"""What of an unfinished stage is copied, fetched and believed; policies at addresses."""

import sqlite3
from pathlib import Path

import fsspec
import pytest
import torch

from prefloop import mirror as mirror_module
from prefloop.artifact import Building, Key, open_artifact
from prefloop.errors import ConfigError, CorruptArtifact
from prefloop.inputs import policy_folder
from prefloop.mirror import mirrored
from prefloop.mirror_fetch import COPIES, fetch
from prefloop.recipe import Layers, Recipe, build_recipe
from prefloop.remote import CACHE, Place, fetched_folder
from prefloop.rows import TRAIN, Message, Prompt
from prefloop.train.checkpoint import TrainingState, save_state
from prefloop.train.states import STATES
from tiny import newest, save_tiny_policy

ADDRESS = "memory://bucket/run"
ROWS = [Prompt(f"{i:016x}", (Message("text", f"p {i}"),), None, TRAIN, f"f:{i}") for i in range(6)]
KEY = Key("policy", {"seed": 1})


@pytest.fixture
def memory(monkeypatch):
    system = fsspec.filesystem("memory")
    system.store.clear()
    monkeypatch.setattr(mirror_module, "LOOK", 0.01)
    yield system
    system.store.clear()


def copy(root: Path) -> None:
    with mirrored(ADDRESS, root, Recipe(), False, lambda _: None):
        pass


def back(root: Path) -> list[str]:
    said: list[str] = []
    fetch(Place(ADDRESS), root, said.append)
    return said


def begun(root: Path) -> Building[Prompt]:
    building = open_artifact(root / "round-000" / "1-samples", KEY, Prompt)
    assert isinstance(building, Building)
    for number in range(3):
        building.write_part(number, ROWS[2 * number : 2 * number + 2])
    return building


def test_whole_parts_of_an_unfinished_stage_come_back(memory, tmp_path):
    begun(tmp_path / "one")
    copy(tmp_path / "one")
    part = "/bucket/run/round-000/1-samples/part-00001.parquet"
    memory.pipe(part, memory.cat(part)[:-1])
    back(tmp_path / "two")
    found = open_artifact(tmp_path / "two" / "round-000" / "1-samples", KEY, Prompt)
    assert isinstance(found, Building)
    assert [found.has_part(number) for number in range(3)] == [True, False, True]
    found.write_part(1, ROWS[2:4])
    assert list(found.finish()) == ROWS


def test_a_part_that_is_not_what_was_noted_is_never_sent(memory, tmp_path):
    begun(tmp_path / "one")
    part = tmp_path / "one" / "round-000" / "1-samples" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    copy(tmp_path / "one")
    assert not memory.exists("/bucket/run/round-000/1-samples/parts.sha256")


def test_a_finished_stage_leaves_no_more_than_its_files_at_the_address(memory, tmp_path):
    building = begun(tmp_path / "one")
    copy(tmp_path / "one")
    assert memory.exists("/bucket/run/round-000/1-samples/key.json")
    building.finish()
    copy(tmp_path / "one")
    names = {name.rpartition("/")[2] for name in memory.find("/bucket/run/round-000/1-samples")}
    assert names == {"manifest.json", *(f"part-0000{number}.parquet" for number in range(3))}


def state(step: int) -> TrainingState:
    return TrainingState(step, {"w": torch.full((3,), float(step))}, {"w.step": torch.tensor(step)}, [])


def test_training_states_come_back_the_newest_whole_one_counts(memory, tmp_path):
    folder = tmp_path / "one" / "round-000" / "5-policy"
    open_artifact(folder, KEY, Prompt)
    for step in (1, 2):
        save_state(folder / STATES, state(step))
        copy(tmp_path / "one")
    save_state(folder / STATES, state(3))
    copy(tmp_path / "one")
    there = memory.find("/bucket/run/round-000/5-policy/.state")
    assert {name.split("/")[-2] for name in there} == {"step-00000002", "step-00000003"}
    back(tmp_path / "two")
    found = newest(tmp_path / "two" / "round-000" / "5-policy" / STATES)
    assert found is not None
    assert (found.step, found.weights["w"].tolist()) == (3, [3.0] * 3)
    memory.pipe("/bucket/run/round-000/5-policy/.state/step-00000003/weights.safetensors", b"cut")
    back(tmp_path / "three")
    found = newest(tmp_path / "three" / "round-000" / "5-policy" / STATES)
    assert found is not None
    assert found.step == 2


def test_states_of_an_unknown_key_are_not_taken(memory, tmp_path):
    folder = tmp_path / "one" / "round-000" / "5-policy"
    open_artifact(folder, KEY, Prompt)
    save_state(folder / STATES, state(1))
    copy(tmp_path / "one")
    memory.pipe("/bucket/run/round-000/5-policy/key.json", b'{"stage": "policy"}')
    (said,) = back(tmp_path / "two")
    assert said.startswith("mirror: round-000/5-policy is not whole there and not taken (memory://bucket/run/round-000")
    assert not list((tmp_path / "two").rglob("*.safetensors"))


def test_names_that_lead_out_of_the_run_folder_are_not_followed(memory, tmp_path):
    begun(tmp_path / "one").finish()
    copy(tmp_path / "one")
    for name in list(memory.find("/bucket/run/round-000/1-samples")):
        memory.pipe(name.replace("/round-000/", "/round-000/.../"), memory.cat(name))
        memory.pipe(name.replace("/round-000/", "/elsewhere/"), memory.cat(name))
    back(tmp_path / "two")
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["round-000"]
    assert [path.name for path in (tmp_path / "two" / "round-000").iterdir()] == ["1-samples"]


def test_what_judges_were_paid_for_and_people_have_said_comes_back(memory, tmp_path):
    path = tmp_path / "one" / "judge-store" / "verdicts.sqlite"
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as open_still:
        open_still.execute("pragma journal_mode=wal")
        open_still.execute("create table replies (reply text)")
        for number in range(3):
            open_still.execute("insert into replies values (?)", (f"reply {number}",))
            open_still.commit()
            copy(tmp_path / "one")
    back(tmp_path / "two")
    found = sqlite3.connect(tmp_path / "two" / "judge-store" / "verdicts.sqlite").execute("select * from replies")
    assert [row[0] for row in found] == ["reply 0", "reply 1", "reply 2"]
    found.connection.close()
    open_still.close()
    (one,) = memory.find("/bucket/run/judge-store")  # earlier copies are gone
    memory.pipe(one, memory.cat(one)[:-1])
    assert back(tmp_path / "three") == ["mirror: judge-store/verdicts.sqlite is not whole there and not taken"]
    assert memory.exists(f"/bucket/run/{COPIES}")


def with_policy(path: str, **more: str) -> Recipe:
    layers = Layers()
    layers.overlay({"policy": {"path": path, **more}}, "test")
    return build_recipe(layers)


def test_a_policy_at_an_address_is_fetched_once_and_again_when_it_changes(memory, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    own = save_tiny_policy(tmp_path / "own")
    memory.put(str(own), "/bucket/policy", recursive=True)
    gets: list[object] = []
    get = type(memory).get
    monkeypatch.setattr(type(memory), "get", lambda self, *a, **k: (gets.append(a), get(self, *a, **k))[1])
    folder = policy_folder(with_policy("memory://bucket/policy"))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in own.iterdir()}
    assert policy_folder(with_policy("memory://bucket/policy")) == folder
    assert len(gets) == 1
    memory.pipe("/bucket/policy/generation_config.json", b'{"max_length": 7}')
    assert (policy_folder(with_policy("memory://bucket/policy")) / "generation_config.json").read_bytes()[-3:] == b" 7}"
    (folder / "config.json").write_text("{}")  # damaged on this machine
    assert policy_folder(with_policy("memory://bucket/policy/")) == folder
    assert (folder / "config.json").read_bytes() == (own / "config.json").read_bytes()
    assert len(gets) == 3


def test_a_policy_that_is_not_there_or_not_whole_is_refused(memory, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="memory://bucket/none: no such folder, or an empty one"):
        policy_folder(with_policy("memory://bucket/none"))
    with pytest.raises(ConfigError, match=r"policy\.revision: memory://bucket/p is no hub id; leave it out"):
        policy_folder(with_policy("memory://bucket/p", revision="main"))
    begun(tmp_path / "one").finish()
    copy(tmp_path / "one")
    memory.pipe("/bucket/run/round-000/1-samples/part-00001.parquet", b"other")
    with pytest.raises(CorruptArtifact, match=r"part-00001\.parquet: its bytes differ from manifest\.json"):
        fetched_folder(f"{ADDRESS}/round-000/1-samples")
    assert not list((tmp_path / "cache").rglob("*.parquet"))
