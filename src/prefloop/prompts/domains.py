"""One domain after the other: the order of continual learning, as in COFS-DPO (arXiv 2406.05534)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from prefloop.errors import ConfigError, DataError
from prefloop.prompts.choice import drawn, places_by_origin
from prefloop.prompts.store import pick
from prefloop.protocols import Allotment
from prefloop.rows import Prompt

NONE = "no column `source`; name each row's domain in it"


@dataclass(frozen=True)
class Domains:
    """Give round r the prompts of the r-th domain: the data set that a row's column `source` names.

    There are as many rounds as domains, and at least two. With `prompts_per_round` a round takes that many prompts of
    its domain, drawn by the seed; else all of them.

    Raises:
        ConfigError: `names` has fewer than two domains, or one twice.

    """

    names: tuple[str, ...] | None = None
    """Domains, in the order of rounds. None: all of them, in the order in which they first appear in the data."""

    needs_margins: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.names is not None and not 2 <= len(self.names) == len(set(self.names)):
            raise ConfigError(f"order.names: must be two or more different domains, got {list(self.names)}")

    def __call__(self, prompts: Sequence[Prompt], ask: Allotment) -> Sequence[Prompt]:
        """Return the prompts of round `ask.round`.

        Raises:
            DataError: a row names no domain, there are fewer than two, `names` has one that the data lack, or there
                are not as many as rounds.

        """
        order = self.check_prompts(prompts, ask.rounds)
        domain = pick(prompts, places_by_origin(prompts, NONE)[order[ask.round]])
        return pick(domain, drawn(domain, ask.seed)[: ask.per_round])

    def check_prompts(self, prompts: Sequence[Prompt], rounds: int) -> list[str]:
        """Return the domains, one for each round; raises as the call does."""
        order = self.order(prompts)
        if len(order) != rounds:
            raise DataError(
                f"the data have {len(order)} domains ({', '.join(order)}) for {rounds} rounds; set "
                f"rounds={len(order)}, or name the domains to use in order.names"
            )
        return order

    def order(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the domains in the order of rounds.

        Raises:
            DataError: a row names no domain, there are fewer than two, or `names` has one that the data lack.

        """
        found = places_by_origin(prompts, NONE)
        if len(found) < 2:
            raise DataError(
                f"prompts: column `source` names {len(found)} domain ({', '.join(found) or 'none'}), but order.kind "
                "domains needs two or more; add rows of another one, or set order.kind=shuffled"
            )
        missing = [name for name in self.names or () if name not in found]
        if missing:
            raise DataError(f"order.names: no row's `source` is {', '.join(missing)}; the data have {', '.join(found)}")
        return list(self.names or found)
