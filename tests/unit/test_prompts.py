import importlib
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefloop.errors import ConfigError, DataError, PrefloopError
from prefloop.prompts.dataset import PromptSet, read_prompts
from prefloop.rows import HOLDOUT, TRAIN, VERBATIM, Message, prompt_id
from tiny import SHARED, needs_shared, write_jsonl

USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return str(path)


def rows_file(tmp_path, *rows):
    return str(write_jsonl(tmp_path / "p.jsonl", list(rows)))


# What is read


def test_a_string_is_a_verbatim_prompt_and_says_where_it_stood(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "Once "}\n\n  \r\n{"prompt": "Zwölf 🐍\\u2028"}\r\n')
    found = read_prompts(path)
    assert [p.messages for p in found.prompts] == [
        (Message(VERBATIM, "Once "),),
        (Message(VERBATIM, "Zwölf 🐍\u2028"),),
    ]
    assert [p.source for p in found.prompts] == [f"{path}:1", f"{path}:4"]
    assert found.prompts[0].prompt_id == prompt_id((Message(VERBATIM, "Once "),))
    assert (found.prompts[0].gold, found.prompts[0].media, found.dropped) == (None, (), ())


def test_conversations(tmp_path):
    path = rows_file(
        tmp_path,
        {"prompt": [SYSTEM, USER]},
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT, USER], "gold": "g"},
    )
    first, second, third = read_prompts(path).prompts
    assert first.messages == (Message("system", "Be brief."), Message("user", "Why?"))
    assert (second.messages, second.gold) == ((Message("user", "Why?"),), "Because.")
    assert (len(third.messages), third.gold) == (3, "g")


def test_a_named_column(tmp_path):
    path = rows_file(tmp_path, {"question": "Q", "prompt": "no"}, {"question": [SYSTEM, USER, ASSISTANT]})
    first, second = read_prompts(path, column="question").prompts
    assert first.text == "Q"
    assert (len(second.messages), second.gold) == (2, "Because.")


@pytest.mark.parametrize(
    ("columns", "gold"),
    [
        ({"gold": "a", "answer": "b", "chosen": "c"}, "a"),
        ({"gold": None, "answer": "", "completion": "c"}, "c"),
        ({"answer": 72}, "72"),
        ({"answer": 0.5}, "0.5"),
        ({"answer": True}, None),
        ({"answer": {"a": 1}, "chosen": [USER, ASSISTANT]}, "Because."),
        ({"chosen": []}, None),
        ({"completion": [{"content": 3}]}, "3"),
        ({"rejected": "r"}, None),
    ],
)
def test_gold_is_looked_for_in_order(tmp_path, columns, gold):
    (prompt,) = read_prompts(rows_file(tmp_path, {"prompt": "p", **columns})).prompts
    assert prompt.gold == gold


def test_a_named_gold_column_wins_and_may_be_missing_in_some_rows(tmp_path):
    path = rows_file(tmp_path, {"messages": [USER, ASSISTANT], "ref": "r", "gold": "g"}, {"prompt": "p", "gold": "g"})
    assert [p.gold for p in read_prompts(path, gold="ref").prompts] == ["r", None]


def test_text_lines(tmp_path):
    path = write(tmp_path / "p.txt", b"\xef\xbb\xbfOnce upon\r\n\n  indented \nlast\x0bline")
    assert [p.text for p in read_prompts(path).prompts] == ["Once upon", "  indented ", "last\x0bline"]


def test_json_lines_and_json_array_give_the_same(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    lines = read_prompts(write(tmp_path / "l.json", "".join(json.dumps(row) + "\n" for row in rows)))
    array = read_prompts(write(tmp_path / "a.json", json.dumps(rows, indent=2)))
    assert [p.prompt_id for p in lines.prompts] == [p.prompt_id for p in array.prompts]
    assert [p.source for p in array.prompts] == [f"{tmp_path}/a.json:item 1", f"{tmp_path}/a.json:item 2"]


def test_parquet_files_and_folders(tmp_path):
    def part(name, *rows):
        pq.write_table(pa.Table.from_pylist(list(rows)), tmp_path / name)

    part("a-1.parquet", {"prompt": [SYSTEM, USER], "gold": "x"}, {"prompt": [USER], "gold": None})
    part("a-0.parquet", {"prompt": "first", "gold": "y"})
    (tmp_path / ".hidden.parquet").write_bytes(b"")
    found = read_prompts(str(tmp_path)).prompts
    assert [p.source for p in found] == [f"{tmp_path}/a-0.parquet:1", *(f"{tmp_path}/a-1.parquet:{i}" for i in (1, 2))]
    assert [p.gold for p in found] == ["y", "x", None]
    assert read_prompts(str(tmp_path / "a-1.parquet")).prompts == found[1:]


def test_a_folder_with_parts_of_splits_is_read_for_one_split(tmp_path):
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        pq.write_table(pa.table({"prompt": [name]}), tmp_path / f"{name}.parquet")
    assert [p.text for p in read_prompts(str(tmp_path)).prompts] == ["train-00000-of-00001"]
    assert [p.text for p in read_prompts(str(tmp_path), split="test").prompts] == ["test-00000-of-00001"]


def test_limit_counts_rows(tmp_path):
    path = rows_file(tmp_path, {"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}, {"wrong": 1})
    assert [p.text for p in read_prompts(path, limit=2).prompts] == ["a"]
    assert [p.text for p in read_prompts(path, limit=3).prompts] == ["a", "b"]


def test_duplicates_are_kept_once_and_reported(tmp_path):
    rows = [
        {"prompt": text, "gold": gold} for text, gold in (("a", "1"), ("b", "1"), ("a", "1"), ("a", "2"), ("b", "1"))
    ]
    path = rows_file(tmp_path, *rows)
    found = read_prompts(path)
    assert [(p.text, p.gold) for p in found.prompts] == [("a", "1"), ("b", "1")]
    assert found.dropped == (
        f"3 duplicate prompts dropped: {path}:3 repeats {path}:1, {path}:4 repeats {path}:1, …; "
        "1 of them with another gold answer, which is not used",
    )
    (only,) = read_prompts(rows_file(tmp_path, {"prompt": "a"}, {"prompt": "a"})).dropped
    assert only == f"1 duplicate prompt dropped: {path}:2 repeats {path}:1"


def test_the_holdout_is_stable(tmp_path):
    texts = [f"prompt {i}" for i in range(400)]
    few = read_prompts(rows_file(tmp_path, *({"prompt": text} for text in texts[:100])))
    many = read_prompts(rows_file(tmp_path, *({"prompt": text} for text in reversed(texts))))
    sides = {p.prompt_id: p.split for p in many.prompts}
    assert all(sides[p.prompt_id] == p.split for p in few.prompts)
    assert 50 < len(many.holdout) < 110
    assert len(many.holdout) + len(many.train) == 400
    assert {p.split for p in many.holdout} == {HOLDOUT}
    assert {p.split for p in many.train} == {TRAIN}
    more = read_prompts(rows_file(tmp_path, *({"prompt": text} for text in texts)), holdout=0.9)
    assert {p.prompt_id for p in many.holdout} < {p.prompt_id for p in more.holdout}
    assert all((int(p.prompt_id, 16) / 2**64 < 0.9) == (p.split == HOLDOUT) for p in more.prompts)


@needs_shared
def test_real_files():
    gsm8k = read_prompts(str(SHARED / "gsm8k" / "train.jsonl"), column="question")
    assert len(gsm8k.prompts) == 7473
    assert gsm8k.dropped == ()
    assert all("####" in (p.gold or "") for p in gsm8k.prompts)
    assert 0.18 < len(gsm8k.holdout) / 7473 < 0.22
    ifeval = read_prompts(str(SHARED / "prompts" / "ifeval_en_input.jsonl"))
    assert len(ifeval.prompts) + sum("duplicate" in note for note in ifeval.dropped) >= 1
    assert len(read_prompts(str(SHARED / "llmbar" / "natural.json"), column="input").prompts) > 90
    with pytest.raises(
        DataError, match=r"vicuna_questions\.jsonl:1: no column 'prompt' \(columns: question_id, category"
    ):
        read_prompts(str(SHARED / "prompts" / "vicuna_questions.jsonl"))


# What is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', r"p\.jsonl:2: not valid JSON \(.* at column 15\); write one JSON object a line"),
        (b"prompt", r"p\.jsonl:2: not valid JSON"),
        (b'{"prompt": "\xff"}', r"p\.jsonl:2: byte 13 is not valid UTF-8"),
        (b"[" * 100_000, r"p\.jsonl:2: JSON that cannot be read"),
        (b"1" * 5000, r"p\.jsonl:2: JSON that cannot be read"),
        (b"[1]", r"p\.jsonl:2: must be a JSON object .* got list \[1\]"),
        (b'"text"', r"p\.jsonl:2: must be a JSON object .* got str 'text'"),
        (b'{"text": "a", "id": 3}', r"p\.jsonl:2: no column 'prompt' \(columns: text, id\); .* prompts\.column"),
        (b"{}", r"p\.jsonl:2: no column 'prompt' \(columns: none\)"),
        (b'{"prompt": 3}', r"p\.jsonl:2: prompt must be a string or a list of messages, got int 3"),
        (b'{"prompt": null}', r"p\.jsonl:2: prompt must be a string .* got NoneType"),
        (b'{"prompt": {"role": "user"}}', r"p\.jsonl:2: prompt must be a string .* got dict"),
        (b'{"prompt": " \\n"}', r"p\.jsonl:2: prompt is an empty prompt"),
        (b'{"prompt": []}', r"p\.jsonl:2: prompt is an empty prompt"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', r"p\.jsonl:2: messages is an empty prompt"),
        (b'{"prompt": [{"role": "user", "content": ""}]}', r"p\.jsonl:2: prompt is an empty prompt"),
        (b'{"prompt": ["x"]}', r"p\.jsonl:2: prompt\[0\] must have the keys role and content, got str 'x'"),
        (b'{"prompt": [{"from": "human"}]}', r"prompt\[0\] must have the keys role and content, got dict"),
        (b'{"prompt": [{"role": "user"}]}', r"prompt\[0\] must have the keys role and content"),
        (b'{"prompt": [{"role": 1, "content": "x"}]}', r"prompt\[0\]\.role must be system, user"),
        (b'{"prompt": [{"role": "text", "content": "x"}]}', r"prompt\[0\]\.role must be system, user"),
        (b'{"prompt": [{"role": "user", "content": [1]}]}', r"prompt\[0\]\.content must be a string, got list"),
        (b'{"prompt": [{"role": "user", "content": "x", "tool_calls": [1]}]}', r"prompt\[0\] has tool_calls"),
        (
            b'{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
            "ends with a message",
        ),
        (b'{"prompt": "a\\u0000b"}', r"p\.jsonl:2: prompt has a null character at position 2"),
        (b'{"prompt": "a", "gold": "\\u0000"}', r"p\.jsonl:2: gold has a null character at position 1"),
        (b'{"prompt": "ab\\ud800"}', r"p\.jsonl:2: prompt has half a surrogate pair at position 3"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_key(tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", b'{"prompt": "good"}\n' + line + b'\n{"prompt": "good too"}\n')
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(path)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["[1]", "true", '{"a": 1}'])
def test_a_named_gold_column_of_a_wrong_type_is_refused(tmp_path, value):
    path = write(tmp_path / "p.jsonl", f'{{"prompt": "a", "ref": {value}}}')
    with pytest.raises(DataError, match=r"p\.jsonl:1: ref must be a string, a number or a list of messages"):
        read_prompts(path, gold="ref")


def test_a_gold_column_that_no_row_has_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"p\.jsonl: no row has the column 'ref' that prompts\.gold names"):
        read_prompts(rows_file(tmp_path, {"prompt": "a"}), gold="ref")


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.txt"])
@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, name, content):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=rf"{name}: holds no prompts"):
        read_prompts(path)


def test_an_empty_array_and_an_empty_table_are_refused(tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "e.parquet")
    for path in (write(tmp_path / "e.json", "[]"), str(tmp_path / "e.parquet")):
        with pytest.raises(DataError, match="holds no prompts"):
            read_prompts(path)


def test_a_broken_array_is_refused_with_its_place(tmp_path):
    with pytest.raises(DataError, match=r"b\.json:item 2: must be a JSON object"):
        read_prompts(write(tmp_path / "b.json", '[{"prompt": "a"}, 3]'))
    with pytest.raises(DataError, match=r"b\.json: not valid JSON .* at line 2, column"):
        read_prompts(write(tmp_path / "b.json", '[{"prompt": "a"},\n{"prompt"}]'))


def test_a_broken_parquet_file_is_refused(tmp_path):
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"prompt": [f"text {i}" for i in range(2000)]}), whole)
    data = whole.read_bytes()
    middle = len(data) // 3
    for broken in (b"", b"PAR1", data[:-20], data[:middle] + b"\xff" * 200 + data[middle + 200 :]):
        with pytest.raises(DataError, match=r"p\.parquet: not a readable Parquet file|p\.parquet:\d+"):
            read_prompts(write(tmp_path / "p.parquet", broken))
    pq.write_table(pa.table({"text": ["a"]}), whole)
    with pytest.raises(DataError, match=r"whole\.parquet:1: no column 'prompt' \(columns: text\)"):
        read_prompts(str(whole))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", r"no file or folder 'none\.jsonl' in /"),
        ("./none", r"no file or folder '\./none'"),
        ("/no/such/folder", "no file or folder"),
        ("a/b/c", "no file or folder"),
        ("none.csv", "no file or folder"),
        ("", "type must be one of|no file or folder"),
    ],
)
def test_a_missing_source_is_refused_without_asking_the_hub(path, message, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(ConfigError, match=message) as caught:
        read_prompts(path)
    assert caught.value.exit_code == 2


def test_another_file_type_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"p\.csv: its type must be one of \.jsonl, \.json, \.parquet, \.txt"):
        read_prompts(write(tmp_path / "p.csv", "prompt\na\n"))
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(ConfigError, match=r"folder without \.parquet files"):
        read_prompts(str(tmp_path / "folder.parquet"))


@pytest.mark.parametrize("holdout", [0, -0.1, 0.91, 1, float("nan")])
def test_the_holdout_is_in_range(tmp_path, holdout):
    with pytest.raises(ConfigError, match=r"prompts\.holdout: must be above 0 and at most 0\.9"):
        read_prompts(rows_file(tmp_path, {"prompt": "a"}), holdout=holdout)


def test_limit_is_in_range(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts\.limit: must be ≥ 1, got 0"):
        read_prompts(rows_file(tmp_path, {"prompt": "a"}), limit=0)


# The hub's library: what it is asked, and what its errors become. Nothing here needs the network.


def test_a_hub_data_set_needs_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigError, match=r"owner/name needs the `datasets` package: pip install 'prefloop\[hf-data\]'"
    ):
        read_prompts("owner/name")
    (tmp_path / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"pip install 'prefloop\[hf-data\]'"):
        read_prompts(str(tmp_path))


class FakeLibrary:
    class exceptions:
        class DatasetsError(Exception):
            pass

    def __init__(self, rows=(), error=None):
        self.rows, self.error, self.asked = rows, error, None

    def load_dataset(self, name, config, split):
        self.asked = (name, config, split)
        if self.error:
            raise self.error
        return self.rows


@pytest.mark.parametrize(
    ("path", "name", "config"), [("squad", "squad", None), ("openai/gsm8k:main", "openai/gsm8k", "main")]
)
def test_a_hub_data_set_is_read_by_name(monkeypatch, path, name, config):
    library = FakeLibrary([{"prompt": "a", "gold": "b"}])
    monkeypatch.setitem(sys.modules, "datasets", library)
    (prompt,) = read_prompts(path, split="test").prompts
    assert library.asked == (name, config, "test")
    assert (prompt.text, prompt.gold, prompt.source) == ("a", "b", f"{path}/test:1")


@pytest.mark.parametrize(
    "error", [ConnectionError("offline\nnow"), ValueError("no config"), FakeLibrary.exceptions.DatasetsError("gone")]
)
def test_a_hub_error_says_what_was_tried(monkeypatch, error):
    monkeypatch.setitem(sys.modules, "datasets", FakeLibrary(error=error))
    with pytest.raises(
        ConfigError, match=r"no file or folder 'mine', and no data set .* split 'train' \(\w+Error: "
    ) as caught:
        read_prompts("mine")
    assert "\n" not in str(caught.value)


def test_a_folder_of_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": [USER], "gold": "g"}, {"prompt": [SYSTEM, USER], "gold": "h"}])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "both"))
    assert [p.gold for p in read_prompts(str(tmp_path / "one")).prompts] == ["g", "h"]
    assert [p.source for p in read_prompts(str(tmp_path / "both"), split="test").prompts] == [f"{tmp_path}/both:1"]
    with pytest.raises(ConfigError, match=r"prompts\.split: .* no split 'dev'; it has train, test"):
        read_prompts(str(tmp_path / "both"), split="dev")
    (tmp_path / "one" / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="cannot read it"):
        read_prompts(str(tmp_path / "one"))


# Whatever stands in a file, the reader gives prompts or one of our errors


def readable(path, **options):
    try:
        found = read_prompts(str(path), **options)
    except PrefloopError as error:
        message = str(error)
    else:
        assert isinstance(found, PromptSet)
        assert len({p.prompt_id for p in found.prompts}) == len(found.prompts) > 0
        return
    assert str(path) in message


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "x"]), inner, max_size=3),
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": inner}),
    ),
    max_leaves=8,
)
COLUMNS = st.dictionaries(
    st.sampled_from(["prompt", "messages", "gold", "answer", "chosen", "ref"]), VALUES, max_size=4
)


@FUZZ
@given(
    lines=st.lists(
        st.one_of(st.binary(max_size=20), st.just(b'{"prompt": "a"}'), st.just(b"["), st.just(b"")), max_size=5
    ),
    kind=st.sampled_from(["jsonl", "json", "txt", "parquet"]),
)
def test_random_bytes_never_crash(tmp_path, lines, kind):
    path = tmp_path / f"fuzz.{kind}"
    path.write_bytes(b"\n".join(lines))
    readable(path)


@FUZZ
@given(
    rows=st.lists(st.one_of(COLUMNS, VALUES), max_size=4),
    is_array=st.booleans(),
    gold=st.sampled_from([None, "ref"]),
    column=st.sampled_from(["prompt", "messages", "chosen"]),
)
def test_random_rows_never_crash(tmp_path, rows, is_array, gold, column):
    path = tmp_path / "fuzz.json"
    path.write_text(json.dumps(rows) if is_array else "\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    readable(path, gold=gold, column=column)
