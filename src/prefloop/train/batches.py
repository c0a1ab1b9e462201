"""A microbatch of pairs as log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.rows import TokenizedPair, TokenizedView
from prefloop.tensors import CompletionLogps, PairLogps, ViewLogps


def pair_logps(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    layout: str = "auto",
    needs_reference: bool = True,
    views: Sequence[str] = (),
    squares: bool = False,
) -> PairLogps:
    """Score a microbatch: log-probs under `model`, and the stored ones of the reference beside them.

    All completions of one context form one `TokenGroup`, and a completion that several pairs have is computed once. A
    missing `win_prob` becomes 1: a plain label. `views` names what is scored beside the two sides.

    Raises:
        ValueError: no pairs; a pair lacks a view; or `needs_reference`, and a pair has no reference log-probs, or not
            one for each token.

    """
    found = group_by_context(pairs, views)
    policy = completion_logps(model, found.groups, layout=layout, squares=squares)
    stored: dict[str, CompletionLogps | None] = dict.fromkeys(("chosen", "rejected", *views))
    if needs_reference:
        stored = {name: _stored([_reference(pair, name) for pair in pairs], policy) for name in stored}
    return PairLogps(
        policy_chosen=_rows(policy, found.chosen),
        policy_rejected=_rows(policy, found.rejected),
        reference_chosen=stored["chosen"],
        reference_rejected=stored["rejected"],
        win_prob=_column([1.0 if pair.win_prob is None else pair.win_prob for pair in pairs], policy),
        weight=_column([pair.weight for pair in pairs], policy),
        views={name: ViewLogps(_rows(policy, found.views[name]), stored[name]) for name in views},
    )


@dataclass(frozen=True)
class Grouped:
    """Distinct completions by context, and the row of each pair's sides and views among all of them."""

    groups: list[TokenGroup]
    chosen: list[int]
    rejected: list[int]
    views: dict[str, list[int]]


def group_by_context(pairs: Sequence[TokenizedPair], views: Sequence[str] = ()) -> Grouped:
    """Return what is to be scored for `pairs`, each distinct completion of a context once.

    Raises:
        ValueError: a pair lacks one of `views`.

    """
    places = {
        "chosen": [(pair.context, pair.chosen) for pair in pairs],
        "rejected": [(pair.context, pair.rejected) for pair in pairs],
        **{name: [(view.context, view.tokens) for view in (view_of(pair, name) for pair in pairs)] for name in views},
    }
    completions: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for pair_places in zip(*places.values(), strict=True):
        for context, tokens in pair_places:
            completions.setdefault(context, {})[tokens] = None
    groups = [TokenGroup(context, tuple(found)) for context, found in completions.items()]
    keys = [(group.context, completion) for group in groups for completion in group.completions]
    row = {key: index for index, key in enumerate(keys)}
    rows = {name: [row[key] for key in of_pairs] for name, of_pairs in places.items()}
    return Grouped(groups, rows.pop("chosen"), rows.pop("rejected"), rows)


def view_of(pair: TokenizedPair, name: str) -> TokenizedView:
    """Return the view `name` of a pair.

    Raises:
        ValueError: it has none.

    """
    for view in pair.views:
        if view.name == name:
            return view
    have = ", ".join(view.name for view in pair.views) or "none"
    raise ValueError(f"pair {pair.pair_id}: the loss reads the view {name!r}, and it has {have}")


def _rows(logps: CompletionLogps, rows: Sequence[int]) -> CompletionLogps:
    index = torch.tensor(rows, device=logps.mask.device)
    squares = None if logps.log_squares is None else logps.log_squares[index]
    return CompletionLogps(logps.token_logps[index], logps.mask[index], squares)


def _reference(pair: TokenizedPair, name: str) -> tuple[float, ...]:
    """Return the stored reference log-probs of a side or a view."""
    if name in ("chosen", "rejected"):
        tokens, values = getattr(pair, name), getattr(pair, f"reference_{name}")
    else:
        view = view_of(pair, name)
        tokens, values = view.tokens, view.reference
    if values is None or len(values) != len(tokens):
        raise ValueError(
            f"pair {pair.pair_id}: {name} has {len(tokens)} tokens but "
            f"{'no' if values is None else len(values)} reference log-probs; score the reference again"
        )
    found: tuple[float, ...] = values
    return found


def _stored(rows: Sequence[Sequence[float]], like: CompletionLogps) -> CompletionLogps:
    """Return one row for each of `rows`, as wide as `like`, so that a loss can subtract token by token."""
    width = like.token_logps.shape[-1]
    values = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float32)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width) < lengths[:, None]
    device = like.token_logps.device
    return CompletionLogps(values.reshape(len(rows), width).to(device), mask.to(device))


def _column(values: Sequence[float], like: CompletionLogps) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.token_logps.device)
