"""`python -m benchmarks --quick` runs, prints and writes its page; the figures of such a run mean nothing."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_quick_run_writes_tables_and_measurements(tmp_path):
    out = tmp_path / "benchmarks.md"
    out.write_text("# Ours\n\n<!-- measured: begin -->\nold\n<!-- measured: end -->\n\nA note.\n", encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--repeats", "1", "--workloads", "W2,W4,W5"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    page = out.read_text(encoding="utf-8")
    assert page.startswith("# Ours\n")
    assert page.endswith("\n\nA note.\n")
    assert "old" not in page
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## W2: Training steps of a 15 M-parameter Llama",
        "## W4: The log-prob head on a large vocabulary",
        "## W5: Sampling on stories260K",
    ]
    assert str(ROOT) not in page
    assert "| transformers.generate |" in page

    known = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    trained = known["W2 cpu 24/12"]["results"]
    assert list(trained) == (["prefloop", "TRL"] if find_spec("trl") else ["prefloop"])
    for found in trained.values():
        assert found[0]["pairs"] == 4
        assert found[0]["tokens"] == trained["prefloop"][0]["tokens"] > 100
        assert found[0]["wall"] > 0
        assert found[0]["peak"] >= found[0]["base"] > 0


def test_an_unknown_workload_is_refused(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--workloads", "W9", "--out", str(tmp_path / "x.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "W9 unknown" in done.stdout
    assert not any(tmp_path.iterdir())
