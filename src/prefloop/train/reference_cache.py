"""Reference log-probs in a folder that runs and rounds share, so that no completion is scored twice by one reference.

    folder/REFERENCE-DTYPE/CONTENT.parquet    key and log-probs of some completions, written whole or not at all

REFERENCE is the policy's digest, CONTENT that of the keys in the file. A key is a digest of the token ids of context
and completion. Nothing in a folder ever changes, so that any number of runs may read and write it at once.
"""

import hashlib
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from transformers import PreTrainedModel

from prefloop.artifact import flush_folder, flush_tree
from prefloop.columns import write_rows
from prefloop.errors import CorruptArtifact
from prefloop.rows import TokenizedPair, digest_of

SPOT_CHECKS = 16
"""Pairs of a part whose log-probs are scored again, wherever known ones are used."""
HELD_FILES = 64
"""Files that are held in memory at once."""
SUFFIX = ".parquet"


@dataclass(frozen=True, slots=True)
class KnownLogps:
    """A completion's log-probs, nats, under the folder's reference."""

    key: str
    token_logps: tuple[float, ...]


@dataclass
class ReferenceCache:
    """What a folder knows of one reference. Holds 16 bytes for each completion, and `HELD_FILES` files at most.

    Raises:
        CorruptArtifact: a file in the folder cannot be read.

    """

    folder: Path
    """Where the files of this reference are: see `of`."""
    tolerance: float
    """Largest difference between a stored and a live log-prob of one token, nats."""
    used: int = 0
    """Pairs whose log-probs were known."""
    _files: list[Path] = field(default_factory=list)
    _keys: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    _places: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _held: OrderedDict[int, pa.Table] = field(default_factory=OrderedDict)

    @classmethod
    def of(cls, folder: Path, reference: str, model: PreTrainedModel) -> "ReferenceCache":
        """Return what `folder` knows of the reference with digest `reference`, which is `model`."""
        name = str(model.dtype).removeprefix("torch.")
        exact = 1e-3 if model.device.type == "cpu" else 0.05  # a GPU's products may be TF32
        tolerances = {"bfloat16": 0.5, "float16": 0.5}  # rare tokens feel the rounding most
        found = cls(folder / f"{reference}-{name}", tolerances.get(name, exact))
        for path in sorted(found.folder.glob(f"[!.]*{SUFFIX}")):
            found._note(path, _read(path, ["key"])["key"].to_pylist())
        return found

    def score(
        self, pairs: Sequence[TokenizedPair], live: Callable[[Sequence[TokenizedPair]], list[TokenizedPair]]
    ) -> list[TokenizedPair]:
        """Return `pairs` with the reference's log-probs: known ones, and those of `live`, which are stored.

        Some of the known ones are compared with live ones first.

        Raises:
            CorruptArtifact: they differ, or a file cannot be read.

        """
        known = [self._find(pair) for pair in pairs]
        hits = [pair for pair in known if pair is not None]
        self._check(hits[:: max(1, len(hits) // SPOT_CHECKS)][:SPOT_CHECKS], live)
        self.used += len(hits)
        missing = [pair for pair, found in zip(pairs, known, strict=True) if found is None]
        scored = live(missing)  # with nothing too: it may be a call on all ranks
        self._add(scored)
        rest = iter(scored)
        return [next(rest) if found is None else found for found in known]

    def _find(self, pair: TokenizedPair) -> TokenizedPair | None:
        values = []
        for context, tokens in _completions(pair):
            found = self._lookup(_key(context, tokens))
            if found is None or len(found) != len(tokens):
                return None
            values.append(found)
        views = tuple(replace(view, reference=v) for view, v in zip(pair.views, values[2:], strict=True))
        return replace(pair, reference_chosen=values[0], reference_rejected=values[1], views=views)

    def _lookup(self, key: str) -> tuple[float, ...] | None:
        short = _short(key)
        place = int(np.searchsorted(self._keys, short))
        while place < len(self._keys) and self._keys[place] == short:
            number, row = divmod(int(self._places[place]), _ROWS)
            table = self._table(number)
            if table["key"][row].as_py() == key:
                return tuple(table["token_logps"][row].as_py())
            place += 1
        return None

    def _table(self, number: int) -> pa.Table:
        if number in self._held:
            self._held.move_to_end(number)
        else:
            self._held[number] = _read(self._files[number])
            if len(self._held) > HELD_FILES:
                self._held.popitem(last=False)
        return self._held[number]

    def _check(
        self, known: Sequence[TokenizedPair], live: Callable[[Sequence[TokenizedPair]], list[TokenizedPair]]
    ) -> None:
        for stored, computed in zip(known, live(known), strict=True):
            gap = _gap(stored, computed)
            if not gap <= self.tolerance:
                raise CorruptArtifact(
                    f"{self.folder}: the log-probs of pair {stored.pair_id} differ from those of the reference by "
                    f"{gap:.2g} nats a token (allowed {self.tolerance}): they are another model's, or damaged; remove "
                    "this folder, or leave train.reference_cache out"
                )

    def _add(self, pairs: Sequence[TokenizedPair]) -> None:
        rows = {}
        for pair in pairs:
            for (context, tokens), values in zip(_completions(pair), _values(pair), strict=True):
                key = _key(context, tokens)
                if self._lookup(key) is None:
                    rows[key] = KnownLogps(key, values)
        if not rows:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{digest_of(sorted(rows))}{SUFFIX}"
        # A name of its own: another run may be writing the same rows.
        temporary = path.with_name(f".{secrets.token_hex(8)}{SUFFIX}")
        try:
            write_rows(temporary, KnownLogps, rows.values())
            flush_tree(temporary)
            os.replace(temporary, path)
            flush_folder(self.folder)
        finally:
            temporary.unlink(missing_ok=True)
        self._note(path, list(rows))

    def _note(self, path: Path, keys: Sequence[str]) -> None:
        short = np.array([_short(key) for key in keys], np.uint64)
        places = len(self._files) * _ROWS + np.arange(len(keys), dtype=np.int64)
        order = np.argsort(short)
        at = np.searchsorted(self._keys, short[order])
        self._keys = np.insert(self._keys, at, short[order])
        self._places = np.insert(self._places, at, places[order])
        self._files.append(path)


_ROWS = 1 << 32
"""More rows than a file has: file and row are one number."""


def _completions(pair: TokenizedPair) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield context and token ids of the two sides, then of the views."""
    yield pair.context, pair.chosen
    yield pair.context, pair.rejected
    for view in pair.views:
        yield view.context, view.tokens


def _values(pair: TokenizedPair) -> Iterator[tuple[float, ...]]:
    """Yield the reference's log-probs in the same order."""
    for values in (pair.reference_chosen, pair.reference_rejected, *(view.reference for view in pair.views)):
        assert values is not None  # the pair was scored
        yield values


def _gap(stored: TokenizedPair, computed: TokenizedPair) -> float:
    """Return the largest difference of one token, nats."""
    rows = zip(_values(stored), _values(computed), strict=True)
    return max((abs(a - b) for one, other in rows for a, b in zip(one, other, strict=True)), default=0.0)


def _key(context: Sequence[int], tokens: Sequence[int]) -> str:
    ids = np.array([len(context), *context, *tokens], "<i8")
    return hashlib.sha256(ids.tobytes()).hexdigest()[:32]


def _short(key: str) -> np.uint64:
    return np.uint64(int(key[:16], 16))


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise CorruptArtifact(f"{path}: cannot be read ({error}); remove it, and it is made again") from error
