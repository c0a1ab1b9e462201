"""TR-DPO: DPO whose reference follows the policy while it trains.

Source: Learn Your Reference Model for Real Good Alignment, Gorbatovski et al. 2024, arXiv 2404.09656 (TR-DPO, TR-IPO,
TR-KTO), as TRL has it (`SyncRefModelCallback`); its tables were not at hand.

    for each batch of preference pairs:
        θ ← AdamW step on −log σ( β [log π_θ/π_ref (y_w) − log π_θ/π_ref (y_l)] )
        every τ steps: θ_ref ← (1 − a)·θ_ref + a·θ

A policy that has moved far from a fixed reference keeps lowering the log-probs of both sides; a reference that comes
along keeps it in a trust region around where it is. See `train/moving_reference.py`.

How sure: the update and that it happens inside one run of training are the paper's. a 0.6 and τ 512 are TRL's
defaults, β 0.05 is second-hand; learning rate, batch and schedule are not: they are Zephyr's, as in `sdpo`.

Departs from the source: the policy is promoted only if the gate accepts it, for which `eval_judge` measures held-out
completions; a second round would start from the first one's policy, with that as reference.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2404.09656"

EMBEDDED = {
    "prompts": "embedded-preferences",
    "prompts_per_round": None,
    "sampler": {"kind": "given"},
    "eval_sampler": {"kind": "hf", "max_new_tokens": 80},
    "judge": {"kind": "given"},
    "eval_judge": {"kind": "lexicon"},
    "trainer": {"every": 8},
    "train": {"epochs": 2},
}
"""On the story model: the pairs that prefloop ships, and a reference that keeps pace with few, large steps."""


def recipe() -> Recipe:
    """Return one pass over existing pairs; τ 512, a 0.6, beta 0.05."""
    return Recipe(
        recipe="tr_dpo",
        rounds=1,
        prompts_per_round=None,
        sampler=Spec(kind="given"),
        eval_sampler=Spec(kind="hf"),
        judge=Spec(kind="given"),
        pair_builder=Spec.model_validate({"kind": "ranked", "rule": "best_vs_worst"}),
        loss=Spec.model_validate({"kind": "dpo", "beta": 0.05}),
        trainer=Spec.model_validate({"kind": "moving_reference", "every": 512, "share": 0.6}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=5e-7, epochs=1, pairs_per_step=64, schedule="linear", warmup=0.1),
    )
