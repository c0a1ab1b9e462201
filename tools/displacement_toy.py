"""The toy of 3D-Properties (arXiv 2406.07327): 4 prompts, 10 completions, an MLP, DPO; and its figure for the docs.

python tools/displacement_toy.py     writes docs/displacement-toy.svg (about a minute on one core)

Prompts are one-hot. Completions 0–3 are each chosen for one prompt, 4–7 each rejected for one (0→4, 1→6, 2→7, 3→5, the
draw of the paper's figure 1), 8 and 9 are in no pair. A policy is first fitted to start probabilities that are the
same for all prompts: 0.12 for each completion of a block that is on-policy, 0.02 for one that is off-policy.

The paper does not give widths, activation, optimizer, learning rate or beta. Ours: 4-64-64-10 with ReLU, Adam at 1e-3
with all pairs in each step, PyTorch's default initialisation. The losses are prefloop's own; a completion is one token.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from prefloop.evaluate.charts import HEIGHT, WIDTH, Line, Point, line_chart, thinned
from prefloop.losses.dpo import DPO
from prefloop.losses.dpo_sft import DPOSFT
from prefloop.tensors import CompletionLogps, LossOutput, PairLogps

Loss = Callable[[PairLogps], LossOutput]

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "displacement-toy.svg"
PROMPTS, COMPLETIONS = 4, 10
CHOSEN = torch.tensor([0, 1, 2, 3])
REJECTED = torch.tensor([4, 6, 7, 5])
STARTS = {
    1: (0.12, 0.12, 0.03, 0.01),
    2: (0.02, 0.12, 0.40, 0.04),
    3: (0.12, 0.02, 0.40, 0.04),
    4: (0.02, 0.02, 0.80, 0.04),
}
"""Probability of each chosen, of each rejected, of completion 8 and of 9 at the start, by the paper's scenario."""
LEARNING_RATE = 1e-3
CLOSE = 0.003
"""Largest error of a fitted start probability."""


@dataclass(frozen=True)
class Curves:
    """Log-prob of the chosen and of the rejected completion and mass outside the pair: `[epoch run prompt]`."""

    chosen: Tensor
    rejected: Tensor
    other: Tensor


class FreeLogits(torch.nn.Module):
    """One logit for each (prompt, completion) of each run: no parameters are shared."""

    def __init__(self, starts: Tensor) -> None:
        """Begin at `starts` `[run completion]`, for every prompt."""
        super().__init__()
        self.logits = torch.nn.Parameter(starts.log()[:, None, :].repeat(1, PROMPTS, 1))

    def forward(self) -> Tensor:
        """Return log-probs `[run prompt completion]`."""
        return self.logits.log_softmax(-1)


class Networks(torch.nn.Module):
    """One MLP for each run, all trained at once: `runs` rows of `starts`, initialised from seeds 0, 1, …"""

    def __init__(self, starts: Tensor, seeds: list[int], width: int = 64) -> None:
        """Draw weights by `seeds`, one for each run, and fit them to `starts` `[run completion]`."""
        super().__init__()
        sizes = [PROMPTS, width, width, COMPLETIONS]
        layers = []
        for seed in seeds:
            torch.manual_seed(seed)
            layers.append([torch.nn.Linear(a, b, dtype=torch.float64) for a, b in pairwise(sizes)])
        columns = list(zip(*layers, strict=True))
        self.weights = torch.nn.ParameterList([torch.stack([m.weight.detach().T for m in c]) for c in columns])
        self.biases = torch.nn.ParameterList([torch.stack([m.bias.detach() for m in c])[:, None] for c in columns])
        self._fit(starts)

    def forward(self) -> Tensor:
        """Return log-probs `[run prompt completion]`."""
        hidden = self.weights[0] + self.biases[0]  # the prompts are one-hot
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            hidden = torch.baddbmm(bias, hidden.relu(), weight)
        return hidden.log_softmax(-1)

    def _fit(self, starts: Tensor) -> None:
        """Supervised training to `starts` `[run completion]`, until every probability is within `CLOSE`."""
        optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
        for _ in range(2000):
            logps = self()
            if bool(((logps.exp() - starts[:, None]).abs() < CLOSE).all()):
                return
            optimizer.zero_grad()
            (-(starts[:, None] * logps).sum(-1).mean(-1)).sum().backward()
            optimizer.step()
        raise RuntimeError("the toy's start probabilities were not reached in 2000 steps")


def start_of(scenarios: list[int]) -> Tensor:
    """Return the start probabilities of each run, `[run completion]`."""
    rows = []
    for scenario in scenarios:
        chosen, rejected, eighth, ninth = STARTS[scenario]
        rows.append([chosen] * 4 + [rejected] * 4 + [eighth, ninth])
    return torch.tensor(rows, dtype=torch.float64)


def train(policy: torch.nn.Module, loss: Loss, epochs: int, rate: float = LEARNING_RATE) -> Curves:
    """Train all runs with `loss`, every epoch one step on the four pairs; the start is the reference."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    reference = policy().detach()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for epoch in range(epochs + 1):
        logps = policy()
        seen.append(_watched(logps.detach()))
        if epoch < epochs:
            optimizer.zero_grad()
            # The mean over the pairs of a run; runs have no parameter in common.
            (loss(as_pairs(logps, reference)).loss.sum() / PROMPTS).backward()
            optimizer.step()
    return Curves(*(torch.stack(column) for column in zip(*seen, strict=True)))


def _watched(logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chosen, rejected = _side(logps, CHOSEN), _side(logps, REJECTED)
    return chosen, rejected, 1 - chosen.exp() - rejected.exp()


def _side(logps: Tensor, completions: Tensor) -> Tensor:
    """Return `[run prompt]`: the log-prob of each prompt's completion."""
    return logps[:, torch.arange(PROMPTS), completions]


def as_pairs(logps: Tensor, reference: Tensor) -> PairLogps:
    """Return each prompt's pair in each run as a row that a loss reads."""

    def rows(values: Tensor, completions: Tensor) -> CompletionLogps:
        flat = _side(values, completions).reshape(-1, 1)
        return CompletionLogps(flat, torch.ones_like(flat, dtype=torch.bool))

    ones = torch.ones(logps.shape[0] * PROMPTS, dtype=logps.dtype)
    sides = [rows(values, completions) for values in (logps, reference) for completions in (CHOSEN, REJECTED)]
    return PairLogps(*sides, win_prob=ones, weight=ones)


def figure() -> str:
    """Return the figure as SVG: scenario 2 with free logits, with an MLP, and the MLP with SFT-DPO."""
    beta, epochs, seeds = 0.02, 2000, list(range(10))
    starts = start_of([2] * len(seeds))
    panels = [
        (
            "Free logits, DPO, learning rate × 10",
            train(FreeLogits(starts[:1]), DPO(beta=beta), epochs, rate=10 * LEARNING_RATE),
        ),
        ("Shared parameters (MLP), DPO", train(Networks(starts, seeds), DPO(beta=beta), epochs)),
        ("MLP, SFT-DPO with γ = β/10", train(Networks(starts, seeds), DPOSFT(beta=beta, gamma=beta / 10), epochs)),
    ]
    drawn = []
    for place, (title, curves) in enumerate(panels):
        lines = [
            Line(name, _points(values), tone)
            for name, values, tone in (
                ("chosen", curves.chosen.exp(), "a"),
                ("rejected", curves.rejected.exp(), "quiet"),
                ("all others", curves.other, "b"),
            )
        ]
        chart = line_chart(lines, title, ticks=[(float(e), str(e)) for e in range(0, epochs + 1, 500)])
        drawn.append(f'<g transform="translate({place * (WIDTH + 20):g} 44)">{chart}</g>')
        drawn.append(f'<text class="title" x="{place * (WIDTH + 20) + 44:g}" y="18">{title}</text>')
        drawn += [
            f'<text class="key {tone}" x="{place * (WIDTH + 20) + 44 + 90 * n:g}" y="36">{name}</text>'
            for n, (name, tone) in enumerate((("chosen", "a"), ("rejected", "quiet"), ("all others", "b")))
        ]
    width, height = 3 * WIDTH + 40, HEIGHT + 44
    body = "".join(drawn).replace("<svg ", f'<svg width="{WIDTH:g}" height="{HEIGHT:g}" ')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        'aria-label="Mean probability by epoch of the chosen, the rejected and all other completions">'
        f"<style>{STYLE}</style>{body}</svg>\n"
    )


def _points(values: Tensor) -> tuple[Point, ...]:
    means = values.flatten(1).mean(1).tolist()
    return thinned([Point(float(epoch), value) for epoch, value in enumerate(means)])


STYLE = """
text { font: 11px system-ui, sans-serif; fill: #5d666f; } .title { font-size: 13px; font-weight: 600; fill: #20242a; }
.x { text-anchor: middle; } .y { text-anchor: end; } .grid { stroke: #d8d8d2; }
polyline { fill: none; stroke-width: 1.7; }
g.a { stroke: #2b6a9b; } g.b { stroke: #b0641c; } g.quiet { stroke: #5d666f; }
text.a { fill: #2b6a9b; } text.b { fill: #b0641c; } svg { background: #fff; }
"""


def main() -> int:
    """Write the figure."""
    torch.set_num_threads(1)
    FIGURE.write_text(figure(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
