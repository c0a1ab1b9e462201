"""A round's pairs as they lie on disk, read part by part as training comes to them."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prefloop.artifact import Artifact
from prefloop.columns import from_plain
from prefloop.rows import TokenizedPair
from prefloop.train.plan import WINDOW, PairIndex, context_numbers

SIDES = ("context", "chosen", "rejected")


class PairStore(Sequence[TokenizedPair]):
    """The pairs of a finished artifact. Holds an index of a few bytes for each, and at most `WINDOW` parts at once.

    Raises:
        CorruptArtifact: a part is missing or damaged; looked at once, when the store is made.

    """

    def __init__(self, artifact: Artifact[TokenizedPair]) -> None:
        """Read lengths and contexts of every pair; the rest is read when asked for."""
        self._paths = list[Path]()
        lengths, owners = np.empty((artifact.rows, 4), np.int32), np.empty(artifact.rows, np.int64)
        starts = [0]
        for path in artifact.part_paths():
            table = pq.read_table(path, columns=[*SIDES, "views"])
            rows = slice(starts[-1], starts[-1] + len(table))
            sides = [pc.list_value_length(table[side]).to_numpy() for side in SIDES]
            lengths[rows] = np.stack([*sides, _view_tokens(table["views"])], axis=1)
            owners[rows] = context_numbers(pc.list_flatten(table["context"]).to_numpy(), sides[0])
            starts.append(rows.stop)
            self._paths.append(path)
        self.pairs = PairIndex(lengths, owners, np.array(starts, np.int64))
        self._held: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    @overload
    def __getitem__(self, place: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, place: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, place: int | slice) -> TokenizedPair | list[TokenizedPair]:
        """Return a pair, in the order in which they lie on disk."""
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        part = int(np.searchsorted(self.pairs.starts, place, side="right")) - 1
        row: dict[str, Any] = self._part(part).slice(place - int(self.pairs.starts[part]), 1).to_pylist()[0]
        return from_plain(TokenizedPair, row)

    def _part(self, part: int) -> pa.Table:
        if part in self._held:
            self._held.move_to_end(part)
        else:
            self._held[part] = pq.read_table(self._paths[part])
            if len(self._held) > WINDOW:
                self._held.popitem(last=False)
        return self._held[part]


def _view_tokens(views: Any) -> NDArray[np.int64]:
    """Return the tokens of each pair's views, contexts counted."""
    if not pc.any(pc.greater(pc.list_value_length(views), 0)).as_py():
        return np.zeros(len(views), np.int64)
    rows = views.to_pylist()
    return np.array([sum(len(v["context"]) + len(v["tokens"]) for v in row) for row in rows], np.int64)


def index_of(pairs: Sequence[TokenizedPair]) -> PairIndex:
    """Return the index of pairs, wherever they are."""
    return pairs.pairs if isinstance(pairs, PairStore) else PairIndex.of(pairs)
