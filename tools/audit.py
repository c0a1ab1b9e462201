"""Ask pip-audit for known vulnerabilities of every installed package: `make audit`.

pip-audit lives in an environment of its own (`build/audit`), so that it does not become part of what it looks at. A
package that it could not look up is named, and where it could look up none the audit fails: silence is no clean result.
"""

import json
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "build" / "audit"
OWN = "prefloop"


def installed() -> list[str]:
    """Return `name==version` of every installed package but prefloop; of a local build (+cpu) the release."""
    found = {d.metadata["Name"].lower(): d.version.partition("+")[0] for d in distributions()}
    return sorted(f"{name}=={version}" for name, version in found.items() if name != OWN)


def tool() -> Path:
    """Return pip-audit, installed first where it is not there yet."""
    program = HOME / "bin" / "pip-audit"
    if not program.is_file():
        venv.create(HOME, with_pip=True, clear=True)
        done = subprocess.run([HOME / "bin" / "pip", "install", "--quiet", "pip-audit>=2.9"], check=False)
        if done.returncode or not program.is_file():
            sys.exit("audit: pip-audit could not be installed, so nothing was audited")
    return program


def main() -> None:
    """Audit, print what was found, and end with 1 if there is a vulnerability or no answer."""
    names = installed()
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "installed.txt")
        listed.write_text("\n".join(names) + "\n", encoding="utf-8")
        options = ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "20"]
        done = subprocess.run([tool(), "-r", listed, *options], capture_output=True, text=True, check=False)
    try:
        answers = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        sys.exit(f"audit: the vulnerability database could not be asked, so nothing was audited ({last[:300]})")
    sys.exit(report(answers))


def report(answers: list[dict[str, object]]) -> int:
    """Print what pip-audit says of each package and return the exit status."""
    skipped = [str(a["name"]) for a in answers if "skip_reason" in a]
    asked = [a for a in answers if "skip_reason" not in a]
    found = [(a, v) for a in asked for v in a["vulns"]]  # type: ignore[attr-defined]
    for answer, one in found:
        better = ", ".join(one["fix_versions"]) or "no version yet"
        print(f"{answer['name']} {answer['version']}: {one['id']}, mended in {better}")
    if not asked:
        print(f"audit: the vulnerability database knows none of {len(skipped)} packages: it could not be reached")
        print("from here, so nothing was audited. Repeat this where the network allows it.")
        return 1
    if skipped:
        print(f"audit: {len(skipped)} packages could not be looked up: {', '.join(skipped)}")
    print(f"audit: {len(asked)} packages looked up, {len(found)} known vulnerabilities")
    return int(bool(found or skipped))


if __name__ == "__main__":
    main()
