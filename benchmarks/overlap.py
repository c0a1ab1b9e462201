"""A round behind slow endpoints, its stages in turn and at once: `python -m benchmarks.overlap`.

Two servers on this machine, one that writes and one that grades, take `--delay` seconds for every request. Timed is a
whole round of Iterative DPO on the embedded story model, training and held-out evaluation included.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prefloop import loop
from prefloop.launch import read_recipe

WORDS = ("dog", "cat", "ball", "tree", "happy", "sad", "ran", "sat", "big", "red")
SAMPLER = "{{kind: server, base_url: '{}', model: policy, completions: 4, concurrency: 32}}"
JUDGE = "{{kind: llm, base_url: '{}', model: judge, scale: [0, 5], reply: text, concurrency: 32}}"
SETTINGS = ("rounds=1", "prompts_per_round=128", "prompts_per_part=8", "evaluate.prompts=8", "gate=always", "threads=1")
SAMPLES = ("eval_sampler={kind: hf, max_new_tokens: 16}", "eval_judge=lexicon", "evaluate.second_opinion=0")


def write(request: dict[str, Any]) -> dict[str, Any]:
    """Return a choice whose text depends on prompt and seed only."""
    digest = hashlib.sha256(f"{request['prompt']}{request['seed']}".encode()).digest()
    return {"finish_reason": "stop", "text": " " + " ".join(WORDS[b % len(WORDS)] for b in digest[:6]) + "."}


def grade(request: dict[str, Any]) -> dict[str, Any]:
    """Return a choice with a score that depends on the question only."""
    digest = hashlib.sha256(request["messages"][-1]["content"].encode()).digest()
    return {"finish_reason": "stop", "message": {"role": "assistant", "content": f"Score: {digest[0] % 6}"}}


@contextmanager
def endpoint(answer: Callable[[dict[str, Any]], dict[str, Any]], delay: float, model: str) -> Iterator[str]:
    """Serve `answer` on this machine, `delay` seconds after each request; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            """Send the list of models."""
            self.reply({"data": [{"id": model}]})

        def do_POST(self) -> None:
            """Send one answer."""
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(delay)
            self.reply({"choices": [answer(request)]})

        def reply(self, value: dict[str, Any]) -> None:
            """Send JSON."""
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def timed(overlap: bool, delay: float) -> float:
    """Return the seconds of the round."""
    recipe, _ = read_recipe("iterative_dpo", [*SETTINGS])
    assert recipe.policy is not None
    with endpoint(write, delay, recipe.policy.path) as writer, endpoint(grade, delay, "judge") as grader:
        parts = [f"sampler={SAMPLER.format(writer)}", f"judge={JUDGE.format(grader)}", f"overlap={overlap}"]
        recipe, _ = read_recipe("iterative_dpo", [*SETTINGS, *SAMPLES, *parts])
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            loop.run(recipe, Path(folder) / "run")
            return time.monotonic() - began


def main() -> None:
    """Print both times and their ratio."""
    asked = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    asked.add_argument("--delay", type=float, default=1.0, help="seconds that every request takes, default 1")
    delay = asked.parse_args().delay
    timed(True, 0.0)  # imports and caches
    in_turn, at_once = timed(False, delay), timed(True, delay)
    sys.stdout.write(f"in turn {in_turn:.1f} s, at once {at_once:.1f} s: {in_turn / at_once:.2f}×\n")


if __name__ == "__main__":
    main()
