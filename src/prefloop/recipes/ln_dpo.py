"""LN-DPO: DPO with every log-ratio divided by its completion's length, which shortens what the policy writes.

Source: Ahrabian et al. 2024, arXiv 2407.15229; the settings are those of Tulu 3's length-normalized DPO.

    y_1 … y_4 ~ π(· | x) for each prompt x
    y_w = argmax r(x, y_k),  y_l = argmin r(x, y_k);  ties are dropped
    π = argmin −log σ(β·(a/|y_w| − b/|y_l|)),   a, b = log π/π_ref of y_w, y_l;  π_ref = the first policy

How sure: the loss agrees in two write-ups and in TRL; the paper's hyper-parameter grid was not found, so beta 5,
learning rate 5e-7, batch 128, one epoch, linear decay and warm-up 0.1 are Tulu 3's (8B). A sweep that makes sense,
inferred: beta 1, 2, 5, 10 and learning rate 1e-7 to 1e-6.

Departs from the source: it trains on existing preference data (SafeRLHF and HH-RLHF); here the pairs are the policy's
own completions, ranked by a judge (K = 4 is our choice). The policy is promoted only if the gate accepts
it; pairs longer than the limit are dropped, not truncated.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2407.15229, settings of Tulu 3"


def recipe() -> Recipe:
    """Return LN-DPO with Tulu 3's settings: one round, best against worst, beta 5, reference the first policy."""
    return Recipe(
        recipe="ln_dpo",
        rounds=1,
        sampler=Spec.model_validate({"kind": "hf", "completions": 4}),
        pair_builder=Spec.model_validate({"kind": "ranked", "rule": "best_vs_worst"}),
        loss=Spec.model_validate({"kind": "ln_dpo", "beta": 5.0}),
        start_from="previous",
        reference="initial",
        train=TrainSettings(
            learning_rate=5e-7, epochs=1, pairs_per_step=128, schedule="linear", warmup=0.1, max_tokens=2048
        ),
    )
