"""Run folders with pairs to judge, without a model; and the page's server as a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

from prefloop.artifact import Building, Key, open_artifact, write_json
from prefloop.rows import VERBATIM, Completion, Message, PreferencePair, Prompt, digest_of, prompt_id


def pair(number: int, chosen: str | None = None, rejected: str | None = None, **fields: Any) -> PreferencePair:
    """A pair of a made-up prompt; its margin is its number, so `number` is also its place in the page's order."""
    question = fields.pop("question", f"Question {number}?")
    messages = fields.pop("messages", (Message(VERBATIM, question),))
    sides = [
        Completion(f"{number}/{name}", text, None, None, "stop", 0, "p")
        for name, text in (
            ("w", f"The answer {number} is plain and right." if chosen is None else chosen),
            ("l", f"The answer {number} is wordy and wrong." if rejected is None else rejected),
        )
    ]
    values: dict[str, Any] = {
        "pair_id": digest_of(*(side.completion_id for side in sides)),
        "prompt": Prompt(prompt_id(messages), messages, None, "train", "test:1"),
        "chosen": sides[0],
        "rejected": sides[1],
        "chosen_score": float(number),
        "rejected_score": 0.0,
        "margin": float(number),
        "win_prob": None,
        "weight": 1.0,
        "builder": "ranked/best_vs_worst",
        "round": 0,
    }
    return PreferencePair(**values | fields)


def write_run(root: Path, pairs: Sequence[PreferencePair], number: int = 0, judged: str = "j") -> Path:
    """Write a run folder that holds the pairs of one round."""
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "summary.json", {"state": "done"})
    folder = root / f"round-{number:03d}" / "3-pairs"
    shutil.rmtree(folder, ignore_errors=True)
    settings = {"pair_builder": {"kind": "ranked"}, "round": number}
    opened = open_artifact(folder, Key("pairs", settings, {"judged": judged}), PreferencePair)
    assert isinstance(opened, Building)
    opened.write_part(0, pairs)
    opened.finish()
    return root


@contextmanager
def serving(root: Path, *more: str, env: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `prefloop label` and give its process and the address that it prints."""
    command = [sys.executable, "-m", "prefloop", "label", str(root), "--no-open", *more]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"open (http://\S+)", line):
                yield process, found[1]
                break
        else:
            raise AssertionError(f"the server printed no address: {said}")
    finally:
        process.kill()
        process.communicate()


class Client:
    """A browser without a page: keeps the cookie, posts JSON."""

    def __init__(self, address: str) -> None:
        self.base = re.match(r"http://[^/]+", address)[0]  # type: ignore[index]
        self.cookie = ""

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, Any, Any]:
        """Return status, body (JSON where it is that) and headers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, method=method)
        given = {"Cookie": self.cookie, **({"Content-Type": "application/json"} if data else {}), **(headers or {})}
        for name, value in given.items():
            request.add_header(name, value)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
                status, found, got = answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                status, found, got = error.code, error.read(), error.headers
        for line in got.get_all("set-cookie") or []:
            self.cookie = "; ".join(f"{name}={morsel.value}" for name, morsel in SimpleCookie(line).items())
        kind = got.get("content-type", "")
        return status, json.loads(found) if kind.startswith("application/json") else found.decode(), got

    def enter(self, address: str, name: str | None = None) -> "Client":
        """Open the address, and take a name."""
        assert self.ask(address.removeprefix(self.base))[0] == 200
        if name is not None:
            assert self.ask("/api/annotator", {"name": name, "confirmed": False})[0] == 200
        return self

    def click(self, verdict: str, event: str, view: Any, **changed: Any) -> tuple[int, Any, Any]:
        """Judge the pair of `view`."""
        body = {
            "annotator": view["annotator"],
            "key": view["pair"]["key"],
            "verdict": verdict,
            "event": event,
            "skipped": False,
        }
        return self.ask("/api/click", body | changed)

    def next(self) -> Any:
        """Return the next pair."""
        return self.ask("/api/next")[1]
