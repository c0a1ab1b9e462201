"""The page over HTTP: files of our own, a session for each browser, and what `Desk` does as JSON."""

import asyncio
import hmac
import json
import sqlite3
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prefloop.errors import PrefloopError
from prefloop.label.desk import Desk
from prefloop.label.guard import Guard
from prefloop.label.sessions import NameInUse, Session, Sessions

MOST_BYTES = 64 * 1024
"""Of a request's body."""
WRONG_PASSWORD_DELAY = 1.0
"""Seconds that a wrong password costs; tries wait for each other, so this is also the most that can be tried."""
_FILES = {
    "/label.css": ("label.css", "text/css"),
    "/label.js": ("label.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


@dataclass
class Door:
    """Who may come in: the first one with `token`, or everybody with `password`. `annotator`: the name to come with."""

    cookie: str
    token: str | None = None
    password: str | None = None
    annotator: str | None = None

    def use(self, token: str) -> bool:
        """Whether that is the token; it opens once."""
        if self.token is None or not hmac.compare_digest(self.token.encode(), token.encode()):
            return False
        self.token = None
        return True


class Refused(PrefloopError):
    """A request that is answered with an HTTP status and a reason for the page."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        """Answer with `status`."""
        super().__init__(message)
        self.status = status
        self.reason = reason


class Pages:
    """The endpoints."""

    def __init__(self, desk: Desk, sessions: Sessions, door: Door) -> None:
        """Serve `desk` to those whom `door` lets in."""
        self._desk = desk
        self._sessions = sessions
        self._door = door
        self._one_at_a_time = asyncio.Lock()
        folder = files("prefloop.label") / "page"
        self._index = (folder / "index.html").read_bytes()
        self._files = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in _FILES.items()}

    async def index(self, request: Request) -> Response:
        """Serve the page, and exchange a token for a session. The page holds no text of the run."""
        session = await self._session(request)
        token = request.query_params.get("token")
        # A program that only looks whether the address is there must not use it up.
        if token is not None and request.method == "GET" and self._door.use(token):
            response = Response(self._index, media_type="text/html")
            self._set_cookie(response, await run_in_threadpool(self._sessions.begin, self._door.annotator, session))
            return response
        status = 200 if session is not None else 403 if token is not None else 401
        return Response(self._index, status, media_type="text/html")

    async def file(self, request: Request) -> Response:
        """Serve one of the page's own files."""
        content, kind = self._files[request.url.path]
        return Response(content, media_type=kind)

    async def sign_in(self, request: Request) -> Response:
        """Exchange the password for a session."""
        given = (await _body(request, password=str))["password"]
        async with self._one_at_a_time:
            wanted = self._door.password
            if wanted is None or not hmac.compare_digest(wanted.encode(), given.encode()):
                await asyncio.sleep(WRONG_PASSWORD_DELAY)
                raise Refused(401, "password", "That is not the password.")
        before = await self._session(request)
        response = JSONResponse({})
        self._set_cookie(response, await run_in_threadpool(self._sessions.begin, self._door.annotator, before))
        return response

    async def annotator(self, request: Request) -> Response:
        """Take a name."""
        session = await self._known(request)
        body = await _body(request, name=str, confirmed=bool)
        name = await run_in_threadpool(lambda: self._sessions.claim(session, body["name"], confirmed=body["confirmed"]))
        return JSONResponse({"annotator": name})

    async def next(self, request: Request) -> Response:
        """Give the next pair; without a name yet, only the name of the run."""
        session = await self._known(request)
        if session.annotator is None:
            pairs = self._desk.pairs
            return JSONResponse({"annotator": None, "run": pairs.run, "round": pairs.round})
        skipped = request.query_params.get("skipped") == "1"
        return await _json(lambda: self._desk.next(str(session.annotator), skipped=skipped))

    async def click(self, request: Request) -> Response:
        """Store a verdict, then answer with the next pair."""
        body = await _body(request, annotator=str, key=str, verdict=str, event=str, skipped=bool)
        name = await self._named(request, body["annotator"])
        return await _json(
            lambda: self._desk.click(
                name, key=body["key"], said=body["verdict"], event=body["event"], skipped=body["skipped"]
            )
        )

    async def undo(self, request: Request) -> Response:
        """Take the last click back, then answer with its pair."""
        body = await _body(request, annotator=str, event=str, skipped=bool)
        name = await self._named(request, body["annotator"])
        return await _json(lambda: self._desk.undo(name, event=body["event"], skipped=body["skipped"]))

    async def agreement(self, request: Request) -> Response:
        """Say how far people agree."""
        await self._known(request)
        return await _json(self._desk.agreement)

    async def _session(self, request: Request) -> Session | None:
        return await run_in_threadpool(self._sessions.find, request.cookies.get(self._door.cookie))

    async def _known(self, request: Request) -> Session:
        session = await self._session(request)
        if session is None:
            way = "password" if self._door.password is not None else "address"
            raise Refused(401, way, "You are not signed in.")
        return session

    async def _named(self, request: Request, name: str) -> str:
        """Return the session's name; the page must think that it is the same one."""
        session = await self._known(request)
        if session.annotator is None or session.annotator != name:
            raise Refused(409, "name", f"{name} is now in use in another window. Nothing was stored here since.")
        return name

    def _set_cookie(self, response: Response, secret: str) -> None:
        response.set_cookie(self._door.cookie, secret, httponly=True, samesite="strict", path="/")


def make_app(desk: Desk, sessions: Sessions, door: Door, hosts: Collection[str] | None) -> Starlette:
    """Return the application; `hosts`: see `Guard`."""
    pages = Pages(desk, sessions, door)
    routes = [
        Route("/", pages.index),
        *(Route(path, pages.file) for path in _FILES),
        Route("/api/sign-in", pages.sign_in, methods=["POST"]),
        Route("/api/annotator", pages.annotator, methods=["POST"]),
        Route("/api/next", pages.next),
        Route("/api/click", pages.click, methods=["POST"]),
        Route("/api/undo", pages.undo, methods=["POST"]),
        Route("/api/agreement", pages.agreement),
    ]
    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        PrefloopError: _refused,
        sqlite3.Error: _not_stored,
    }
    return Starlette(routes=routes, middleware=[Middleware(Guard, hosts=hosts)], exception_handlers=handlers)


async def _json(make: Callable[[], dict[str, Any]]) -> Response:
    return JSONResponse(await run_in_threadpool(make))


async def _body(request: Request, **fields: type) -> dict[str, Any]:
    """Return the fields of a JSON body, each of the type asked for."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "request", "The body must be application/json.")
    found = b""
    async for chunk in request.stream():
        found += chunk
        if len(found) > MOST_BYTES:
            raise Refused(413, "request", f"The body is longer than {MOST_BYTES} bytes.")
    try:
        body = json.loads(found)
    except ValueError as error:
        raise Refused(400, "request", "The body is not JSON.") from error
    wrong = [name for name, kind in fields.items() if not (isinstance(body, dict) and isinstance(body.get(name), kind))]
    if wrong:
        raise Refused(400, "request", f"The body lacks {', '.join(wrong)}, or has them in another type.")
    return {name: body[name] for name in fields}


async def _refused(_: Request, error: PrefloopError) -> Response:
    if isinstance(error, Refused):
        return JSONResponse({"reason": error.reason, "error": str(error)}, error.status)
    if isinstance(error, NameInUse):
        return JSONResponse({"reason": "confirm", "error": str(error)}, 409)
    return JSONResponse({"reason": "request", "error": str(error)}, 400)


async def _not_stored(_: Request, error: sqlite3.Error) -> Response:
    return JSONResponse({"reason": "disk", "error": f"Not stored ({error}). Free some room on the disk."}, 503)
