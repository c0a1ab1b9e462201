"""Records to Parquet and back. The Arrow schema is read off the record's own type hints."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from prefloop.errors import CorruptArtifact

R = TypeVar("R")

_SCALARS: dict[type, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
}
_ATOMS = frozenset({*_SCALARS, NoneType})
UNPACKED = 256 * 2**20
"""Bytes that a Parquet file may always unpack to, and what one batch of its rows may take, whatever it repeats."""
MOST_UNPACKED = 100
"""Beyond `UNPACKED`, how many times its own size a Parquet file may unpack to; text compresses three to five times."""
UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError, TypeError)
"""What pyarrow raises on a file that is damaged, or holds other values than its schema says."""
_FIELDS: dict[Any, tuple[tuple[str, Any], ...]] = {}
_DECODERS: dict[Any, Callable[[Any], Any]] = {}


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (UnionType, Union):
        (inner,) = [arg for arg in get_args(hint) if arg is not NoneType]
        return inner
    return hint


def arrow_type(hint: Any) -> pa.DataType:
    """Return the Arrow type of a type hint made of records, tuples, scalars and `None`."""
    hint = _without_none(hint)
    if hint in _SCALARS:
        return _SCALARS[hint]
    if get_origin(hint) is tuple:
        return pa.list_(arrow_type(get_args(hint)[0]))
    if is_dataclass(hint):
        return pa.struct([pa.field(name, arrow_type(kind)) for name, kind in _fields(hint)])
    raise TypeError(f"columns: no Arrow type for {hint!r}")


def _fields(record: Any) -> tuple[tuple[str, Any], ...]:
    """Return (name, type hint) of each field, read once for each class."""
    if record not in _FIELDS:
        hints = get_type_hints(record)
        _FIELDS[record] = tuple((f.name, hints[f.name]) for f in fields(record))
    return _FIELDS[record]


def schema(record: type) -> pa.Schema:
    """Return the Arrow schema of a record class."""
    return pa.schema([pa.field(name, arrow_type(kind)) for name, kind in _fields(record)])


def to_plain(value: Any) -> Any:
    """Return `value` with records as dicts and tuples as lists, as Arrow and JSON take them."""
    if type(value) in _ATOMS:
        return value
    if type(value) in _FIELDS or is_dataclass(value):
        return {name: to_plain(getattr(value, name)) for name, _ in _fields(type(value))}
    if isinstance(value, tuple) and value and not isinstance(value[0], (int, float, str)):
        return [to_plain(item) for item in value]
    return value


def _decoder(hint: Any) -> Callable[[Any], Any]:
    """Return the function that turns Arrow's plain value back into what `hint` says."""
    inner = _without_none(hint)
    if get_origin(inner) is tuple:
        item = get_args(inner)[0]
        if _without_none(item) in _SCALARS:
            required = _without_none(item) is item
            return lambda value: None if value is None else _scalars(value, required)
        decode_item = _decoder(item)
        return lambda value: None if value is None else tuple(decode_item(v) for v in value)
    if is_dataclass(inner):
        parts = [(name, _decoder(kind), _without_none(kind) is kind) for name, kind in _fields(inner)]
        make: Callable[..., Any] = inner  # type: ignore[assignment]
        return lambda value: None if value is None else make(**{k: _given(k, value[k], d, r) for k, d, r in parts})
    return lambda value: value


def _scalars(value: list[Any], required: bool) -> tuple[Any, ...]:
    if required and None in value:
        raise ValueError("a list has an item without a value")
    return tuple(value)


def _given(name: str, value: Any, decode: Callable[[Any], Any], required: bool) -> Any:
    if value is None and required:
        raise ValueError(f"{name} has no value")
    return decode(value)


def decoder(record: type[R]) -> Callable[[dict[str, Any]], R]:
    """Return the function that turns what `to_plain` made of a record back into it; it raises as `from_plain` does."""
    if record not in _DECODERS:
        _DECODERS[record] = _decoder(record)
    return _DECODERS[record]


def from_plain(record: type[R], value: dict[str, Any]) -> R:
    """Return the record that `to_plain` made `value` from.

    Raises:
        KeyError: a field is missing.

    """
    return decoder(record)(value)


def write_rows(path: Path, record: type, rows: Iterable[Any]) -> int:
    """Write `rows` to one Parquet file and return how many there were. The same rows give the same bytes."""
    table = pa.Table.from_pylist([to_plain(row) for row in rows], schema=schema(record))
    pq.write_table(table, path, compression="zstd")
    return int(table.num_rows)


def read_rows(path: Path, record: type[R]) -> Iterable[R]:
    """Yield the records of one Parquet file, without holding more than a batch of rows in memory.

    Raises:
        CorruptArtifact: the file is no Parquet, or its columns or values are not those of `record`.

    """
    decode = decoder(record)
    wanted = schema(record)
    row = 0
    try:
        for batch in batches(path, 4096):
            missing = [name for name in wanted.names if name not in batch.schema.names]
            if missing:
                raise KeyError(f"no column {missing[0]}")
            for value in batch.select(wanted.names).cast(wanted).to_pylist():
                row += 1
                yield decode(value)
    except UNREADABLE as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise CorruptArtifact(
            f"{path}: row {row + 1} cannot be read as {record.__name__} ({type(error).__name__}: {reason}); rerun with "
            "--redo to make it again"
        ) from error


def batches(path: Path, most_rows: int) -> Iterator[Any]:
    """Yield the rows of a Parquet file as Arrow batches; the first is made only when it is asked for.

    A value that many rows share, or bytes that compress well, may make gigabytes of a small file: a batch takes no more
    than about `UNPACKED`.

    Raises:
        ValueError: the file unpacks to more than is believable; and whatever else of `UNREADABLE` pyarrow raises.

    """
    unpacked, most = 0, max(UNPACKED, MOST_UNPACKED * path.stat().st_size)
    with pq.ParquetFile(path) as table:
        groups = [table.metadata.row_group(index).total_byte_size for index in range(table.metadata.num_row_groups)]
        rows = max(1, min(most_rows, UNPACKED // max([1, *groups])))
        for batch in table.iter_batches(batch_size=rows):
            unpacked += batch.nbytes
            if unpacked > most:
                raise ValueError(f"unpacks to more than {MOST_UNPACKED} times its size")
            yield batch


def count_rows(path: Path) -> int:
    """Return the number of rows of a Parquet file, from its footer."""
    return int(pq.read_metadata(path).num_rows)
