import dataclasses
import re
import sys

import pytest

from prefloop.errors import ConfigError
from prefloop.userfile import import_user, place_of

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
from math import pi

@dataclass(frozen=True)
class Mine:
    scale: float = 1.0

def score(prompt, completion, gold):
    return 1 / 0
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_a_name_is_found_by_path(file):
    assert dataclasses.asdict(import_user(f"{file}:Mine", "judge.kind")(2.0)) == {"scale": 2.0}


def test_a_relative_path_starts_at_the_working_directory(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert import_user("./mine.py:Mine", "judge.kind").__name__ == "Mine"


def test_the_same_content_gives_the_same_object_and_an_edit_a_new_one(file):
    first = import_user(f"{file}:Mine", "judge.kind")
    assert import_user(f"{file}:Mine", "judge.kind") is first
    # Same size and same second: a bytecode cache would miss it.
    file.write_text(SOURCE.replace("scale: float = 1.0", "scale: float = 3.0"), encoding="utf-8")
    assert import_user(f"{file}:Mine", "judge.kind")().scale == 3.0


def test_nothing_is_left_beside_the_file_or_in_the_path(file):
    before = list(sys.path)
    import_user(f"{file}:Mine", "judge.kind")
    assert [item.name for item in file.parent.iterdir()] == ["mine.py"]
    assert sys.path == before


@pytest.mark.parametrize("text", ["mine.py", "mine:Mine", "mine.py:", "mine.py:a b", ":Mine", "", "mine.txt:Mine"])
def test_another_form_is_refused(text):
    with pytest.raises(ConfigError, match=r"judge\.kind: '.*' must be .*\./my_file\.py:Name"):
        import_user(text, "judge.kind")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"judge\.kind: .*none\.py cannot be read \(No such file"):
        import_user(f"{tmp_path}/none.py:Mine", "judge.kind")


def test_a_missing_name_lists_what_is_there(file):
    with pytest.raises(ConfigError, match=r"has no 'Yours'; it defines Mine, score$"):
        import_user(f"{file}:Yours", "judge.kind")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"x = 1\ndef f(:\n", r"mine\.py:2: not valid Python"),
        (b"x = '\xff'\n", r"mine\.py:1: not valid Python"),
        (b"x = '\0'\n", r"mine\.py(:1)?: not valid Python"),
        (b"x = 1\n\nimport no_such_module\n", r"mine\.py:3: ModuleNotFoundError on import: .*no_such_module"),
        (b"def f():\n    return 1 / 0\nf()\n", r"mine\.py:2: ZeroDivisionError on import"),
    ],
)
def test_a_file_that_does_not_run_is_refused_with_its_line(file, source, message):
    file.write_bytes(source)
    for _ in range(2):  # a failed import leaves nothing that a second one would take for a module
        with pytest.raises(ConfigError, match=message):
            import_user(f"{file}:Mine", "judge.kind")


def test_the_place_of_an_error_is_the_users_line(file):
    score = import_user(f"{file}:score", "judge.file")
    with pytest.raises(ZeroDivisionError) as caught:
        score("", "", None)
    assert re.fullmatch(r".*mine\.py:11", place_of(caught.value, file))
    assert place_of(ValueError("elsewhere"), "mine.py") == "mine.py"
