"""An OpenAI-compatible endpoint on 127.0.0.1 that answers by a script of the test's, and misbehaves where told to."""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Misbehave:
    """Instead of a reply. `cut`: end the connection after so many bytes of the body. `body`: sent as it is."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    cut: int | None = None
    delay: float = 0.0


@dataclass(frozen=True)
class Said:
    """A reply with a `finish_reason` of its own."""

    text: str
    finish_reason: str | None = "stop"


Script = Callable[[dict[str, Any], int], "str | Said | Misbehave"]
Route = Callable[[str, "dict[str, Any] | None"], "dict[str, Any] | Misbehave | None"]


class Server(ThreadingHTTPServer):
    endpoint: "ScriptedEndpoint"
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that give up


class Handler(BaseHTTPRequestHandler):
    """Answers for the endpoint of its server."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one write for head and body
    disable_nagle_algorithm = True

    server: "Server"

    @property
    def endpoint(self) -> "ScriptedEndpoint":
        return self.server.endpoint

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        with self.endpoint.lock:
            self.endpoint.lists += 1
            self.endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
        if self.routed(None):
            pass
        elif self.endpoint.models is None or not self.path.endswith("/models"):
            self.send(404, {}, '{"detail": "Not Found"}')
        else:
            self.send(200, {}, json.dumps({"data": [{"id": name} for name in self.endpoint.models]}))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("/completions"):
            if not self.routed(request):
                self.send(404, {}, '{"detail": "Not Found"}')
            return
        with self.endpoint.lock:
            number = len(self.endpoint.requests)
            self.endpoint.requests.append(request)
            self.endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
        time.sleep(self.endpoint.delay)
        found = self.endpoint.script(request, number)
        if isinstance(found, Misbehave):
            time.sleep(found.delay)
            self.send(found.status, found.headers, found.body or "{}", found.cut)
        else:
            self.send(200, {}, completion(found if isinstance(found, Said) else Said(found)))

    def routed(self, body: dict[str, Any] | None) -> bool:
        with self.endpoint.lock:
            found = self.endpoint.route(self.path, body)
        if isinstance(found, Misbehave):
            self.send(found.status, found.headers, found.body or "{}", found.cut)
        elif found is not None:
            self.send(200, {}, json.dumps(found))
        return found is not None

    def send(self, status: int, headers: dict[str, str], body: str, cut: int | None = None) -> None:
        content = body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:cut])
        self.wfile.flush()
        if cut is not None:
            # A reset instead of an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True


class ScriptedEndpoint:
    """`script` gets a request and how many came before; what it returns is sent. `requests` are those that came.

    `route` answers at paths of its own, by path and body (`None`: a GET), and returns `None` for all others.
    """

    def __init__(
        self,
        script: Script,
        models: tuple[str, ...] | None = ("judge",),
        delay: float = 0.0,
        port: int = 0,
        route: Route = lambda path, body: None,
    ) -> None:
        self.script, self.models, self.delay, self.route = script, models, delay, route
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lists = 0
        self.lock = threading.Lock()
        self.server = Server(("127.0.0.1", port), Handler)
        self.server.endpoint = self
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def start(self) -> "ScriptedEndpoint":
        self.thread.start()
        return self

    def __enter__(self) -> "ScriptedEndpoint":
        return self.start()

    def __exit__(self, *args: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def completion(said: Said) -> str:
    return json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": said.finish_reason,
                    "message": {"role": "assistant", "content": said.text},
                }
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
    )


def question(request: dict[str, Any]) -> str:
    """The text that the judge was sent."""
    (message,) = request["messages"]
    assert message["role"] == "user"
    return str(message["content"])


def material(request: dict[str, Any]) -> dict[str, str]:
    """The texts between the judge's fences, by name."""
    text = question(request)
    code = re.search(r"<<<NAME ([0-9a-f]+) ", text)
    assert code is not None
    found = re.findall(rf"<<<([A-Z ]+) {code[1]}\n(.*?)\n\1 {code[1]}>>>", text, re.DOTALL)
    return dict(found)


def in_form(request: dict[str, Any], *values: object) -> str:
    """A well-formed reply: JSON if a schema was sent, else last lines, with the labels that were asked for."""
    if "response_format" in request:
        keys = list(request["response_format"]["json_schema"]["schema"]["properties"])
        return json.dumps(dict(zip(keys, ["because", *values], strict=True)))
    asked = question(request)
    json_keys = re.findall(r'"([\w -]+)": <(?!your reasons)', asked)
    if json_keys:
        return json.dumps({"reason": "because", **dict(zip(json_keys, values, strict=True))})
    labels = re.findall(r"^([\w -]+): <", asked, re.MULTILINE)
    return "Reasons.\n" + "\n".join(f"{label}: {value}" for label, value in zip(labels, values, strict=True))


def taste(text: str) -> int:
    """What the scripted judges like: 0 to 5, from the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 6


def grader(request: dict[str, Any], number: int) -> str:
    """Grades by `taste`."""
    return in_form(request, taste(material(request)["COMPLETION"]))


def comparer(request: dict[str, Any], number: int) -> str:
    """Prefers by `taste`, whatever the order."""
    texts = material(request)
    a, b = taste(texts["COMPLETION A"]), taste(texts["COMPLETION B"])
    return in_form(request, "tie" if a == b else "A" if a > b else "B")


def ranker(request: dict[str, Any], number: int) -> str:
    """Ranks by `taste`."""
    points = {name[-1]: taste(text) for name, text in material(request).items() if name.startswith("COMPLETION ")}
    tiers = [[n for n in points if points[n] == point] for point in sorted(set(points.values()), reverse=True)]
    return in_form(request, " > ".join(" = ".join(tier) for tier in tiers))
