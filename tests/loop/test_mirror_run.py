"""A run whose folder is lost at any moment goes on from its copy, and ends in the same bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from benchmarks.reliability.subject import METHOD, SETTINGS, outcome
from prefloop import mirror as mirror_module
from prefloop.errors import ConfigError, Interrupted
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.mirror import Mirror
from prefloop.protocols import Quiet

SMALL = [*SETTINGS, "rounds=2"]


class Said(Quiet):
    """Keeps the lines that stay."""

    def __init__(self) -> None:
        object.__setattr__(self, "lines", [])

    def say(self, text: str) -> None:
        self.lines.append(text)  # type: ignore[attr-defined]


def go(root: Path, address: str | None, *more: str, stop_at: int | None = None, **options: Any) -> list[str]:
    """Run, or run until the `stop_at`-th question whether to stop, and return what was said."""
    recipe, _ = read_recipe(METHOD, [*SMALL, *more])
    asked, said = iter(range(10**6)), Said()
    stop: Callable[[], bool] = lambda: stop_at is not None and next(asked) >= stop_at  # noqa: E731
    run(recipe, root, progress=said, stop=stop, mirror=address, **options)
    return said.lines  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def memory(monkeypatch):
    system = fsspec.filesystem("memory")
    system.store.clear()
    monkeypatch.setattr(mirror_module, "LOOK", 0.02)
    yield system
    system.store.clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "run"
    go(root, None)
    return root


def files(address: str) -> set[str]:
    system, root = fsspec.core.url_to_fs(address)
    return {name[len(root) + 1 :] for name in system.find(root)}


def test_a_lost_folder_comes_back_wherever_the_run_stopped(memory, whole, tmp_path, monkeypatch):
    # Not ending the copying is what a kill does: there is what the thread has sent until then.
    monkeypatch.setattr(Mirror, "end", lambda self, tries=0: self._halt())
    address, fetched, stop_at = "memory://bucket/run", [], 2
    for attempt in range(9):
        root = tmp_path / f"machine-{attempt}"
        try:
            lines = go(root, address, stop_at=stop_at)
        except Interrupted:
            lines = []
            shutil.rmtree(root)
            stop_at += 4
        else:
            break
        assert lines == []
    else:
        root = tmp_path / "last"
        lines = go(root, address)
    fetched += [line for line in lines if "finished stages fetched" in line]
    assert fetched
    assert not fetched[0].startswith("mirror: 0 ")
    assert outcome(root) == outcome(whole)


def test_the_copy_is_the_run_and_a_second_machine_makes_nothing_anew(memory, whole, tmp_path):
    address = "memory://bucket/run"
    go(tmp_path / "one", address)
    there = files(address)
    made = {str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*") if path.is_file()}
    beside = {name for name in made if name.endswith(("key.json", "parts.sha256")) or name == ".lock"}
    assert there == made - beside
    for name in ("summary.json", "round-001/5-policy/model.safetensors"):
        assert memory.cat(f"/bucket/run/{name}") == (tmp_path / "one" / name).read_bytes()
    shutil.rmtree(tmp_path / "one")
    lines = go(tmp_path / "two", address)
    assert f"mirror: {len([n for n in there if n.endswith('manifest.json')])} finished stages fetched" in lines
    assert not [line for line in lines if "not taken" in line]
    assert outcome(tmp_path / "two") == outcome(whole)


def test_what_is_damaged_there_is_not_taken_and_made_again(memory, whole, tmp_path):
    address = "memory://bucket/run"
    go(tmp_path / "one", address)
    path = "/bucket/run/round-000/1-samples"
    memory.pipe(f"{path}/part-00000.parquet", memory.cat(f"{path}/part-00000.parquet")[:-1])
    memory.rm("/bucket/run/round-000/3-pairs/part-00000.parquet")
    manifest = json.loads(memory.cat("/bucket/run/round-001/2-judged/manifest.json"))
    memory.pipe("/bucket/run/round-001/2-judged/manifest.json", json.dumps({**manifest, "rows": 7}).encode())
    lines = go(tmp_path / "two", address)
    assert sorted(line.split()[1] for line in lines if "is not whole there and not taken" in line) == [
        "round-000/1-samples",
        "round-000/3-pairs",
        "round-001/2-judged",
    ]
    assert outcome(tmp_path / "two") == outcome(whole)
    # The copy is whole again too.
    lines = go(tmp_path / "three", address)
    assert not [line for line in lines if "not taken" in line]
    assert outcome(tmp_path / "three") == outcome(whole)


def test_an_address_that_fails_does_not_stop_the_run_and_is_told(memory, whole, tmp_path, monkeypatch):
    address = "memory://bucket/run"
    put = type(memory).put

    def full(self: Any, *arguments: Any, **options: Any) -> None:
        raise PermissionError("no room in this bucket")

    monkeypatch.setattr(type(memory), "put", full)
    lines = go(tmp_path / "run", address)
    assert outcome(tmp_path / "run") == outcome(whole)
    assert "no room in this bucket" in lines[-1]
    assert "The same command completes it" in lines[-1]
    assert not [name for name in files(address) if name.endswith("manifest.json")]
    monkeypatch.setattr(type(memory), "put", put)
    go(tmp_path / "run", address)
    assert len([name for name in files(address) if name.endswith("manifest.json")]) > 10


def test_another_runs_address_and_other_settings_are_refused(memory, tmp_path):
    address = "memory://bucket/run"
    with pytest.raises(Interrupted):
        go(tmp_path / "one", address, stop_at=3)
    before = {name: memory.cat(f"/bucket/run/{name}") for name in files(address)}
    with pytest.raises(ConfigError, match=r"holds a run of other settings \(seed: 0 → 1\)\. Set them back"):
        go(tmp_path / "two", address, "seed=1")
    assert [path.name for path in (tmp_path / "two").iterdir()] == [".lock"]
    with pytest.raises(Interrupted):
        go(tmp_path / "three", None, stop_at=3)
    with pytest.raises(ConfigError, match="holds another run than"):
        go(tmp_path / "three", address)
    memory.pipe("/other/file.txt", b"mine")
    with pytest.raises(ConfigError, match="holds other files; choose an address that is empty"):
        go(tmp_path / "four", "memory://other")
    assert {name: memory.cat(f"/bucket/run/{name}") for name in files(address)} == before


def test_a_redone_stage_replaces_its_copy(memory, tmp_path):
    address = f"file://{tmp_path}/there"
    with pytest.raises(Interrupted):
        go(tmp_path / "one", address, stop_at=12)
    go(tmp_path / "one", address, "train.learning_rate=1e-3", redo=True)
    lines = go(tmp_path / "two", address, "train.learning_rate=1e-3")
    assert not [line for line in lines if "not taken" in line]
    made = {name: digest for name, digest in outcome(tmp_path / "one").items() if ".replaced-" not in name}
    assert outcome(tmp_path / "two") == made


def test_a_process_that_another_has_replaced_stops_copying(memory, tmp_path):
    recipe, _ = read_recipe(METHOD, SMALL)
    address, said = "memory://bucket/run", []
    with mirror_module.mirrored(address, tmp_path / "one", recipe, False, said.append) as old:
        with mirror_module.mirrored(address, tmp_path / "two", recipe, False, lambda _: None) as new:
            (tmp_path / "two" / "summary.json").write_text("{}")
            assert new.end() is None
        (tmp_path / "one" / "summary.json").write_text('{"of": "one"}')
        assert "is another process's now" in str(old.end())
    assert memory.cat("/bucket/run/summary.json") == b"{}"
    assert "another process copies to memory://bucket/run now" in said[0]
