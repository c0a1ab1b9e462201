import json
import multiprocessing
import os

import pytest

from prefloop.artifact import (
    Artifact,
    Building,
    Key,
    load_artifact,
    locked,
    open_artifact,
    replacing,
    write_json,
)
from prefloop.errors import CorruptArtifact, RunLocked, StaleArtifact
from prefloop.rows import Message

ROWS = [Message("user", "one"), Message("user", "two")]


def key(**settings: object) -> Key:
    return Key("samples", settings, {"prompts": "abc"})


def make(path, **settings):
    building = open_artifact(path, key(**settings), Message)
    assert isinstance(building, Building)
    for index, row in enumerate(ROWS):
        building.write_part(index, [row])
    return building.finish({"tokens": 5})


def test_finished_artifact_is_reused(tmp_path):
    made = make(tmp_path / "a", temperature=1.0)
    again = open_artifact(tmp_path / "a", key(temperature=1.0), Message)
    assert isinstance(again, Artifact)
    assert list(again) == ROWS
    assert (again.digest, again.rows, again.facts) == (made.digest, 2, {"tokens": 5})


def test_the_digest_depends_on_content_and_key_only(tmp_path):
    first, second = make(tmp_path / "a", t=1), make(tmp_path / "b", t=1)
    assert first.digest == second.digest
    assert make(tmp_path / "c", t=2).digest != first.digest


def test_missing_parts_are_made_under_the_same_key(tmp_path):
    building = open_artifact(tmp_path / "a", key(t=1), Message)
    building.write_part(0, ROWS[:1])
    again = open_artifact(tmp_path / "a", key(t=1), Message)
    assert isinstance(again, Building)
    assert again.has_part(0)
    assert not again.has_part(1)


@pytest.mark.parametrize("finished", [True, False])
def test_another_key_is_refused_and_names_the_setting(tmp_path, finished):
    path = tmp_path / "a"
    if finished:
        make(path, sampler={"temperature": 1.0, "top_p": 0.9})
    else:
        open_artifact(path, key(sampler={"temperature": 1.0, "top_p": 0.9}), Message)
    with pytest.raises(StaleArtifact, match=r"sampler\.temperature: 1\.0 → 0\.7") as error:
        open_artifact(path, key(sampler={"temperature": 0.7, "top_p": 0.9}), Message)
    assert "top_p" not in str(error.value)
    assert "--redo" in str(error.value)


def test_a_changed_input_is_named(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(StaleArtifact, match="changed input: prompts"):
        open_artifact(tmp_path / "a", Key("samples", {}, {"prompts": "other"}), Message)


def test_replace_moves_the_old_result_aside(tmp_path):
    make(tmp_path / "a", t=1)
    opened = open_artifact(tmp_path / "a", key(t=2), Message, replace=True)
    assert isinstance(opened, Building)
    assert not opened.has_part(0)
    assert list(load_artifact(tmp_path / "a.replaced-1", Message)) == ROWS


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damaged_parts_are_found_when_read(tmp_path, damage):
    artifact = make(tmp_path / "a")
    part = tmp_path / "a" / "part-00001.parquet"
    data = bytearray(part.read_bytes())
    if damage == "truncate":
        part.write_bytes(data[:-1])
    elif damage == "flip":
        data[20] ^= 1
        part.write_bytes(data)
    else:
        part.unlink()
    with pytest.raises(CorruptArtifact, match="part-00001"):
        list(artifact)


def test_a_damaged_manifest_is_named(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(CorruptArtifact, match=r"manifest\.json"):
        open_artifact(tmp_path / "a", key(), Message)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_leftovers_of_a_kill_are_removed(tmp_path):
    open_artifact(tmp_path / "a", key(), Message)
    (tmp_path / "a" / ".writing-part-00000.parquet").write_text("half")
    building = open_artifact(tmp_path / "a", key(), Message)
    assert not list((tmp_path / "a").glob(".writing*"))
    assert not building.has_part(0)


def hold(root, ready, done):
    with locked(root):
        ready.set()
        done.wait(20)


def test_a_second_process_is_refused(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Event()
    process = spawn.Process(target=hold, args=(tmp_path, ready, done))
    process.start()
    try:
        assert ready.wait(20)
        with pytest.raises(RunLocked, match=f"process {process.pid}"), locked(tmp_path):
            pass
    finally:
        done.set()
        process.join()
    with locked(tmp_path):
        pass
