import dataclasses
from dataclasses import dataclass

import pyarrow as pa
import pytest

from prefloop.columns import arrow_type, from_plain, read_rows, schema, to_plain, write_rows
from prefloop.rows import Completion, JudgedGroup, Message, Prompt, StepLog


def group() -> JudgedGroup:
    prompt = Prompt("00ff", (Message("user", "hé\u2028\x07"), Message("assistant", "")), None, "train", "f:1")
    completions = (
        Completion("a", "text", (1, 2, 3), (-0.5, -1.25, -3.0), "stop", 7, "p"),
        Completion("b", "", None, None, "length", 2**62, "gold", ("image.png",)),
    )
    return JudgedGroup(
        prompt, completions, "p", 3, 1.0, 0.9, (0.5, None), ((0.5, 0.7), (0.3, 0.5)), "judge", (None, "why")
    )


def test_a_nested_record_survives_parquet(tmp_path):
    assert write_rows(tmp_path / "x.parquet", JudgedGroup, [group()] * 3) == 3
    assert list(read_rows(tmp_path / "x.parquet", JudgedGroup)) == [group()] * 3


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in "ab":
        write_rows(tmp_path / name, JudgedGroup, [group()])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_plain_values_round_trip():
    assert from_plain(JudgedGroup, to_plain(group())) == group()


def test_no_rows_keep_the_schema(tmp_path):
    write_rows(tmp_path / "x.parquet", StepLog, [])
    assert list(read_rows(tmp_path / "x.parquet", StepLog)) == []


def test_schema_names_every_field():
    assert schema(Prompt).names == [field.name for field in dataclasses.fields(Prompt)]
    assert arrow_type(tuple[float | None, ...]) == pa.list_(pa.float64())


def test_a_field_without_an_arrow_type_is_refused():
    @dataclass
    class Odd:
        value: complex

    with pytest.raises(TypeError, match="complex"):
        schema(Odd)
