"""Copy results out of a run: the best policy as a clean folder, pairs as JSONL in TRL's preference format."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefloop.artifact import KEY, MANIFEST, load_artifact, replacing
from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.summary import read_summary
from prefloop.remote import is_address, send
from prefloop.rows import VERBATIM, PreferencePair

_RUN_FILES = {KEY, MANIFEST}


def export_to(what: str, root: Path, to: str) -> str:
    """Copy `what`, the best `policy` or all `pairs` of a run, to a path or an address such as `s3://bucket/policy`.

    Raises:
        ConfigError: nothing of that name can be exported, or something is at `to` already.
        DataError: the run has nothing to export yet.

    """
    actions: dict[str, Callable[[Path, Path], str]] = {"policy": export_policy, "pairs": export_pairs}
    if what not in actions:
        raise ConfigError(f"export: {what!r} cannot be exported; choose policy or pairs")
    if not is_address(to):
        return actions[what](root, Path(to))
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "made"
        said = actions[what](root, local)
        send(local, to)
    return said.replace(str(local), to)


def export_policy(root: Path, to: Path) -> str:
    """Copy the best policy's `save_pretrained` files to the folder `to` and return a line that says so.

    Raises:
        ConfigError: `to` exists.
        DataError: no round was promoted.

    """
    best = read_summary(root)["policy_best"]
    if best["round"] < 0:
        raise DataError(f"{root}: no round was promoted, so the best policy is the one that the run started from")
    _require_new(to)
    with replacing(to) as temporary:
        temporary.mkdir()
        for path in sorted((root / best["path"]).iterdir()):
            if path.is_file() and path.name not in _RUN_FILES and path.suffix != ".parquet":
                shutil.copy2(path, temporary / path.name)
    return f"{to}: the policy of round {best['round']} ({best['digest']})"


def export_pairs(root: Path, to: Path) -> str:
    """Write the pairs of all rounds as JSONL (prompt, chosen, rejected, margin, round) and return a line that says so.

    A conversational prompt gives lists of messages, a plain one strings, as TRL's preference type has them.

    Raises:
        ConfigError: `to` exists.
        DataError: the run has no pairs yet.

    """
    _require_new(to)
    count = 0
    with replacing(to) as temporary, temporary.open("w", encoding="utf-8") as file:
        for folder in sorted(root.glob("round-*/3-pairs")):
            for pair in load_artifact(folder, PreferencePair) or []:
                file.write(json.dumps(_trl_row(pair), ensure_ascii=False) + "\n")
                count += 1
        if not count:
            raise DataError(f"{root}: no pairs yet")
    return f"{to}: {count} pairs"


def _trl_row(pair: PreferencePair) -> dict[str, Any]:
    plain = len(pair.prompt.messages) == 1 and pair.prompt.messages[0].role == VERBATIM

    def side(text: str) -> Any:
        return text if plain else [{"role": "assistant", "content": text}]

    messages = [{"role": m.role, "content": m.content} for m in pair.prompt.messages]
    return {
        "prompt": pair.prompt.text if plain else messages,
        "chosen": side(pair.chosen.text),
        "rejected": side(pair.rejected.text),
        "margin": pair.margin,
        "round": pair.round,
    }


def _require_new(to: Path) -> None:
    if to.exists():
        raise ConfigError(f"{to}: exists already; choose a path that does not")
