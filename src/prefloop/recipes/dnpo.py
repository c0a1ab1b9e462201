"""DNPO: SPIN's loop with labels from a judge, and learned noise on the reference that revives vanished gradients.

Source: Dynamic Noise Preference Optimization, Yang et al. 2025, arXiv 2502.05400. Its full text was not at hand; what
follows is what four reviews of its submission quote and agree on (OpenReview QdiMWcwU5w), unless marked.

    for t in 0 … 3:
        y^g ~ π_t(· | x) for every prompt x, beside the human answer y^h
        y⁺, y⁻ = the one that the judge scores higher, the other            (t = 0: human, own, as in SPIN)
        min over θ, max over θσ:  mean −log σ( λ [log π/π_t (y⁺)] − λ [log π(y⁻) − log p^noise(y⁻)] )  −  α·mean σ²
        π_{t+1} = π;  the noise is thrown away                               (t = 0: no noise)

p^noise is π_t with σ(h)·ε on its logits, ε ~ N(0, 1), σ a learned affine function of π_t's last hidden state. λ is
called beta and the loss is DPO's.

How sure: the place and form of the noise, σ² < ε_max with a penalty in its stead, 20,000 prompts of UltraChat, a
warm-up round of SPIN and three rounds of DNPO are second-hand. A reading: the stop-gradient that makes a game of the
paper's one-pass objective (its prime is not defined; see `train/noise_game.py`), and which hidden state feeds σ.

Not found (reviews say that the paper leaves them out), and ours: λ 0.1, learning rate, pairs a step, schedule and
warm-up are SPIN's; noise learning rate 1e-4, α 1, ε_max 1, σ of 0.1 at the start; one epoch; a tie keeps the human
answer; temperature 1; each round trains on its own pairs only (`replay=1` for SPIN's union). Their judge was
GPT-4o-mini, by the reviews, its prompt is not known; any judge serves here. `trainer.schedule=alternating` is the order
of the paper's figure 3, joint that of its text.

Departs from the source: σ² stays below ε_max at all times, by a tanh; the policy is promoted only if the gate accepts
it; pairs longer than the limit are dropped, not truncated. The paper's judge also scored its evaluation, by the
reviews: set `eval_judge` to another one.

Needs a reference answer for each prompt: `prompts.gold` names the column. It is judged like the policy's own.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2502.05400"

EMBEDDED = {
    "sampler": {"completions": 1},
    "trainer": {"noise_learning_rate": 1e-2},
}
"""On the story model: the paper's one sample for each prompt, and a noise that keeps pace with few, large steps."""


def recipe() -> Recipe:
    """Return DNPO: a round of SPIN, then three with the judge's labels and noise; 20,000 prompts, λ 0.1."""
    return Recipe(
        recipe="dnpo",
        rounds=4,
        prompts_per_round=20_000,
        sampler=Spec.model_validate({"kind": "hf", "completions": 1, "temperature": 1.0, "max_new_tokens": 256}),
        pair_builder=Spec.model_validate({"kind": "dynamic_labels", "ties": "keep_human"}),
        loss=Spec.model_validate({"kind": "dpo", "beta": 0.1}),
        trainer=Spec.model_validate(
            {"kind": "noise_game", "schedule": "joint", "noise_learning_rate": 1e-4, "penalty": 1.0, "bound": 1.0}
        ),
        start_from="previous",
        reference="previous",
        per_round={"pair_builder.prefer": ("human", "score"), "trainer.noise": (False, True)},
        train=TrainSettings(
            learning_rate=5e-7, epochs=1, pairs_per_step=64, schedule="linear", warmup=0.1, max_tokens=1024
        ),
    )
