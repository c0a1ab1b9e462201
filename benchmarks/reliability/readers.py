"""Everything of prefloop that reads what somebody else wrote, each as a function of bytes, with what must come out.

A reader returns `READ`; or refuses by an error of `prefloop.errors`, or by a reason in words, that names the place.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.reliability import corpus
from prefloop.artifact import (
    KEY,
    MANIFEST,
    Artifact,
    Building,
    Key,
    file_digest,
    load_artifact,
    open_artifact,
)
from prefloop.check.config import check_names
from prefloop.check.scan import scan
from prefloop.columns import write_rows
from prefloop.components import build_parts
from prefloop.disk import sealed
from prefloop.doctor import examine, prognosis
from prefloop.endpoint import Trouble
from prefloop.errors import PrefloopError
from prefloop.evaluate.summary import FILE as SUMMARY
from prefloop.evaluate.summary import read_summary
from prefloop.inputs import embedded_policy
from prefloop.judge._llm_replies import Choice, Form, Ranking, Style, WholeNumber
from prefloop.judge._llm_templates import Wording
from prefloop.judge._llm_wire import read_completion
from prefloop.label.exchange import import_verdicts
from prefloop.label.pairs import Item, RoundPairs, key_of_pair
from prefloop.label.store import Store, open_store
from prefloop.launch import read_recipe
from prefloop.models import causal_lm
from prefloop.pair._verdicts import read_verdicts
from prefloop.prompts.dataset import read_prompts
from prefloop.recipe import PromptSettings
from prefloop.rows import VERBATIM, Message, Prompt, prompt_id
from prefloop.sample import _server_wire

READ = ""
"""What a reader returns if it read the input; anything else is why not."""


@dataclass(frozen=True)
class Reader:
    """`read` takes bytes and an empty folder. A refusal must hold one of the words `places`: file, line or field."""

    name: str
    what: str
    read: Callable[[bytes, Path], str]
    seeds: tuple[bytes, ...]
    made: st.SearchStrategy[bytes]
    places: tuple[str, ...]
    giants: corpus.Giants = field(default=lambda: iter(()))
    cost: int = 1
    """Inputs of this reader are so many times as slow as a usual one: it gets fewer."""


def _prompts(name: str) -> Callable[[bytes, Path], str]:
    def read(data: bytes, folder: Path) -> str:
        path = folder / name
        path.write_bytes(data)
        settings = PromptSettings(path=str(path))
        looked = scan(settings)
        try:
            found = read_prompts(str(path), holdout=0.5).prompts
        except PrefloopError:
            assert looked.unreadable or looked.different or not looked.rows or name.endswith(".txt"), "check missed it"
            raise
        write_rows(folder / "prompts.parquet", Prompt, found)  # what is read can be stored
        return READ

    return read


def _verdicts(data: bytes, folder: Path) -> str:
    path = folder / "verdicts.jsonl"
    path.write_bytes(data)
    read_verdicts(str(path))
    return READ


@cache
def _labels() -> tuple[Store, RoundPairs]:
    def item(number: int) -> Item:
        sides = (f"chosen {number}", f"rejected {number}")
        key = key_of_pair(f"prompt-{number}", "", sides)
        asked = (Message(VERBATIM, f"q {number}"),)
        return Item(
            key, (f"id-{number}", f"di-{number}"), f"prompt-{number}", asked, "", *sides, "ranked", False, None, 1.0
        )

    pairs = RoundPairs("run", 0, "j", "ranked", tuple(map(item, range(6))))
    _OPEN.append(open_store(Path(_SCRATCH[0])))  # closed when the process ends
    return _OPEN[0].__enter__(), pairs


_SCRATCH: list[str] = []
_OPEN: list[Any] = []


def _import(data: bytes, folder: Path) -> str:
    if not _SCRATCH:
        keep = folder.parent / "labels"
        keep.mkdir(exist_ok=True)
        _SCRATCH.append(str(keep))
    path = folder / "verdicts.jsonl"
    path.write_bytes(data)
    store, pairs = _labels()
    import_verdicts(store, pairs, path, "Ana")
    return READ


def _recipe(data: bytes, folder: Path) -> str:
    path = folder / "mine.yaml"
    path.write_bytes(data)
    recipe, _ = read_recipe(str(path), [])
    check_names(recipe)
    build_parts(recipe)
    return READ


def _override(data: bytes, folder: Path) -> str:
    text = data.decode("utf-8", "surrogateescape")  # as Python gives a program its arguments
    recipe, _ = read_recipe("iterative_dpo", [text])
    check_names(recipe)
    build_parts(recipe)
    return READ


_FORMS: dict[Style, tuple[Form, ...]] = {
    style: (
        Form(("score",), WholeNumber(1, 5)),
        Form(("better",), Choice(("A", "B", "tie"))),
        Form(("ranking",), Ranking(("A", "B", "C"))),
        Form(("accuracy", "style"), WholeNumber(0, 10)),
    )
    for style in ("text", "json")
}


def _reply(style: Style) -> Callable[[bytes, Path], str]:
    def read(data: bytes, folder: Path) -> str:
        text = data.decode("utf-8", "surrogateescape")
        found = [form.read(text, style) for form in _FORMS[style]]
        for form, reading in zip(_FORMS[style], found, strict=True):
            if reading.values is not None:
                _check_values(form, reading.values)
            else:
                assert reading.why, "a refusal without a reason"
        return READ if any(one.values is not None for one in found) else "reply: " + found[0].why

    return read


def _check_values(form: Form, values: tuple[Any, ...]) -> None:
    """What is taken for a verdict must be one, whatever the reply was."""
    kind = form.values
    for value in values:
        if isinstance(kind, WholeNumber):
            assert value in [float(n) for n in range(kind.low, kind.high + 1)], value
        elif isinstance(kind, Choice):
            assert value in kind.options, value
        else:
            assert len(value) == 3, value
            assert set(value) <= {0, 1, 2}, value


def _response(data: bytes, folder: Path) -> str:
    try:
        found = json.loads(data)  # as `Address.called` reads it
    except (ValueError, RecursionError):
        return "response: not JSON"
    wording = Wording("Which?", "text", _FORMS["text"][0])
    asked = (
        _server_wire.Wanted((Message("user", "q"),), 2, 8, 0),
        _server_wire.Wanted((Message(VERBATIM, "q"),), 1, 8, 0),
    )
    answers = [read_completion(found, wording), *(_server_wire.read(found, one) for one in asked)]
    troubles = [answer.why for answer in answers if isinstance(answer, Trouble)]
    assert all(troubles), "trouble without a reason"
    return READ if len(troubles) < len(answers) else "response: " + troubles[0]


@cache
def _tokenizer() -> Any:
    with causal_lm.quiet():
        return causal_lm.load_tokenizer(embedded_policy())


def _chat(data: bytes, folder: Path) -> str:
    """Prompts as they come out of a file, each through every template."""
    path = folder / "p.jsonl"
    path.write_bytes(data)
    tokenizer = _tokenizer()
    why = READ
    for prompt in read_prompts(str(path), holdout=0.5).prompts:
        for template in corpus.TEMPLATES:
            tokenizer.chat_template = template
            try:
                ids = causal_lm.encode_prompt(tokenizer, prompt)
            except PrefloopError as error:
                why = str(error)
                continue
            assert ids
            assert all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids)
        for candidate in prompt.candidates:
            causal_lm.encode_completion(tokenizer, candidate.text, stop=True)
    return why


def _template(data: bytes, folder: Path) -> str:
    tokenizer = _tokenizer()
    tokenizer.chat_template = data.decode("utf-8", "replace")
    messages = (Message("user", "Why?"), Message("assistant", "So."), Message("user", "And <|im_end|>?"))
    causal_lm.encode_prompt(tokenizer, Prompt(prompt_id(messages), messages, None, "train", "here:1"))
    return READ


_PROMPTS = [Prompt(f"{i:016x}", (Message(VERBATIM, f"p {i}"),), None, "train", f"f:{i}") for i in range(3)]


@cache
def _part() -> bytes:
    path = Path(_SCRATCH_PART[0])
    write_rows(path, Prompt, _PROMPTS)
    return path.read_bytes()


_SCRATCH_PART: list[str] = []
_KEY = Key("prompts", {"limit": 3, "rate": 0.5}, {"data": "0123456789abcdef"})


def _folder(folder: Path) -> Path:
    """Return a finished artifact in a run folder, without waiting for the disk."""
    if not _SCRATCH_PART:
        _SCRATCH_PART.append(str(folder.parent / "part.parquet"))
    stage = folder / "run" / "prompts"
    stage.mkdir(parents=True)
    (stage / "part-00000.parquet").write_bytes(_part())
    return stage


def _loaded(stage: Path) -> str:
    """Read an artifact in every way that prefloop has, and let the doctor look at it."""
    listed = [line for one in examine(stage.parent) for line in one.lines()]
    list(prognosis(examine(stage.parent)))
    assert listed
    for found in (load_artifact(stage, Prompt), open_artifact(stage, _KEY, Prompt)):
        if isinstance(found, Artifact):
            assert isinstance(found.digest, str)
            assert found.rows >= 0
            assert isinstance(found.facts, dict)
            assert found.seconds is None or found.seconds >= 0
        if isinstance(found, (Artifact, Building)):
            for part in found.parts():
                assert all(isinstance(row, Prompt) and isinstance(row.messages, tuple) for row in part)
    return READ


def _manifest(data: bytes, folder: Path) -> str:
    stage = _folder(folder)
    (stage / MANIFEST).write_bytes(_vouched(data))
    return _loaded(stage)


def _vouched(data: bytes) -> bytes:
    """Return a manifest whose `check` fits, where it can have one: a forger would see to that, a broken disk not."""
    try:
        forged = json.loads(data)
        return json.dumps(sealed(forged)).encode() if isinstance(forged, dict) and len(data) % 2 else data
    except (ValueError, RecursionError):
        return data


def _key(data: bytes, folder: Path) -> str:
    stage = _folder(folder)
    (stage / KEY).write_bytes(data)
    return _loaded(stage)


def _rows(data: bytes, folder: Path) -> str:
    """A part with other bytes, and a manifest that vouches for them."""
    stage = _folder(folder)
    part = stage / "part-00000.parquet"
    part.write_bytes(data)
    manifest = json.loads(_good_manifest())
    manifest["files"][part.name] = {"bytes": len(data), "sha256": file_digest(part)}
    (stage / MANIFEST).write_text(json.dumps(sealed(manifest)), encoding="utf-8")
    return _loaded(stage)


@cache
def _good_manifest() -> bytes:
    folder = Path(_SCRATCH_PART[0]).parent / "good"
    shutil.rmtree(folder, ignore_errors=True)
    opened = open_artifact(folder, _KEY, Prompt)
    assert isinstance(opened, Building)
    opened.write_part(0, _PROMPTS)
    opened.finish({"counts": 3, "why": "a\u202eb"}, seconds=1.5)
    return (folder / MANIFEST).read_bytes()


def _summary(data: bytes, folder: Path) -> str:
    root = folder / "run"
    root.mkdir()
    (root / SUMMARY).write_bytes(data)
    read_summary(root)
    return READ


_SUMMARY = {
    "prefloop": "0.1",
    "name": "mine",
    "recipe": "iterative_dpo",
    "seed": 0,
    "state": "done",
    "policy_start": {"path": "embedded", "digest": "0123456789abcdef"},
    "policy_best": {"path": "round-000/5-policy", "digest": "0123456789abcdef", "round": 0},
    "warnings": ["a note"],
    "start": {"metrics": {"judge_score": {"value": 0.5, "low": 0.4, "high": None, "n": 20, "unit": "score"}}},
    "rounds": [
        {
            "round": 0,
            "accepted": True,
            "why": ["won"],
            "metrics": {"length": {"value": 20.5, "low": 18, "high": 22, "n": 20, "unit": "tokens", "estimator": "x"}},
            "seconds": {"samples": 1.5},
            "tokens": {"samples": 100},
        }
    ],
    "verdict": "better",
}


def readers(scratch: Path) -> Iterator[Reader]:
    """Yield every reader; `scratch` is a folder for what their seeds need."""
    if not _SCRATCH_PART:
        _SCRATCH_PART.append(str(scratch / "part.parquet"))
    rows = tuple(corpus.lines([row]) for row in corpus.ROWS)
    all_rows = corpus.lines(corpus.ROWS)
    verdicts = tuple(corpus.lines([row]) for row in corpus.VERDICTS)
    parquet = tuple(corpus.parquet_bytes([row]) for row in corpus.ROWS)
    key = json.dumps(_KEY.as_dict()).encode()
    manifest = _good_manifest()
    made_rows, made_verdicts = corpus.json_lines_like(corpus.ROWS), corpus.json_lines_like(corpus.VERDICTS)
    file = ("p.jsonl",)
    yield Reader(
        "prompts, JSON lines",
        "prompts and pairs",
        _prompts("p.jsonl"),
        (*rows, all_rows),
        made_rows,
        file,
        corpus.giant_json,
    )
    yield Reader(
        "prompts, JSON array",
        "prompts and pairs",
        _prompts("p.json"),
        (json.dumps(corpus.ROWS).encode(), json.dumps(corpus.ROWS[:2], indent=1).encode()),
        corpus.json_like([corpus.ROWS]),
        ("p.json",),
        corpus.giant_json,
    )
    yield Reader(
        "prompts, text",
        "one prompt a line",
        _prompts("p.txt"),
        (b"Once\r\nupon\n", b"\xef\xbb\xbfa"),
        corpus.texts(),
        ("p.txt",),
        corpus.giant_text,
    )
    yield Reader(
        "prompts, Parquet",
        "prompts and pairs",
        _prompts("p.parquet"),
        parquet,
        corpus.parquet_like(corpus.ROWS),
        ("p.parquet",),
        corpus.bombs_parquet,
    )
    yield Reader(
        "corrections", "verdicts of people", _verdicts, verdicts, made_verdicts, ("verdicts.jsonl",), corpus.giant_json
    )
    yield Reader(
        "label import",
        "verdicts of people into the store",
        _import,
        verdicts,
        made_verdicts,
        ("verdicts.jsonl", "annotator"),
        corpus.giant_json,
    )
    yield Reader(
        "recipe, YAML",
        "recipe file, names of settings, every component built",
        _recipe,
        tuple(text.encode() for text in corpus.RECIPES),
        corpus.texts().map(lambda tail: corpus.RECIPES[0].encode() + tail),
        ("mine.yaml", "recipe", *_FIELDS),
        corpus.bombs_yaml,
        cost=4,
    )
    yield Reader(
        "recipe, key=value",
        "one argument of the command line",
        _override,
        tuple(text.encode() for text in corpus.OVERRIDES),
        st.tuples(st.sampled_from([text.partition("=")[0] for text in corpus.OVERRIDES]), corpus.texts()).map(
            lambda both: both[0].encode() + b"=" + both[1]
        ),
        ("command line", "recipe", *_FIELDS),
        corpus.giant_overrides,
        cost=2,
    )
    for style, replies in (("text", corpus.REPLIES_TEXT), ("json", corpus.REPLIES_JSON)):
        shaped = [{"reason": "x", "score": 4}, {"reason": "x", "ranking": "B > A = C"}, {"accuracy": 3, "style": 2}]
        made = corpus.json_like(shaped) if style == "json" else corpus.texts()
        yield Reader(
            f"judge reply, {style}",
            "verdict of a judging model",
            _reply(style),
            tuple(r.encode() for r in replies),
            made,
            ("reply",),
            corpus.giant_text,
        )  # type: ignore[arg-type]
    responses = tuple(json.dumps(row).encode() for row in corpus.RESPONSES)
    yield Reader(
        "server response",
        "completion of a judge's or sampler's server",
        _response,
        responses,
        corpus.json_like(corpus.RESPONSES),
        ("response",),
        corpus.giant_json,
    )
    yield Reader(
        "chat templating", "prompts through three templates", _chat, rows, made_rows, file, corpus.giant_json, cost=2
    )
    templates = tuple(text.encode() for text in corpus.TEMPLATES)
    yield Reader(
        "chat template",
        "a model's own template",
        _template,
        templates,
        corpus.texts().map(lambda t: templates[0] + t),
        ("here:1",),
        cost=4,
    )
    yield Reader(
        "manifest",
        "finished artifact, and the doctor",
        _manifest,
        (manifest,),
        corpus.json_like([json.loads(manifest)]),
        ("prompts",),
        corpus.giant_json,
        cost=2,
    )
    yield Reader(
        "key file",
        "unfinished artifact, and the doctor",
        _key,
        (key,),
        corpus.json_like([json.loads(key)]),
        ("prompts",),
        corpus.giant_json,
        cost=2,
    )
    yield Reader(
        "artifact rows",
        "Parquet part with a manifest that fits",
        _rows,
        (_part(), *parquet[:2]),
        corpus.parquet_like(corpus.ROWS),
        ("part-00000.parquet",),
        cost=3,
    )
    yield Reader(
        "summary",
        "summary.json of a run",
        _summary,
        (json.dumps(_SUMMARY).encode(),),
        corpus.json_like([_SUMMARY]),
        (SUMMARY,),
        corpus.giant_json,
    )


_FIELDS = (
    *(
        "order",
        "sampler",
        "judge",
        "pair_builder",
        "loss",
        "trainer",
        "gate",
        "train",
        "policy",
        "prompts",
        "per_round",
    ),
    *("corrector", "locator", "eval_sampler", "eval_judge", "preset", "rounds", "name"),
)
"""Fields of a recipe: a refused setting is named by one of them."""
