"""TSO: pairs from a matrix of own versions, smaller models and human answers, corrected, in many short rounds.

Source: Self-Training with Scaled Preference Optimization, arXiv 2409.02118 (Kuaishou, Renmin University). Its full text
was not at hand: the structure below is what several summaries of it agree on, the details are readings of ours.

    for t = 1 … n:                                                     n mini-batches of prompts, one round each
        y ~ π_t, π_{t−1}, smaller models (· | x)                       the model matrix, beside the human answer
        y_w from human ∪ π_t,  y_l from a lower rung;  flip or drop the pairs that the judge sees otherwise
        π_{t+1} = argmin mean −log σ( min(a, c_w) − max(b, −c_l) ),    a, b = β log π/π_t of y_w, y_l;  from π_t

In round 0 there is one version: without smaller models the pairs are then human answer against own, as in SPIN, with
the judge's correction. A refused round adds no version.

How sure: model matrix over versions and sizes, human answers among the chosen, correction by people and by AI, score
distributions looked at by skewness and kurtosis, mini-batches after each of which reference and responses are renewed,
and a dual-clip reward loss are second-hand. Readings: the form of the clip (`losses/dual_clip.py`), the order of the
ladder and which of its rungs meet (`pair/model_matrix.py`).

Not found, and ours: every number (rounds, prompts in each, completions, versions, beta, thresholds 1, learning rate,
pairs a step), the judge, the rule of selection, which is off (`pair_builder.select_by`), and all results.

Departs from the source: one AI judge corrects all pairs, and people where `pair_builder.corrections` names a file;
policies start from the last promoted one, and a round is promoted only if the gate accepts it.

Needs a reference answer for each prompt (`prompts.gold` names the column), or smaller models and
`pair_builder.human=false`.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2409.02118"

EMBEDDED = {
    "rounds": 5,
    "prompts_per_round": 96,
    "sampler": {"kind": "matrix", "completions": 1, "versions": 1, "max_new_tokens": 80},
}
"""On the story model: five short rounds; it has no smaller sister, so the matrix is across versions only."""


def recipe() -> Recipe:
    """Return eight rounds of 2,000 prompts, one completion by the policy and one by its predecessor, dual clip."""
    return Recipe(
        recipe="tso",
        rounds=8,
        prompts_per_round=2_000,
        sampler=Spec.model_validate({"kind": "matrix", "completions": 1, "versions": 1, "max_new_tokens": 256}),
        pair_builder=Spec.model_validate({"kind": "model_matrix", "correction": "judge"}),
        loss=Spec.model_validate({"kind": "dual_clip", "beta": 0.1, "clip_chosen": 1.0, "clip_rejected": 1.0}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=5e-7, epochs=1, pairs_per_step=64, max_tokens=1024),
    )
