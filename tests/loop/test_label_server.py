"""The page's server: who gets in, what it stores before it answers, and what a kill leaves of it."""

import http.client
import json
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from label_run import Client, pair, serving, write_run
from prefloop import cli
from prefloop.artifact import load_artifact
from prefloop.errors import ConfigError
from prefloop.label import serving as page
from prefloop.launch import read_recipe
from prefloop.loop import run as run_loop
from prefloop.rows import PreferencePair
from tiny import write_jsonl

uvicorn = pytest.importorskip("uvicorn", reason="prefloop[label] is not installed")

from prefloop.label.desk import Desk  # noqa: E402
from prefloop.label.guard import HEADERS  # noqa: E402
from prefloop.label.pairs import load_round  # noqa: E402
from prefloop.label.server import MOST_BYTES, Door, make_app  # noqa: E402
from prefloop.label.sessions import Sessions  # noqa: E402
from prefloop.label.store import open_store  # noqa: E402

TOKEN = "the-token"


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", [pair(i) for i in range(6)])


@contextmanager
def server(run, password=None, annotator=None, hosts=page.LOOPBACK):
    """The application behind a real uvicorn on loopback, in a thread; gives its base address."""
    with open_store(run) as store, page._bound(page.Address()) as listening:
        door = Door("c", None if password else TOKEN, password, annotator)
        app = make_app(Desk(load_round(run), store), Sessions(store, password or ""), door, hosts)
        serving_ = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=serving_.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            serving_.should_exit = True
            thread.join()


def entered(base, name="ana"):
    return Client(base).enter(f"{base}/?token={TOKEN}", name)


# Who gets in


def test_a_token_opens_once_and_its_session_goes_on(run):
    with server(run) as base:
        stranger = Client(base)
        assert stranger.ask("/")[0] == 401
        assert stranger.ask("/api/next")[0] == 401
        assert stranger.ask("/?token=wrong")[0] == 403
        assert stranger.ask(f"/?token={TOKEN}", method="HEAD")[0] == 403  # a look does not use it up
        status, _, headers = (client := Client(base)).ask(f"/?token={TOKEN}")
        assert status == 200
        attributes = {part.strip().lower() for part in headers["set-cookie"].split(";")[1:]}
        assert {"httponly", "samesite=strict", "path=/"} <= attributes
        assert client.ask("/")[0] == 200
        assert client.ask(f"/?token={TOKEN}")[0] == 200  # a reload of the address
        assert stranger.ask(f"/?token={TOKEN}")[0] == 403
        assert stranger.cookie == ""
        for path, body in (("annotator", {"name": "x", "confirmed": True}), ("undo", {}), ("click", {})):
            assert stranger.ask(f"/api/{path}", body)[0] in (400, 401)
        assert stranger.ask("/api/agreement")[0] == 401


def test_the_page_itself_holds_no_text_of_the_run(run):
    with server(run) as base:
        stranger = Client(base)
        for path in ("/", "/label.js", "/label.css", "/icon.svg"):
            _, body, headers = stranger.ask(path)
            assert "Question" not in body
            assert "http://" not in body.replace("http://www.w3.org/2000/svg", "")
            assert "https://" not in body
            for name, value in HEADERS.items():
                assert headers[name] == value
        assert HEADERS["content-security-policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in HEADERS["content-security-policy"]
        assert stranger.ask("/../store.py")[0] == 404


def test_foreign_names_and_foreign_pages_are_refused(run):
    with server(run) as base:
        client = entered(base)
        view = client.next()
        assert client.ask("/api/next", headers={"Host": "evil.example"})[0] == 403
        assert client.ask("/api/next", headers={"Host": "localhost:1"})[0] == 200  # through a tunnel
        other_port = {"Origin": "http://127.0.0.1:1"}
        body = {
            "annotator": "ana",
            "key": view["pair"]["key"],
            "verdict": "tie",
            "event": "event-one",
            "skipped": False,
        }
        assert client.ask("/api/click", body, other_port)[0] == 403
        assert client.ask("/api/click", body, {"Content-Type": "text/plain"})[0] == 415
        assert client.next()["progress"]["judged"] == 0
        assert client.ask("/api/click", body, {"Origin": base})[0] == 200


def test_bodies_that_are_none_are_refused(run):
    with server(run) as base:
        client = entered(base)
        assert client.ask("/api/click", {"annotator": "ana"})[1]["error"] == (
            "The body lacks key, verdict, event, skipped, or has them in another type."
        )
        assert client.ask("/api/click", ["x"])[0] == 400
        assert client.ask("/api/click", {"x": "y" * MOST_BYTES})[0] == 413
        assert client.click("up", "event-one", client.next())[0] == 400
        assert client.ask("/api/click")[0] == 405


def test_a_password_is_asked_for_and_another_one_ends_sessions(run, monkeypatch):
    monkeypatch.setattr("prefloop.label.server.WRONG_PASSWORD_DELAY", 0.1)
    with server(run, password="correct horse", hosts=None) as base:
        client = Client(base)
        status, found, _ = client.ask("/api/next")
        assert (status, found["reason"]) == (401, "password")
        began = time.monotonic()
        assert [client.ask("/api/sign-in", {"password": "guess"})[0] for _ in range(3)] == [401] * 3
        assert time.monotonic() - began > 0.3
        assert client.ask("/?token=")[0] == 403
        assert client.ask("/api/sign-in", {"password": "correct horse"})[0] == 200
        assert client.ask("/api/annotator", {"name": "ana", "confirmed": False})[0] == 200
        cookie = client.cookie
    with server(run, password="another horse", hosts=None) as base:
        client = Client(base)
        client.cookie = cookie
        assert client.ask("/api/next")[0] == 401
    with server(run, password="correct horse", hosts=None) as base:
        client = Client(base)
        client.cookie = cookie
        assert client.next()["annotator"] == "ana"


# Names


def test_a_second_window_under_one_name_is_refused_or_takes_over_on_confirmation(run):
    with server(run) as one, server(run) as two:
        first, second = entered(one), Client(two).enter(f"{two}/?token={TOKEN}")
        view = first.next()
        assert first.click("tie", "event-one", view)[0] == 200
        assert second.next() == {"annotator": None, "run": "run", "round": 0}
        status, found, _ = second.ask("/api/annotator", {"name": "ANA", "confirmed": False})
        assert (status, found["reason"]) == (409, "confirm")
        assert "ana has judged 1 pair of this run and is in use in another window" in found["error"]
        assert second.next()["annotator"] is None
        assert first.click("tie", "event-two", first.next())[0] == 200

        assert second.ask("/api/annotator", {"name": "ana", "confirmed": True})[1] == {"annotator": "ana"}
        assert second.next()["progress"]["judged"] == 2
        view = second.next()
        status, found, _ = first.click("left", "event-three", view)
        assert (status, found["reason"]) == (409, "name")
        assert second.next()["progress"]["judged"] == 2


def test_a_window_that_thinks_it_is_somebody_else_stores_nothing(run):
    with server(run) as base:
        client = entered(base)
        view = client.next()
        assert client.ask("/api/annotator", {"name": "bo", "confirmed": False})[0] == 200
        assert client.click("tie", "event-one", view)[0] == 409
        assert client.next()["progress"]["judged"] == 0


def test_two_people_judge_and_their_agreement_is_shown(run):
    with server(run) as one, server(run, annotator="bo") as two:
        ana, bo = entered(one), Client(two).enter(f"{two}/?token={TOKEN}")
        seen = []
        for client in (ana, bo):
            for number in range(6):
                view = client.next()
                seen.append(view["pair"]["key"])
                assert client.click("tie" if number < 3 else "both_bad", f"event-{number:03d}", view)[0] == 200
        assert seen[:6] == seen[6:]  # both judge the same pairs in the same order
        (compared,) = ana.ask("/api/agreement")[1]["compared"]
        assert (compared["people"], compared["pairs"], compared["same"], compared["kappa"][0]) == (
            ["ana", "bo"],
            6,
            100,
            1,
        )


# What is stored


def test_a_click_that_cannot_be_stored_is_not_answered_as_if_it_were(run):
    with server(run) as base:
        client = entered(base)
        view = client.next()
        with sqlite3.connect(run / "labels.sqlite") as other:
            other.execute("create trigger full before insert on events begin select raise(abort, 'disk full'); end")
        status, found, _ = client.click("tie", "event-one", view)
        assert (status, found["reason"]) == (503, "disk")
        assert "disk full" in found["error"]
        with other:
            other.execute("drop trigger full")
        other.close()
        assert client.click("tie", "event-one", view)[1]["progress"]["judged"] == 1


def verdicts(run):
    with sqlite3.connect(f"file:{run / 'labels.sqlite'}?mode=ro", uri=True) as found:
        rows = found.execute("select event, key from events order by id").fetchall()
    found.close()
    return rows


def test_kill_9_between_clicks_and_in_the_middle_of_one_loses_none(run, tmp_path):
    """Every click that was answered is there after each kill; one that was not is sent again and stored once."""
    run = write_run(tmp_path / "many", [pair(i) for i in range(400)])
    answered, pending, cookie, event = [], None, "", 0
    for attempt in range(4):
        with serving(run, "--annotator", "ana") as (process, address):
            client = Client(address)
            client.cookie = cookie
            if not cookie:
                client.enter(address)
            cookie = client.cookie
            assert client.next()["annotator"] == "ana"  # the session outlives the process
            killer = threading.Timer(0.15 + 0.1 * attempt, process.send_signal, [signal.SIGKILL])
            killer.start()
            try:
                while True:
                    view = client.next() if pending is None else None
                    if pending is None:
                        pending = (f"event-{event:04d}", view)
                        event += 1
                    status, _, _ = client.click("tie", *pending)
                    assert status == 200
                    answered.append((pending[0], pending[1]["pair"]["key"]))
                    pending = None
            except (OSError, http.client.HTTPException):
                pass  # killed
            killer.join()
        stored = verdicts(run)
        assert stored[: len(answered)] == answered
        assert len(stored) - len(answered) in (0, 1)  # at most the one that was not answered
    assert len(answered) > 10
    with serving(run, "--annotator", "ana") as (_, address):
        client = Client(address)
        client.cookie = cookie
        if pending is not None:
            client.click("tie", *pending)
            answered.append((pending[0], pending[1]["pair"]["key"]))
        assert client.next()["progress"]["judged"] == len(answered)
    assert verdicts(run) == answered


def test_ctrl_c_is_the_usual_end_and_the_port_is_the_runs_own(run):
    with serving(run) as (process, address):
        assert f":{page.usual_port(run)}/" in address
        with serving(run) as (_, other):  # a second person's: another port
            assert other.partition("?")[0] != address.partition("?")[0]
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)[0]
        assert process.returncode == 0, rest
        assert "token" not in rest
        assert "Traceback" not in rest


# The command


@pytest.fixture
def call(monkeypatch, capsys):
    def run_(*arguments):
        monkeypatch.setattr(sys, "argv", ["prefloop", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        found = capsys.readouterr()
        return code, found.out + found.err

    return run_


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--host", "0.0.0.0"], 2, r"--host: 0\.0\.0\.0 can be reached from other machines.*--password-env"),
        (["--host", "0.0.0.0", "--password-env", "NOT_SET"], 2, "NOT_SET must hold a password of at least 8"),
        (["--host", "0.0.0.0", "--password-env", "SHORT"], 2, "SHORT must hold a password of at least 8"),
        (["--port", "70000"], 2, "--port: must be 0"),
        (["--host", "no.such.name.invalid", "--password-env", "LONG"], 2, "cannot be used"),
        (["--round", "7"], 2, "no finished pairs of round 7; there are 0"),
        (["--annotator", "x" * 60], 2, "1 to 40 visible characters"),
        (["--import", "a", "--export", "b"], 2, "at once"),
        (["--export", "new.jsonl"], 3, "no verdicts to write"),
        (["--import", "missing.jsonl"], 2, "is not a file"),
    ],
)
def test_wrong_use_is_said_at_once(call, run, monkeypatch, options, code, message):
    monkeypatch.setenv("SHORT", "secret7")
    monkeypatch.setenv("LONG", "long enough")
    monkeypatch.chdir(run)
    found, said = call("label", run, *options)
    assert found == code
    assert re.search(message, said), said
    assert "secret7" not in said
    assert "long enough" not in said


def test_a_folder_that_is_no_run_is_refused(call, tmp_path):
    code, said = call("label", tmp_path)
    assert (code, "not a run folder" in said) == (3, True)


def test_without_the_extra_the_message_names_it(run, monkeypatch):
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs starlette and uvicorn: pip install 'prefloop\[label\]'"):
        page.serve(run, None, page.Address(), lambda line: None)


def test_a_port_in_use_is_said(run):
    with page._bound(page.Address()) as taken, pytest.raises(ConfigError, match="cannot be used"):
        page._bound(page.Address(port=taken.getsockname()[1]))


def test_nothing_of_torch_or_the_network_is_loaded_for_the_page():
    code = "import sys, prefloop.label.server, prefloop.label.serving; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


SMALL = [
    "rounds=1",
    "prompts_per_round=16",
    "sampler.completions=3",
    "sampler.max_new_tokens=12",
    "train.pairs_per_step=8",
    "evaluate.prompts=20",
    "gate.kind=always",
]


@pytest.mark.parametrize("method", ["iterative_dpo", "tso"])
def test_verdicts_flow_back_into_a_run(call, tmp_path, method):
    """Judge the pairs of a real run, export, and run again: its pairs are corrected, and no sample is drawn again."""
    small = SMALL if method != "tso" else [*(s for s in SMALL if "completions" not in s), "sampler.versions=0"]
    root = tmp_path / "run"
    run_loop(read_recipe(method, small)[0], root)

    def pairs():
        return list(load_artifact(root / "round-000" / "3-pairs", PreferencePair))

    before = pairs()
    rows = [
        {
            "prompt_id": p.prompt.prompt_id,
            "left": p.rejected.text,
            "right": p.chosen.text,
            "verdict": ("left", "both_bad", "right")[i],
        }
        for i, p in enumerate(before[:3])
    ]
    file = write_jsonl(tmp_path / "own.jsonl", rows)
    assert call("label", root, "--import", file, "--annotator", "ana")[0] == 0
    out = tmp_path / "corrections.jsonl"
    code, said = call("label", root, "--export", out)
    assert code == 0
    assert "3 verdicts on round 0: 1 pairs kept, 1 exchanged, 1 dropped" in said
    use = shlex.split(said.partition("--redo ")[2])
    assert ("pair_builder.kind=corrected" in use) == (method != "tso")

    samples = (root / "round-000" / "1-samples" / "manifest.json").read_bytes()
    recipe = read_recipe(method, [*small, *use])[0]
    run_loop(recipe, root, redo=True)
    after = pairs()
    assert (root / "round-000" / "1-samples" / "manifest.json").read_bytes() == samples
    assert (after[0].chosen, after[0].rejected) == (before[0].rejected, before[0].chosen)
    assert after[0].flipped != before[0].flipped
    assert [(p.chosen, p.rejected) for p in after[1:]] == [(p.chosen, p.rejected) for p in before[2:]]
    # Labelling goes on with the corrected pairs: what was said is known, and the file stays the same.
    assert json.loads(out.read_text().splitlines()[0])["annotators"]["ana"]["origin"] == "file own.jsonl"
    code, said = call("label", root, "--export", tmp_path / "again.jsonl")
    assert code == 0
    assert (tmp_path / "again.jsonl").read_text() == out.read_text()
