"""`prefloop doctor` names every damage that a manifest covers, and a rerun ends as the undamaged run."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefloop import cli
from prefloop.doctor import Diagnosis, examine, prognosis
from prefloop.launch import read_recipe
from prefloop.loop import run
from prefloop.protocols import Quiet

SETTINGS = [
    "prompts_per_round=8",
    "prompts_per_part=4",
    "sampler.completions=2",
    "sampler.max_new_tokens=6",
    "evaluate.prompts=8",
    "gate.kind=always",
    "rounds=1",
    "threads=1",
]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {"cut": cut, "zero": zero, "delete": Path.unlink, "flip": flip}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("doctor") / "run"
    recipe, origins = read_recipe("iterative_dpo", SETTINGS)
    run(recipe, root, origins=origins)
    return root


class Heard(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def again(root: Path) -> list[str]:
    recipe, origins = read_recipe("iterative_dpo", SETTINGS)
    heard = Heard()
    run(recipe, root, origins=origins, progress=heard)
    return [line for line in heard.lines if "moved to damaged" in line]


def content(root: Path) -> dict[str, str]:
    """Digests of every result; manifests, summary and report without their times."""
    files = [p for p in root.rglob("*") if p.is_file() and p.name != ".lock"]
    kept = [p for p in files if p.relative_to(root).parts[0] != "damaged"]
    found = {str(p.relative_to(root)): p for p in kept}
    return {n: hashlib.sha256(_timeless(p)).hexdigest() for n, p in found.items() if p.name != "report.html"}


def _timeless(path: Path) -> bytes:
    if path.name not in ("manifest.json", "summary.json"):
        return path.read_bytes()
    return json.dumps(_without(json.loads(path.read_text()), "seconds")).encode()


def _without(value, name):
    if isinstance(value, dict):
        return {k: _without(v, name) for k, v in value.items() if k not in (name, "check")}
    return [_without(v, name) for v in value] if isinstance(value, list) else value


def states(found: list[Diagnosis]) -> dict[str, str]:
    return {one.path: one.state for one in found}


def covered(root: Path) -> list[Path]:
    """Every file that a manifest names."""
    folders = [p.parent for p in root.rglob("manifest.json")]
    return [f / n for f in folders for n in json.loads((f / "manifest.json").read_text())["files"]]


def test_a_finished_run_is_whole(whole):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in whole.rglob("*")}
    found = examine(whole)
    assert set(states(found).values()) == {"whole"}
    assert list(prognosis(found)) == ["a rerun would make nothing anew"]
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in whole.rglob("*")} == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_that_a_manifest_covers_is_named(whole, damage):
    files = covered(whole)
    assert len(files) > 15
    for path in files:
        kept = path.read_bytes()
        DAMAGES[damage](path)
        bad = [one for one in examine(whole) if one.state == "damaged"]
        path.write_bytes(kept)
        assert [(whole / one.path) for one in bad if any(path.name in p for p in one.problems)] == [path.parent]
        assert len(bad) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_a_manifest_or_summary_is_named(whole, damage):
    for path in [*whole.rglob("manifest.json"), *whole.rglob("key.json"), whole / "summary.json"]:
        kept = path.read_bytes()
        if damage == "flip":  # of the key's stage: times and facts are not covered
            path.write_bytes(kept.replace(b'"stage"', b'"stagf"', 1).replace(b'"state"', b'"statf"', 1))
        else:
            DAMAGES[damage](path)
        found = examine(whole)
        path.write_bytes(kept)
        bad = [one.path for one in found if one.state in ("damaged", "unfinished")]
        wanted = str((path.parent if path.name != "summary.json" else path).relative_to(whole))
        assert bad == [wanted]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("round-000/2-judged/part-00001.parquet", "flip"),
        ("round-000/3-pairs/manifest.json", "cut"),
        ("round-000/5-policy/model.safetensors", "zero"),
        ("round-000/6-report/2-judged/part-00000.parquet", "delete"),
        ("start/1-samples/manifest.json", "delete"),
        ("summary.json", "zero"),
        ("round-000/4-batches/key.json", "delete"),
    ],
)
def test_a_rerun_ends_as_the_undamaged_run(whole, tmp_path, name, damage):
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    expected = content(whole)
    files = len([p for p in root.rglob("*") if p.is_file()])
    DAMAGES[damage](root / name)
    moved = again(root)
    found = content(root)
    assert found == expected
    assert set(states(examine(root)).values()) <= {"whole", "set aside"}
    if moved:
        aside = list((root / "damaged").iterdir())
        assert len(aside) == len(moved) == 1
        assert len([p for p in root.rglob("*") if p.is_file()]) > files - 1


def test_results_of_other_inputs_are_stale(whole, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    shutil.rmtree(root / "round-000" / "6-report" / "1-samples")
    shutil.copytree(root / "start" / "1-samples", root / "round-000" / "6-report" / "1-samples")
    assert states(examine(root))["round-000/6-report/2-judged"] == "stale"


def test_a_missing_folder_is_damage(whole, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    shutil.rmtree(root / "round-000" / "3-pairs")
    found = examine(root)
    assert states(found)["round-000/3-pairs"] == "damaged"
    assert "round-000/3-pairs: a rerun makes it again" in list(prognosis(found))


def test_the_command_ends_with_3_where_something_is_damaged(whole, tmp_path, monkeypatch, capsys):
    root = tmp_path / "run"
    shutil.copytree(whole, root)

    def call() -> int:
        monkeypatch.setattr(sys, "argv", ["prefloop", "doctor", str(root)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    assert call() == 0
    flip(root / "round-000" / "2-judged" / "part-00000.parquet")
    assert call() == 3
    assert "moves it to the folder damaged" in capsys.readouterr().out
