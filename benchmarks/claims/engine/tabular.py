"""A world of nine answers in which every optimum is known: policies are tables, and expectations are sums.

An answer is two tokens of an alphabet of three, and a policy a table of logits: three for the first token, three for
the second after each first. Losses are the classes of prefloop; each is minimised over the exact expectation of its
pairs, so that what is left of the way to the closed form is the loss's fault or the optimizer's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from prefloop.losses.dpo import DPO
from prefloop.losses.f_dpo import FDPO
from prefloop.losses.ipo import IPO
from prefloop.losses.ln_dpo import LNDPO
from prefloop.losses.robust_dpo import RobustDPO
from prefloop.losses.simpo import SimPO
from prefloop.losses.srpo import SRPO, VIEWS
from prefloop.protocols import Loss
from prefloop.tensors import CompletionLogps, PairLogps, ViewLogps

TOKENS = 3
ANSWERS = TOKENS * TOKENS
BETA = 0.5
FLIPPED = 0.2
"""Share of wrong labels for robust DPO."""
STEPS = 1000
TOLERANCE = 1e-12
BISECTIONS = 200


@dataclass(frozen=True)
class World:
    """A reference policy, rewards, and preferences that no rewards explain, drawn by a seed. All float64."""

    seed: int

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stream = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=stream, dtype=torch.float64)

        scores = normal(ANSWERS, ANSWERS)
        return _by_token(normal(TOKENS), normal(TOKENS, TOKENS)), normal(ANSWERS), scores - scores.T, normal(ANSWERS)

    @property
    def reference(self) -> Tensor:
        """Log-probs of the reference's tokens `[answer, token]`."""
        return self._drawn[0]

    @property
    def rewards(self) -> Tensor:
        """Rewards `[answer]`."""
        return self._drawn[1]

    @property
    def wins_by_reward(self) -> Tensor:
        """P(i beats j) `[i, j]` by Bradley–Terry."""
        return torch.sigmoid(self.rewards[:, None] - self.rewards[None, :])

    @property
    def wins(self) -> Tensor:
        """P(i beats j) `[i, j]`, with cycles."""
        return torch.sigmoid(self._drawn[2])

    @property
    def uneven(self) -> Tensor:
        """Another distribution of the pairs that are asked `[i, j]`: by answers of another policy."""
        asked = self._drawn[3].softmax(0)
        return torch.outer(asked, asked)


EVEN = torch.full((ANSWERS, ANSWERS), 1 / ANSWERS**2, dtype=torch.float64)
"""All pairs are asked equally often."""


def _by_token(first: Tensor, second: Tensor) -> Tensor:
    """Return log-probs of the answers' tokens `[…, answer, token]` from logits `[…, 3]` and `[…, 3, 3]`."""
    heads = first.log_softmax(-1)[..., :, None].expand(second.shape)
    return torch.stack((heads, second.log_softmax(-1)), -1).flatten(-3, -2)


@dataclass(frozen=True)
class Learned:
    """Log-probs of a trained policy's answers `[answer]`, and of its revisions `[draft, answer]`."""

    draft: Tensor
    revision: Tensor


def train(loss: Loss, world: World, wins: Tensor, asked: Tensor = EVEN) -> Learned:
    """Minimise the expected loss, from uniform policies on, over pairs i ≠ j asked as often as `asked` says."""
    shapes = ((TOKENS,), (TOKENS, TOKENS), (ANSWERS, TOKENS), (ANSWERS, TOKENS, TOKENS))
    logits = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = (asked * wins).fill_diagonal_(0.0)
    chosen, rejected = weight.nonzero(as_tuple=True)
    weight = weight[chosen, rejected] / weight.sum()

    def policies() -> tuple[Tensor, Tensor]:
        return _by_token(logits[0], logits[1]), _by_token(logits[2], logits[3])

    optimizer = torch.optim.LBFGS(
        logits, max_iter=STEPS, tolerance_grad=TOLERANCE, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (loss(_pairs(*policies(), world.reference, chosen, rejected)).loss * weight).sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(closure)
    with torch.no_grad():
        draft, revision = policies()
    return Learned(draft.sum(-1), revision.sum(-1))


def _pairs(draft: Tensor, revision: Tensor, reference: Tensor, chosen: Tensor, rejected: Tensor) -> PairLogps:
    """Return the pairs as losses read them; the reference ignores drafts."""
    mask = torch.ones(len(chosen), 2, dtype=torch.bool)
    sides = {"chosen": chosen, "rejected": rejected}

    def scored(table: Tensor, answers: Tensor) -> CompletionLogps:
        return CompletionLogps(table[answers], mask)

    def view(name: str) -> ViewLogps:
        answer, _, shown = name.partition("_given_")
        answers, drafts = sides[answer], sides[shown]
        return ViewLogps(CompletionLogps(revision[drafts, answers], mask), scored(reference, answers))

    ones = torch.ones(len(chosen), dtype=torch.float64)
    return PairLogps(
        scored(draft, chosen),
        scored(draft, rejected),
        scored(reference, chosen),
        scored(reference, rejected),
        ones,
        ones,
        {name: view(name) for name in VIEWS},
    )


def tilted(reference: Tensor, score: Tensor) -> Tensor:
    """Return log π with π ∝ reference · e^score."""
    return (reference + score).log_softmax(-1)


def by_slope(reference: Tensor, rewards: Tensor, ratio: Callable[[Tensor], Tensor]) -> Tensor:
    """Return log π with f'(π/reference) = rewards − c, where `ratio` is the inverse of f' and rises; c by bisection."""
    low, high = rewards.max() - 1 + 1e-13, rewards.max() + 1e6
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if (reference.exp() * ratio(rewards - middle)).sum() > 1:
            low = middle
        else:
            high = middle
    return (reference + ratio(rewards - high).log()).log_softmax(-1)


def _srpo(world: World) -> tuple[Tensor, Tensor]:
    """Return the best draft and revision policies: π†(y|d) ∝ ref(y)·e^(P(y beats d)/β), π(y) ∝ ref(y)/Z(y)."""
    reference = world.reference.sum(-1)
    score = reference[None, :] + world.wins.T / BETA
    return tilted(reference, -score.logsumexp(-1)), score.log_softmax(-1)


def _ipo(world: World) -> Tensor:
    wins = world.wins.clone().fill_diagonal_(0.5)
    return tilted(world.reference.sum(-1), wins.mean(1) / BETA)


def _by_reward(scale: float) -> Callable[[World], Tensor]:
    return lambda world: tilted(world.reference.sum(-1), scale * world.rewards)


@dataclass(frozen=True)
class Case:
    """A loss with the preferences it is given and its optimum: by reward, or any."""

    loss: Loss
    optimum: Callable[[World], Tensor]
    by_reward: bool = True
    flipped: float = 0.0
    revision: bool = False

    def wins(self, world: World) -> Tensor:
        """Return P(i beats j), labels flipped as often as the loss is told."""
        clean = world.wins_by_reward if self.by_reward else world.wins
        return (1 - 2 * self.flipped) * clean + self.flipped


def _forward(world: World) -> Tensor:
    return by_slope(world.reference.sum(-1), world.rewards / BETA, lambda slope: 1 / (1 - slope).clamp(min=1e-300))


CASES: Mapping[str, Case] = {
    "DPO": Case(DPO(beta=BETA), _by_reward(1 / BETA)),
    "robust DPO": Case(RobustDPO(beta=BETA, label_smoothing=FLIPPED), _by_reward(1 / BETA), flipped=FLIPPED),
    "LN-DPO": Case(LNDPO(beta=2 * BETA), _by_reward(1 / BETA)),
    "SimPO": Case(SimPO(beta=2 * BETA, gamma=0.0), lambda world: (world.rewards / BETA).log_softmax(0)),
    "f-DPO": Case(FDPO(beta=BETA, divergence="forward_kl"), _forward),
    "IPO": Case(IPO(beta=BETA, normalization="sum"), _ipo, by_reward=False),
    "SRPO": Case(SRPO(beta=BETA), lambda world: _srpo(world)[0], by_reward=False),
    "SRPO's revisions": Case(SRPO(beta=BETA), lambda world: _srpo(world)[1], by_reward=False, revision=True),
}
"""By an arm's name."""


def distance(one: Tensor, other: Tensor) -> float:
    """Return the total variation between two policies `[…, answer]` in percent, the mean over drafts."""
    return 100 * float((one.exp() - other.exp()).abs().sum(-1).mean() / 2)


def way_covered(arm: str, seed: int) -> float:
    """Return how much of the way from the uniform policy to the optimum training has covered, in percent."""
    case, world = CASES[arm], World(seed)
    learned = train(case.loss, world, case.wins(world))
    optimum = case.optimum(world)
    uniform = torch.full_like(optimum, -math.log(ANSWERS))
    reached = learned.revision if case.revision else learned.draft
    return 100 * (1 - distance(reached, optimum) / distance(uniform, optimum))


def moved_by_other_pairs(arm: str, seed: int) -> float:
    """Return how far the policy lies from the one that learns from other pairs of the same preferences, in percent."""
    world = World(seed)
    one, other = (train(CASES[arm].loss, world, world.wins, asked) for asked in (EVEN, world.uneven))
    return distance(one.draft, other.draft)
