"""A few trials of the fault harness (`make faults` makes hundreds), and what each defence does by itself."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reliability.records import read
from benchmarks.reliability.victims import ROOT
from prefloop import disk
from prefloop.artifact import Artifact, Building, Key, load_artifact, open_artifact, read_manifest
from prefloop.disk import locked, machine_errors, native_writes, seal_holds, seal_text
from prefloop.errors import ConfigError, CorruptArtifact, MachineFailed
from prefloop.repair import move_damaged
from prefloop.rows import Message

KEY = Key("samples", {"temperature": 1.0}, {"prompts": "abc"})
ROWS = [Message("user", "one"), Message("user", "two")]


@pytest.mark.slow
def test_a_few_faults_of_most_kinds_are_survived(tmp_path):
    words = ["-m", "benchmarks.reliability", "--quick", "--out", tmp_path / "out", "--page", tmp_path / "page.md"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    found = read(tmp_path / "out" / "results.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(o.survived and o.faults and not o.lost for o in found)
    assert len({o.kind for o in found}) >= 8
    assert "| **all kills** |" in (tmp_path / "page.md").read_text(encoding="utf-8")


def unfinished(path: Path) -> Building[Message]:
    building = open_artifact(path, KEY, Message)
    assert isinstance(building, Building)
    return building


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_changed_part_of_an_unfinished_artifact_is_made_again(tmp_path):
    building = unfinished(tmp_path / "start")
    for index, row in enumerate(ROWS):
        building.write_part(index, [row])
    flip(tmp_path / "start" / "part-00000.parquet", 30)
    again = unfinished(tmp_path / "start")
    assert [again.has_part(i) for i in range(3)] == [False, True, False]
    (said,) = move_damaged(tmp_path)
    assert "start/part-00000.parquet is damaged" in said
    assert (tmp_path / "damaged" / "start.part-00000.parquet-1").is_file()
    again.write_part(0, ROWS[:1])
    assert list(again.finish()) == ROWS


def test_a_part_that_changes_before_the_manifest_is_an_error(tmp_path):
    building = unfinished(tmp_path / "a")
    building.write_part(0, ROWS)
    flip(tmp_path / "a" / "part-00000.parquet", 30)
    with pytest.raises(CorruptArtifact, match=r"part-00000\.parquet: changed after it was written"):
        building.finish()


def test_parts_of_an_unknown_key_are_set_aside(tmp_path):
    unfinished(tmp_path / "a").write_part(0, ROWS)
    (tmp_path / "a" / "key.json").unlink()
    assert not unfinished(tmp_path / "a").has_part(0)
    assert (tmp_path / "a.damaged-1" / "part-00000.parquet").is_file()


@pytest.mark.parametrize("finished", [True, False])
def test_a_bit_of_a_setting_fact_or_count_does_not_change_unnoticed(tmp_path, finished):
    building = unfinished(tmp_path / "a")
    if finished:
        building.write_part(0, ROWS)
        building.finish({"accepted": 0.5, "policy": "abc"})
    path = tmp_path / "a" / ("manifest.json" if finished else "key.json")
    whole, noticed = path.read_bytes(), 0
    for place in range(len(whole)):
        flip(path, place)
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            pass
        else:  # still JSON: only the check can tell
            if json.loads(path.read_bytes()) != json.loads(whole):
                noticed += 1
                with pytest.raises(CorruptArtifact):
                    open_artifact(tmp_path / "a", KEY, Message)
        path.write_bytes(whole)
    assert noticed > (200 if finished else 40)
    assert isinstance(open_artifact(tmp_path / "a", KEY, Message), Artifact if finished else Building)


def test_a_manifest_of_an_older_version_is_read(tmp_path):
    building = unfinished(tmp_path / "a")
    building.write_part(0, ROWS)
    building.finish()
    path = tmp_path / "a" / "manifest.json"
    old = {name: value for name, value in json.loads(path.read_text()).items() if name != "check"}
    path.write_text(json.dumps(old))
    assert read_manifest(tmp_path / "a") == old
    path.write_text(json.dumps({**old, "chfck": "0"}))
    with pytest.raises(CorruptArtifact, match="changed after it was written"):
        load_artifact(tmp_path / "a", Message)


def test_a_line_that_a_kill_cut_off_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "parts.sha256"
    disk.note_line(path, "one")
    with path.open("ab") as file:
        file.write(b"tw")
    disk.note_line(path, "three")
    assert path.read_text().splitlines() == ["one", "tw", "three"]


def test_a_sealed_text_holds_until_it_changes(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(seal_text("a\nb", "<!-- {} -->"), encoding="utf-8")
    assert seal_holds(path, "<!-- {} -->")
    for place in range(path.stat().st_size):
        flip(path, place)
        assert not seal_holds(path, "<!-- {} -->")
        flip(path, place)
    path.write_bytes(b"")
    assert not seal_holds(path, "<!-- {} -->")


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(disk.fcntl, "flock", flock)
    with pytest.raises(ConfigError, match="has no file locks"), locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/r/x"), "/r/x: No space left on device; make room"),
        (OSError(errno.EROFS, "Read-only file system", "/r/x"), "mount it for writing"),
        (MemoryError(), "memory ran out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory ran out"),
        (RuntimeError("can't start new thread"), "memory ran out"),
    ],
)
def test_a_machine_that_fails_is_told_with_a_remedy(error, words):
    with (
        pytest.raises(MachineFailed, match=words.replace("/", "."), check=lambda e: e.exit_code == 74),
        machine_errors(),
    ):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "no", "x")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as found, machine_errors():
        raise error
    assert found.value is error


def test_what_rust_says_of_a_full_disk_becomes_pythons_word(tmp_path):
    full = pytest.raises(OSError, match="No space", check=lambda e: e.errno == errno.ENOSPC)
    with full, native_writes(tmp_path / "model.safetensors"):
        raise Exception("No space left on device (os error 28)")
