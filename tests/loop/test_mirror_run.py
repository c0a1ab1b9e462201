"""A run whose folder is lost at any moment goes on from its copy, and ends in the same bytes."""

import hashlib
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
from prefloop.mirror_fetch import fetch
from prefloop.protocols import Quiet
from prefloop.remote import Place

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
    """A run that was neither copied nor interrupted."""
    root = tmp_path_factory.mktemp("whole") / "run"
    go(root, None)
    return root


@pytest.fixture(scope="module")
def copied(tmp_path_factory, whole) -> tuple[Path, dict[str, bytes]]:
    """A run that is copied once it is done, and what is at the address."""
    system, root = fsspec.filesystem("memory"), tmp_path_factory.mktemp("copied") / "run"
    shutil.copytree(whole, root)
    go(root, "memory://bucket/run")
    there = {name: system.cat(name) for name in system.find("/bucket/run")}
    system.store.clear()
    return root, there


@pytest.fixture
def again(memory, copied):
    """The address as it was when the copied run had ended."""
    for name, data in copied[1].items():
        memory.pipe(name, data)
    return memory


def files(address: str) -> set[str]:
    system, root = fsspec.core.url_to_fs(address)
    return {name[len(root) + 1 :] for name in system.find(root)}


def test_a_lost_folder_comes_back_wherever_the_run_stopped(memory, whole, tmp_path, monkeypatch):
    # Not ending the copying is what a kill does: there is what the thread has sent until then.
    monkeypatch.setattr(Mirror, "end", lambda self, tries=0: self._halt())
    address = "memory://bucket/run"
    for stop_at in (3, 10, 16):
        with pytest.raises(Interrupted):
            go(tmp_path / f"{stop_at}", address, stop_at=stop_at)
        shutil.rmtree(tmp_path / f"{stop_at}")
    lines = go(tmp_path / "last", address)
    fetched = next(line for line in lines if "finished stages fetched" in line)
    assert int(fetched.split()[1]) > 5
    assert outcome(tmp_path / "last") == outcome(whole)
    monkeypatch.undo()
    go(tmp_path / "last", address)
    made = {str(path.relative_to(tmp_path / "last")) for path in (tmp_path / "last").rglob("*") if path.is_file()}
    assert files(address) == {n for n in made if not n.endswith(("key.json", "parts.sha256")) and n != ".lock"}


def test_the_copy_is_the_run_and_a_second_machine_makes_nothing_anew(again, copied, whole, tmp_path):
    root, there = copied[0], {name.removeprefix("/bucket/run/") for name in copied[1]}
    made = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert there == {n for n in made if not n.endswith(("key.json", "parts.sha256")) and n != ".lock"}
    for name in there - {"mirror.json"}:
        assert copied[1][f"/bucket/run/{name}"] == (root / name).read_bytes()
    lines = go(tmp_path / "two", "memory://bucket/run")
    assert f"mirror: {len([n for n in there if n.endswith('manifest.json')])} finished stages fetched" in lines
    assert not [line for line in lines if "not taken" in line]
    assert outcome(tmp_path / "two") == outcome(whole)
    for name in (n for n in made if n.endswith(("key.json", "parts.sha256"))):
        assert (tmp_path / "two" / name).read_bytes() == (root / name).read_bytes()


def test_a_fetch_that_breaks_off_goes_on(again, whole, tmp_path, monkeypatch):
    get, calls = Place.get, iter(range(10**6))

    def breaks(self: Place, wanted: Any) -> None:
        if next(calls) == 15:
            raise ConfigError("the line is down")
        get(self, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "get", breaks)
        with pytest.raises(ConfigError, match="the line is down"):
            go(tmp_path / "two", "memory://bucket/run")
    there = len(list((tmp_path / "two").rglob("manifest.json")))
    lines = go(tmp_path / "two", "memory://bucket/run")
    fetched = next(int(line.split()[1]) for line in lines if "finished stages fetched" in line)
    total = len([name for name in files("memory://bucket/run") if name.endswith("manifest.json")])
    assert (there > 2, there - 1 <= total - fetched <= there) == (True, True)  # one may have been half-fetched
    assert outcome(tmp_path / "two") == outcome(whole)
    assert not (tmp_path / "two" / ".fetching").exists()


def test_what_is_damaged_there_is_not_taken_and_made_again(again, whole, tmp_path):
    path = "/bucket/run/round-000/1-samples"
    again.pipe(f"{path}/part-00000.parquet", again.cat(f"{path}/part-00000.parquet")[:-1])
    again.rm("/bucket/run/round-000/3-pairs/part-00000.parquet")
    manifest = json.loads(again.cat("/bucket/run/round-001/2-judged/manifest.json"))
    again.pipe("/bucket/run/round-001/2-judged/manifest.json", json.dumps({**manifest, "rows": 7}).encode())
    lines = go(tmp_path / "two", "memory://bucket/run")
    assert sorted(line.split()[1] for line in lines if "is not whole there and not taken" in line) == [
        "round-000/1-samples",
        "round-000/3-pairs",
        "round-001/2-judged",
    ]
    assert outcome(tmp_path / "two") == outcome(whole)
    said: list[str] = []
    fetch(Place("memory://bucket/run"), tmp_path / "three", said.append)
    assert said == []  # the copy is whole again too
    assert {n: d for n, d in outcome(whole).items() if n != "summary"}.items() <= digests(tmp_path / "three").items()


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def test_an_address_that_fails_does_not_stop_the_run_and_is_told(memory, tmp_path, monkeypatch):
    def full(self: Any, *arguments: Any, **options: Any) -> None:
        raise PermissionError("no room in this bucket")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put", full)
        lines = go(tmp_path / "run", "memory://bucket/run", "rounds=1")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] == "done"
    assert "no room in this bucket" in lines[-1]
    assert "The same command completes it" in lines[-1]
    assert not [name for name in files("memory://bucket/run") if name.endswith("manifest.json")]
    go(tmp_path / "run", "memory://bucket/run", "rounds=1")
    made = [path for path in (tmp_path / "run").rglob("manifest.json")]
    assert len([name for name in files("memory://bucket/run") if name.endswith("manifest.json")]) == len(made)


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
        go(tmp_path / "one", address, "rounds=1", stop_at=12)
    changed = ("train.learning_rate=1e-3", "rounds=1")
    go(tmp_path / "one", address, *changed, redo=True)
    said: list[str] = []
    fetch(Place(address), tmp_path / "two", said.append)
    assert said == []
    stages = {path.parent.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("manifest.json")}
    there = {path.parent.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("manifest.json")}
    assert there == {stage for stage in stages if ".replaced-" not in str(stage)}
    assert digests(tmp_path / "two").items() <= digests(tmp_path / "one").items()


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
