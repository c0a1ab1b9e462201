"""KTO: learn from completions that are known to be good or bad, without pairs of them.

Source: Ethayarajh et al. 2024, arXiv 2402.01306, and its code (ContextualAI/HALOs).

    for each prompt x with a completion y that is labelled good or bad:
        r = log π(y|x)/π_start(y|x);  z₀ = max(0, mean of r over completions of other prompts)
        minimise λ_D·(1 − σ(β·(r − z₀))) if y is good, λ_U·(1 − σ(β·(z₀ − r))) if it is bad

Reads `prompt`, `completion` and `label` (true or false); also `chosen` and `rejected`, or `completions` with `scores`,
which are good above `pair_builder.threshold` and bad below it. With `sampler.kind=hf`, a judge and
`pair_builder.rule=rank` it learns from the policy's own best and worst completions.

How sure: β, λ_D, λ_U, learning rate, AdamW, one epoch, 32 completions a step and clipping at 5 are the authors' code as
it stands. Warm-up is 150 steps there, here a tenth of all steps; the cosine after it is ours.

Departs from the source: z₀ is the mean over a whole step instead of what one device holds, so that a step must fit
into `train.tokens_per_microbatch`; mismatched completions come from anywhere in the round; completions that are too
long are dropped, not truncated; the policy is promoted only if the gate accepts it.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2402.01306"

EMBEDDED = {
    "prompts": "embedded-preferences",
    "prompts_per_round": None,
    "sampler": {"kind": "given"},
    "eval_sampler": {"kind": "hf", "max_new_tokens": 80},
    "judge": {"kind": "given"},
    "eval_judge": {"kind": "lexicon"},
    "train": {"tokens_per_microbatch": 32_768},
}
"""On the story model: both sides of the pairs that prefloop ships, each by itself."""


def recipe() -> Recipe:
    """Return one round on labelled completions: β 0.1, both weights 1, learning rate 5e-6, 32 completions a step."""
    return Recipe(
        recipe="kto",
        rounds=1,
        prompts_per_round=None,
        sampler=Spec(kind="given"),
        eval_sampler=Spec(kind="hf"),
        judge=Spec(kind="given"),
        pair_builder=Spec.model_validate({"kind": "unpaired", "rule": "threshold", "threshold": 0.5}),
        loss=Spec.model_validate({"kind": "kto", "beta": 0.1, "lambda_d": 1.0, "lambda_u": 1.0}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(
            learning_rate=5e-6, epochs=1, pairs_per_step=32, tokens_per_microbatch=131_072, max_grad_norm=5.0
        ),
    )
