"""Work that ranks do side by side, a part each, where all must be at the same place at the same time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from prefloop.artifact import Building
from prefloop.errors import Interrupted
from prefloop.models import causal_lm
from prefloop.models.logps import choose_layout
from prefloop.stages import Run, batched
from prefloop.team import ALONE, Team
from prefloop.train.opening import open_frozen
from prefloop.train.sharding import sharding_of

R = TypeVar("R")
T = TypeVar("T")


class Reader:
    """A frozen model of a run that tells log-probs. `team`: who must score together, as its weights are shared."""

    lm: causal_lm.CausalLM
    team: Team
    layout: str
    why: str

    def __init__(self, run: Run, path: str) -> None:
        """Open the policy in folder `path`; all ranks do so at once."""
        settings = run.recipe.train
        frozen = open_frozen(path, settings, run.team)
        self.lm = frozen.lm
        self.team = run.team if frozen.shared else ALONE
        self.layout, self.why = settings.layout, "train.layout"
        if settings.layout == "auto":
            self.layout, self.why = choose_layout(self.lm.model)


def shares_weights(run: Run) -> bool:
    """Return whether the ranks of a run share the weights of a policy, so that all score at once."""
    settings = run.recipe.train
    return sharding_of(settings, run.team, causal_lm.choose_device(settings.device).type) != "replicate"


def waves(team: Team, parts: Iterable[Sequence[T]]) -> Iterator[tuple[int | None, Sequence[T], list[Sequence[T]]]]:
    """Yield this rank's part of each wave with its number, none where the last wave has fewer, and the whole wave."""
    for number, wave in enumerate(batched(parts, team.size)):
        if team.rank < len(wave):
            yield number * team.size + team.rank, wave[team.rank], wave
        else:
            yield None, [], wave


def stop_together(run: Run, where: str) -> None:
    """Raise `Interrupted` on all ranks if one of them was asked to stop; `where` names what is finished."""
    if any(run.team.gathered(bool(run.stop()))):
        raise Interrupted(f"{where}: stopped; what is finished is on disk")


def write_waves(
    run: Run,
    building: Building[R],
    parts: Iterable[Sequence[T]],
    make: Callable[[Sequence[T]], Sequence[R]],
    label: str,
) -> None:
    """Write those parts of an output that are missing; `make` is a call on all ranks, some of them with nothing."""
    for index, part, wave in waves(run.team, parts):
        missing = index is not None and not building.has_part(index)
        rows = make(part if missing else [])
        if missing and index is not None:
            building.write_part(index, rows)
        run.progress.advance(sum(map(len, wave)))
        stop_together(run, label)
    building.look_again()
