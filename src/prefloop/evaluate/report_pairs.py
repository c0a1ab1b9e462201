"""The training pairs that the report shows, found without reading the others: a round can have very many."""

from collections.abc import Iterable
from heapq import nsmallest
from operator import itemgetter
from pathlib import Path

import pyarrow.parquet as pq

from prefloop.columns import from_plain
from prefloop.evaluate.report_examples import UNSEEN, PairExample, few_pairs
from prefloop.rows import PreferencePair

Place = tuple[float, str, int, int]
"""A pair's margin, its id, its part and its row in it."""


def stored_pairs(paths: Iterable[Path]) -> list[PairExample]:
    """Return what `few_pairs` returns of the pairs in these Parquet files; only margins and ids are read of the rest.

    Args:
        paths: of the parts of a finished artifact.

    """
    files = list(paths)
    places: list[Place] = []
    for part, path in enumerate(files):
        columns = pq.read_table(path, columns=["margin", "pair_id"])
        margins, names = columns["margin"].to_pylist(), columns["pair_id"].to_pylist()
        places += [(margin, name, part, row) for row, (margin, name) in enumerate(zip(margins, names, strict=True))]
    if not places:
        return []
    # The ends, and as many by id as are shown beside them; `few_pairs` then chooses among these few as among all.
    some = {max(places), min(places), *nsmallest(UNSEEN + 2, places, key=itemgetter(1))}
    rows = {part: sorted(row for _, _, place, row in some if place == part) for part in sorted({p[2] for p in some})}
    return few_pairs([_read(files[part], wanted) for part, wanted in rows.items()])


def _read(path: Path, rows: list[int]) -> list[PreferencePair]:
    """Return some rows of a file, given in rising order; row groups without any are not read."""
    found, first = [], 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            here = [row - first for row in rows if first <= row < after]
            if here:
                table = file.read_row_group(group)
                found += [from_plain(PreferencePair, table.slice(row, 1).to_pylist()[0]) for row in here]
            first = after
    return found
