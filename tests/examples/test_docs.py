"""What the documentation says can be typed is typed here."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from prefloop import cli

DOCS = Path(__file__).resolve().parents[2] / "docs"
SMALL = [
    "prompts_per_round=16",
    "sampler.completions=3",
    "sampler.max_new_tokens=12",
    "train.pairs_per_step=8",
    "evaluate.prompts=20",
    "rounds=1",
]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(command: str) -> int:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


def test_the_judge_and_the_loss_of_the_extension_page_work(call, tmp_path):
    for source in blocks("extend.md", "python"):
        name = source.partition("\n")[0].removeprefix("# ")
        (tmp_path / name).write_text(source, encoding="utf-8")
    (command,) = [line for line in blocks("extend.md", "bash")[0].splitlines() if line.startswith("prefloop run")]
    assert call(f"{command} {' '.join(SMALL)} --out one") == 0
    assert call(f"prefloop run iterative_dpo loss.kind=./my_loss.py:Hinge {' '.join(SMALL)} --out two") == 0


def test_the_quickstart_goes_through(call, tmp_path, capsys):
    lines = "\n".join(blocks("quickstart.md", "bash")).splitlines()
    commands = [line.partition("#")[0].strip() for line in lines if line.startswith("prefloop")]
    assert [command.split()[1] for command in commands] == ["init", "check", "run", "show"]
    init, check, run, show = commands
    assert call(init) == 0
    recipe = tmp_path / "mine.yaml"
    text = recipe.read_text(encoding="utf-8")
    for placeholder in ("path/to/model", "path/to/prompts.jsonl"):
        assert placeholder in text
        text = text.replace(placeholder, "embedded")
    text = re.sub(r"judge:\n(  .*\n)+", "judge: lexicon\n", text, count=1)
    recipe.write_text(text, encoding="utf-8")
    assert call(check) == 0
    assert call(f"{run} {' '.join(SMALL)}") == 0
    assert call(show) == 0
    shown = capsys.readouterr().out
    assert "beginning-of-sequence tokens in a prompt: [1]" in shown
    assert "win % vs start" in shown
    assert (tmp_path / "runs" / "iterative_dpo" / "report.html").exists()


@pytest.mark.parametrize("command", ["methods", "methods --json", "schema", "--help", "run --help"])
def test_commands_that_only_print(call, command):
    assert call(f"prefloop {command}") == 0
