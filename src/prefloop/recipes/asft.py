"""ASFT: raise the odds of the chosen and lower those of the rejected, each on its own, without a reference.

Source: Wang et al. 2024, arXiv 2409.10571. Its text was not at hand: the loss is that stated in arXiv 2502.01237,
and so are the training settings, a later group's search over ASFT in one stage.

    y_1 … y_4 ~ π(· | x) for each prompt x
    y_w = argmax r(x, y_k),  y_l = argmin r(x, y_k);  ties are dropped
    π = argmin −log p_w + λ·[ −log σ(o(y_w)) − log σ(−o(y_l)) ],   o = log(p/(1 − p)), p = exp(mean log-probability)

How sure: the loss is second-hand but confirmed by its identities; λ = 0.1 and learning rate 8e-6 lie in the grids of
2502.01237 (λ 0.1 to 1; 6e-6, 8e-6, 1e-5); batch 128, linear decay, warm-up 0.03 and clipping at 2 are its settings;
the paper's own λ, learning rate and epochs were not found. For its better two-stage form, after supervised learning:
`loss.beta=0.2 loss.sft_weight=0 loss.lam=1 train.learning_rate=7e-7`.

Departs from the source: it trains on existing preference data; here the pairs are the policy's own completions,
ranked by a judge (K = 4 is our choice). The policy is promoted only if the gate accepts it; pairs longer
than the limit are dropped, not truncated.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2409.10571, settings of 2502.01237"


def recipe() -> Recipe:
    """Return ASFT in one stage: one round, best against worst, lam 0.1, learning rate 8e-6."""
    return Recipe(
        recipe="asft",
        rounds=1,
        sampler=Spec.model_validate({"kind": "hf", "completions": 4}),
        pair_builder=Spec.model_validate({"kind": "ranked", "rule": "best_vs_worst"}),
        loss=Spec.model_validate({"kind": "asft", "lam": 0.1}),
        start_from="previous",
        reference="none",
        train=TrainSettings(
            learning_rate=8e-6, epochs=1, pairs_per_step=128, schedule="linear", warmup=0.03, max_grad_norm=2.0
        ),
    )
