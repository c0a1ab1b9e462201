"""Step-DPO: find the first wrong step of a wrong solution, go on from before it until right, prefer the right step.

Source: Lai et al. 2024, arXiv 2406.18629, and its code (dvlab-research/Step-DPO).

    for each problem x with a known answer:
        y ~ π(· | x), 2 times;                     keep the wrong ones:  s₁ … s_n
        k = the first wrong step of y              by a judge that reads the reference answer
        y' ~ π(· | x, s₁ … s_{k−1}), 20 times;     keep the right ones, and of each its first step s_win
    minimise −log σ( β·log π(s_win | x, s₁ … s_{k−1})/π_ref(…) − β·log π(s_k | x, s₁ … s_{k−1})/π_ref(…) )

Log-probs are summed over one step's tokens; the steps before it are context, computed once for both. No end token is
put after a step. A verifier says which solutions are right: `judge: {kind: verifier, mode: number}` for GSM8K. Which
step is the first wrong one says `locator`, a judge that is asked about beginnings of solutions; without one, the first
step from which no continuation ends right (`corrector.continuations` draws from each).

How sure: the pipeline, temperature 0.8, top-p 0.95, 2 and 20 samples, learning rate 5e-7, cosine, warm-up 0.1, batch
128, 8 epochs (4 above 30B) and 1024 tokens are from paper and code. β is 0.4 in the paper (0.5 for the 72B model); the
released scripts have it the other way round.

Departs from the source: solutions are not made to begin with "Let's think step by step. Step 1:", so the prompt has to
ask for steps, and `corrector.split` says where they end; without a judge that locates, continuations do; drawing stops
at the first right solution; a right sample with the same beginning serves too; a prompt makes one pair; the policy is
promoted only if the gate accepts it.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2406.18629"

EMBEDDED = {
    "policy": "embedded-sums",
    "prompts": "embedded-sums",
    "judge": {"kind": "sums"},
    "locator": {"kind": "sums_steps"},
    "rounds": 2,
    "prompts_per_round": 1024,
    "sampler": {"completions": 8, "max_new_tokens": 80, "temperature": 1.0, "top_p": 1.0},
    "corrector": {"per_prompt": 8, "tries": 8},
    "pair_builder": {"max_pairs": 8},
    "train": {"learning_rate": 1.5e-4, "epochs": 1, "pairs_per_step": 32},
    "evaluate": {"prompts": 300},
}
"""On the sums world: its model is wrong about half of the time, and every step can be checked. It needs many pairs seen
once: with half of them, or in a second epoch, its score fell in some runs."""


def recipe() -> Recipe:
    """Return the paper's settings for a 7B model: beta 0.4, 8 epochs at 5e-7, 2 solutions of each problem."""
    return Recipe(
        recipe="step_dpo",
        rounds=1,
        sampler=Spec.model_validate({"kind": "hf", "completions": 2, "temperature": 0.8, "top_p": 0.95}),
        corrector=Spec.model_validate({"kind": "steps", "split": "lines", "per_prompt": 2, "tries": 20}),
        pair_builder=Spec.model_validate({"kind": "steps", "max_pairs": 1}),
        loss=Spec.model_validate({"kind": "dpo", "beta": 0.4}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=5e-7, epochs=8, pairs_per_step=128, warmup=0.1, max_tokens=1024),
    )
