"""Write `requirements.lock`: version and hashes of all that `make install` takes. `make lock`.

The versions are those of the environment that runs this, which the tests passed in; what is not installed there is left
out. pip-tools lives in an environment of its own (`build/lock`). The file holds names, versions and hashes only: no
index and no host.
"""

import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "build" / "lock"
LOCK = ROOT / "requirements.lock"
HEAD = """\
# Made by `make lock`: what `pip install -e '.[dev]'` takes, with the hashes of the files.
# torch is the CPU build that the Makefile takes; on a CUDA machine install another torch first and leave its line out.
# To install exactly this: pip install --require-hashes -r requirements.lock && pip install --no-deps -e .
"""


def others(text: str) -> Iterator[str]:
    """Yield the lines of every package but prefloop, which its own extras name, without remarks."""
    own = False
    for line in text.splitlines(keepends=True):
        own = line.startswith("prefloop") or (own and line.startswith(" "))
        if not own and not line.startswith("#"):
            yield line


def main() -> None:
    """Compile the lock file."""
    program = HOME / "bin" / "pip-compile"
    if not program.is_file():
        venv.create(HOME, with_pip=True, clear=True)
        subprocess.run([HOME / "bin" / "pip", "install", "--quiet", "pip-tools>=7.4"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        pinned, out = Path(folder, "pinned.txt"), Path(folder, "out.txt")
        known = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"] != "prefloop"}
        pinned.write_text("".join(f"{name}=={version}\n" for name, version in sorted(known.items())), encoding="utf-8")
        options = ["--extra", "dev", "--generate-hashes", "--allow-unsafe", "--strip-extras", "--no-header", "--quiet"]
        options += ["--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host", "--no-annotate"]
        command = [program, *options, "--constraint", pinned, "--output-file", out, ROOT / "pyproject.toml"]
        done = subprocess.run([str(part) for part in command], cwd=folder, check=False)
        if done.returncode:
            sys.exit("lock: pip-compile failed, see above; requirements.lock is as it was")
        text = "".join(others(out.read_text(encoding="utf-8")))
    if "://" in text:
        named = next(line for line in text.splitlines() if "://" in line)
        sys.exit(f"lock: the result names an address, so it was not kept: {named.partition('://')[0][:60]}…")
    LOCK.write_text(HEAD + text, encoding="utf-8")
    print(f"{LOCK.name}: {text.count(chr(10) + '    --hash')} hashes")


if __name__ == "__main__":
    main()
