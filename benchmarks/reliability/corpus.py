"""Well-formed inputs that mutations start from, inputs made by hypothesis, and a few very large ones, by reader."""

import io
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from benchmarks.reliability.mutate import TOKENS

TEN_MB = 10 * 1024 * 1024

ROWS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "gold": "there was a bird", "source": "web"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], "answer": 72},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi <|im_end|>"}]},
    {"prompt": "p", "chosen": " good", "rejected": " bad"},
    {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}],
    },
    {"prompt": "q", "completions": [" a", " b", " c"], "scores": [1.5, -2, None]},
    {"prompt": "u", "completion": " done", "label": True},
    {"prompt": "u", "completion": " undone", "label": False},
    {"prompt": "i", "instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 3}]},
]
VERDICTS: list[dict[str, Any]] = [
    {"pair_id": "id-1", "verdict": "right"},
    {
        "pair_id": "id-2",
        "verdict": "tie",
        "annotators": {"Ana": {"verdict": "left", "at": "2026-11-21", "origin": "x"}},
    },
    {"prompt_id": "prompt-3", "left": "chosen 3", "right": "rejected 3", "verdict": "left"},
    {"prompt_id": "prompt-4", "left": "rejected 4", "right": "chosen 4", "verdict": "both_bad"},
]
RECIPES = (
    "recipe: iterative_dpo\nname: mine\nseed: 3\nrounds: 2\npolicy: embedded\nprompts: embedded\n"
    "judge: {kind: lexicon}\nsampler: {kind: hf, completions: 4, temperature: 0.7, top_p: 0.95, max_new_tokens: 64}\n"
    "loss: {kind: dpo, beta: 0.1}\ntrain:\n  learning_rate: 1.0e-4\n  epochs: 1\n  pairs_per_step: 8\n"
    "per_round: {loss.beta: [0.1, 0.2]}\n",
    "recipe: spin\nprompts: {path: x.jsonl, column: question, holdout: 0.3, limit: 50}\n"
    "policy: {path: m, revision: v1}\n"
    "judge:\n  kind: llm\n  model: judge-model\n  base_url: http://127.0.0.1:8000/v1\nround_exit: merge_reinit\n",
    "recipe: kto\npreset: ''\nbase: &b {kind: hf}\nsampler: *b\nevaluate: {prompts: 32, completions: 1}\nthreads: 2\n",
    "recipe: tso\njudge: ./judge.py:Mine\npair_builder: {kind: corrected, of: ranked, corrections: null}\n"
    "train: {lora: {rank: 4, alpha: 8}}\nreference: initial\nstart_from: best\n"
    "combine: {rule: given, coefficients: [1, 0]}\n",
)
OVERRIDES = (
    *("train.learning_rate=1e-4", "name=mine", "rounds=3", "judge.kind=lexicon", "policy=embedded"),
    *("loss={kind: dpo, beta: 0.2}", "per_round={loss.beta: [0.1, 0.2]}", "prompts.limit=10", "train.lora.rank=8"),
    *("sampler.temperature=0.7", "combine.coefficients=[1, 2]", "seed=0", "judge=./judge.py:Mine", "threads=auto"),
)
REPLIES_TEXT = (
    "The answer is right and short.\nScore: 4",
    "Reasons.\n\n**Score: 4/5**",
    "<think>Score: 1</think>\nGood.\nScore: 5 out of 5",
    "Both are fine.\nBetter: A",
    "Better: tie.",
    "Ranking: B > A = C",
    "Accuracy: 3\nStyle: 2",
)
REPLIES_JSON = (
    '{"reason": "right", "score": 4}',
    '```json\n{"reason": "right", "score": 4}\n```',
    '{"reason": "", "better": "A"}',
    '{"reason": "x", "ranking": "B > A = C"}',
    '{"reason": "x", "accuracy": 3, "style": 2}',
)
RESPONSES: list[dict[str, Any]] = [
    {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Score: 4"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 4},
    },
    {
        "choices": [
            {
                "message": {"content": "ab"},
                "finish_reason": "length",
                "token_ids": [5, 6],
                "logprobs": {"content": [{"token": "token_id:5", "logprob": -0.5}, {"token": "b", "logprob": -1}]},
            }
        ],
        "prompt_token_ids": [1, 2, 3],
    },
    {"choices": [{"text": "ab", "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-0.1, None]}}]},
]
TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% if messages[0].role != 'user' %}{{ raise_exception('must begin with the user') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}] {{ m.content.strip() }} {% endfor %}",
    "{{ bos_token + messages | map(attribute='content') | join(' ') }}{{ strftime_now('%Y') }}",
)


def parquet_bytes(rows: list[dict[str, Any]], **options: Any) -> bytes:
    """Return a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def lines(rows: list[Any]) -> bytes:
    """Return rows as JSON lines; a lone surrogate becomes an escape, NaN stands as it is."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


NASTY = st.one_of(
    st.text(max_size=30),
    st.sampled_from([token.decode("utf-8", "surrogateescape") for token in TOKENS]),
    st.characters().map(lambda c: f"a{c}b"),
    st.sampled_from(["\ud800", "\x00", "", " ", "\u202e", "\x1b[31m", "a" * 5000]),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(2**64), 10**30, 0, -1, 1]),
    st.floats(),
    NASTY,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NASTY, inner, max_size=4)),
    max_leaves=8,
)


def _like(example: Any) -> st.SearchStrategy[Any]:
    """Return values in the shape of `example`, each part of which may be something else."""
    if isinstance(example, dict):
        shaped: st.SearchStrategy[Any] = st.fixed_dictionaries(
            {}, optional={key: _like(value) for key, value in example.items()}
        )
        whole: st.SearchStrategy[Any] = st.fixed_dictionaries({key: _like(value) for key, value in example.items()})
        return st.one_of(whole, whole, shaped, VALUES)
    if isinstance(example, (list, tuple)) and example:
        return st.one_of(st.tuples(*map(_like, example)).map(list), st.lists(_like(example[0]), max_size=3), VALUES)
    return st.one_of(st.just(example), st.just(example), SCALARS, VALUES)


def json_lines_like(rows: list[Any]) -> st.SearchStrategy[bytes]:
    """Return JSON lines of rows that look like `rows`."""
    return st.lists(st.one_of([_like(row) for row in rows]), max_size=3).map(lines)


def json_like(rows: list[Any]) -> st.SearchStrategy[bytes]:
    """Return one JSON value that looks like one of `rows`."""
    return st.one_of([_like(row) for row in rows]).map(lambda row: json.dumps(row).encode())


def parquet_like(rows: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    """Return Parquet files of one row that Arrow can hold; a row that it cannot becomes an empty file."""

    def write(row: Any) -> bytes:
        try:
            return parquet_bytes([row])
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, AttributeError, TypeError):
            return b""

    return st.one_of([_like(row) for row in rows]).map(write)


def texts() -> st.SearchStrategy[bytes]:
    """Return a few nasty strings, one after the other."""
    return st.lists(NASTY, max_size=5).map(lambda parts: "".join(parts).encode("utf-8", "surrogatepass"))


Giants = Callable[[], Iterator[bytes]]


def giant_json() -> Iterator[bytes]:
    """Yield lines of ten megabytes and nestings of 100,000."""
    yield lines([{"prompt": "x" * TEN_MB}])
    yield lines([{"prompt": "p", "chosen": "y" * TEN_MB, "rejected": "z"}])
    yield b"{" * TEN_MB
    yield b"[" * 100_000 + b"]" * 100_000
    yield b'{"prompt":' * 100_000 + b"1" + b"}" * 100_000
    yield b'{"' + b"k" * TEN_MB + b'": 1}\n'
    yield b'{"prompt": "a", "scores": [' + b"9" * TEN_MB + b"]}"
    yield b"\x00" * TEN_MB
    yield b"\xff" * TEN_MB
    yield b"\n" * TEN_MB


def giant_text() -> Iterator[bytes]:
    """Yield texts of ten megabytes."""
    yield b"Score: 4\n" + b"x" * TEN_MB
    yield b"Score: " * (TEN_MB // 7)
    yield b"`" * 199_000 + b"Score: 4"
    yield b"Score" + b" " * 199_000 + b"x"
    yield b"[" * 199_000
    yield b"=" * TEN_MB


def bombs_yaml() -> Iterator[bytes]:
    """Yield YAML that grows without bound where aliases are expanded, that contains itself, or nests deeply."""
    names = "abcdefghijklmnopqrst"
    bomb = "a: &a [x, x]\n" + "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise(names))
    yield bomb.encode()
    maps = "a: &a {k: x}\n" + "".join(
        f"{new}: &{new} {{{', '.join(f'{i}: *{old}' for i in range(9))}}}\n" for old, new in pairwise(names)
    )
    yield maps.encode()
    yield b"recipe: iterative_dpo\nper_round: &a {x: [*a]}\n"
    yield b"&a [*a]"
    yield b"&a {b: *a}"
    yield b"[" * 5_000 + b"]" * 5_000
    yield b"{a: " * 3_000 + b"1" + b"}" * 3_000
    yield b"a: " + b"9" * 100_000
    yield b"name: " + b"x" * 1_000_000
    yield b"? " * 3_000 + b"a"
    yield b"- " * 3_000 + b"a"


def giant_overrides() -> Iterator[bytes]:
    """Yield key=value arguments of a megabyte, and keys of thousands of parts."""
    yield b"a." * 5_000 + b"b=1"
    yield b"name=" + b"x" * 1_000_000
    yield b"per_round=" + b"[" * 5_000
    yield b"rounds=" + b"9" * 5_000
    yield b"rounds=99999999999999999999"
    yield b"rounds=1000000000"
    yield b"name=../../../tmp/x"
    yield b"name=/etc/x"


def bombs_parquet() -> Iterator[bytes]:
    """Yield small Parquet files that unpack to gigabytes, by compression and by one value that many rows share."""
    for compression in ("zstd", "snappy", "gzip"):
        yield parquet_bytes([{"prompt": "x" * 2_000_000, "n": i} for i in range(150)], compression=compression)
    yield shared_value(1_000_000, 200_000)
    yield repeated_item(1_000_000, 300)


def shared_value(length: int, rows: int) -> bytes:
    """Return a Parquet file whose rows all hold the same text, which is stored once."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows), pa.array(["y" * length]))
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": column}), sink, compression="zstd", store_schema=False)
    return sink.getvalue()


def repeated_item(length: int, times: int) -> bytes:
    """Return a Parquet file of one row with a list that holds the same text many times."""
    nested = pa.array([["z" * length] * times], pa.list_(pa.string()))
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["p"], "completions": nested}), sink, compression="zstd")
    return sink.getvalue()
