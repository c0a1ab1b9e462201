"""sDPO: existing preference data in steps, the easy ones first, each step against the policy of the step before.

Source: Kim et al. 2024, arXiv 2403.19270v2 (Upstage). No code was found; optimizer settings follow Zephyr as the paper
says, their numbers are recalled.

    M_0 = SFT model; sources sorted by the share of pairs that M_0 gets right, falling
    for t = 1 … T:
        M_t = argmin DPO(M; reference M_{t−1}, pairs of source t), started from M_{t−1}

Reads `prompt`, `chosen`, `rejected` and `source` (the data set that a row comes from); there are as many rounds as
sources. With `order.by=margin` one source is cut into `rounds` shares by difficulty instead.

Departs from the source: a round is promoted only if the gate accepts it, for which `eval_judge` measures held-out
completions; "reward accuracy of M_0" is read as a comparison of log-probs (see `prompts/easy_first.py`).
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2403.19270"

EMBEDDED = {
    "prompts": "embedded-preferences",
    "prompts_per_round": None,
    "sampler": {"kind": "given"},
    "eval_sampler": {"kind": "hf", "max_new_tokens": 80},
    "judge": {"kind": "given"},
    "eval_judge": {"kind": "lexicon"},
}
"""On the story model: the two sources of the pairs that prefloop ships (see `tools/story_preferences.py`)."""


def recipe() -> Recipe:
    """Return two steps, for the paper's two data sets; beta 0.1, one epoch each."""
    return Recipe(
        recipe="sdpo",
        rounds=2,
        prompts_per_round=None,
        order=Spec.model_validate({"kind": "easy_first", "by": "source"}),
        sampler=Spec(kind="given"),
        eval_sampler=Spec(kind="hf"),
        judge=Spec(kind="given"),
        pair_builder=Spec.model_validate({"kind": "ranked", "rule": "best_vs_worst"}),
        loss=Spec.model_validate({"kind": "dpo", "beta": 0.1}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=5e-7, epochs=1, pairs_per_step=64, schedule="linear", warmup=0.1),
    )
