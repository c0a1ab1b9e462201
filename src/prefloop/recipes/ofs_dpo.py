"""OFS-DPO: a stream of preference pairs, and two LoRA modules of different speed that chase each other on it.

Source: Online DPO with Fast-Slow Chasing, Qi et al. 2024, arXiv 2406.05534. Its full text and code were not at hand;
what follows is from its abstract and from a third-party implementation that cites its equations 3 to 6 and algorithm 1.

    F, S = two equal LoRA modules on the frozen base π_0, with learning rates η and ρη
    for each batch of the stream:
        Δ_F, Δ_S = their margins log π/π_0 (y_w) − log π/π_0 (y_l)
        J_F = −log σ(βΔ_F) + α·[−log σ(β(Δ_F − Δ_S))]          (S taken as given)
        J_S = −log σ(βΔ_S) − α·[−log σ(β(Δ_F − Δ_S))]          (F taken as given)
        every k batches: the module with the lower mean −log σ(βΔ) takes the role of F
    the policy is π_0 with F

See `train/fast_slow.py`. Each round takes the next slice of the pairs in the data; the adapter goes on from round to
round (`round_exit: keep`) and the reference stays the model under it (`adapter_off`).

How sure: the two modules, their objectives and the role check are second-hand. A reading: deploying F; a copy as
second module. Not found, and ours: ρ 0.1, α 0.1, k 50, rank 16, learning rate, batch, β. The clamp of the chase's
logit to ±10 is the third party's.

Departs from the source: rounds; at the end of each the slow module is thrown away, and the policy is promoted only if
the gate accepts it, for which `eval_judge` measures held-out completions. For pairs of own samples in the place of a
data set: sampler.kind=hf and a judge.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import LoraSettings, TrainSettings

SOURCE = "arXiv 2406.05534"

EMBEDDED = {
    "prompts": "embedded-preferences",
    "prompts_per_round": 160,
    "sampler": {"kind": "given"},
    "eval_sampler": {"kind": "hf", "max_new_tokens": 80},
    "judge": {"kind": "given"},
    "eval_judge": {"kind": "lexicon"},
    "trainer": {"check_every": 4},
    "train": {"learning_rate": 3e-3, "pairs_per_step": 16},
}
"""On the story model: the pairs that prefloop ships, steps that are few and large, and role checks to match."""


def recipe() -> Recipe:
    """Return three slices of a stream of 20,000 pairs each; α 0.1, ρ 0.1, a role check every 50 steps."""
    return Recipe(
        recipe="ofs_dpo",
        rounds=3,
        prompts_per_round=20_000,
        sampler=Spec(kind="given"),
        eval_sampler=Spec(kind="hf"),
        judge=Spec(kind="given"),
        pair_builder=Spec.model_validate({"kind": "ranked", "rule": "best_vs_worst"}),
        loss=Spec.model_validate({"kind": "dpo", "beta": 0.1}),
        trainer=Spec.model_validate(
            {"kind": "fast_slow", "speed": 0.1, "chase": 0.1, "check_every": 50, "clamp": 10.0}
        ),
        start_from="previous",
        reference="adapter_off",
        round_exit="keep",
        train=TrainSettings(
            learning_rate=1e-5, epochs=1, pairs_per_step=64, schedule="linear", warmup=0.1, lora=LoraSettings(rank=16)
        ),
    )
