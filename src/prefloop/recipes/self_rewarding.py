"""Self-Rewarding: the policy grades its own completions by a rubric, learns from best against worst, and again.

Source: Self-Rewarding Language Models, Yuan et al. 2024, arXiv 2401.10020. No code of the authors was found.

    for t in 1, 2:
        y_1 … y_4 ~ π_t(· | x) for each prompt x, temperature 0.7, top-p 0.9
        s_k = mean of 3 grades, 0 to 5, that π_t itself writes for y_k by an additive rubric
        y_w = argmax s_k,  y_l = argmin s_k;  ties, and completions without a readable grade, are dropped
        π_{t+1} = argmin DPO(π; reference π_t, pairs)

Departs from the source: the first policy is yours and is not tuned here on instructions and on examples of judging, so
bring one that can follow a rubric; prompts are yours too, though `prefloop new-prompts` lets a policy write more in
their manner before a run; the rubric is in our words; the gate decides with another judge, `eval_judge`, whether a
round is promoted, because a policy that judges itself can raise its own scores.

How sure: 4 completions, 3 grades, the additive scale, best against worst without ties, DPO with beta 0.1: second-hand,
as are temperature and top-p. The learning rate is recalled. Not found, and ours: prompts a round, pairs a step, epochs.

On the story model, which is too small to write a verdict, `judge/self_likelihood.py` stands in for the rubric: the
policy's own log-odds of `happy` against `sad` after the story.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2401.10020"

EMBEDDED = {
    "judge": {"kind": "self_likelihood", "question": "\nEveryone was very", "good": " happy", "bad": " sad"},
    "eval_judge": {"kind": "lexicon"},
}
"""On the story model: what the policy itself finds happier is chosen, and a word list that no round sees decides."""


def recipe() -> Recipe:
    """Return two rounds of 5,000 prompts, 4 completions, 3 grades by the policy, DPO with beta 0.1."""
    return Recipe(
        recipe="self_rewarding",
        rounds=2,
        prompts_per_round=5_000,
        sampler=Spec.model_validate({"kind": "hf", "completions": 4, "temperature": 0.7, "top_p": 0.9}),
        judge=Spec.model_validate(
            {
                "kind": "llm",
                "model": "policy",
                "mode": "grade",
                "template": "additive",
                "repeats": 3,
                "temperature": 0.7,
            }
        ),
        pair_builder=Spec.model_validate({"kind": "ranked", "rule": "best_vs_worst"}),
        loss=Spec.model_validate({"kind": "dpo", "beta": 0.1}),
        start_from="previous",
        reference="previous",
        train=TrainSettings(learning_rate=1e-6, epochs=1, pairs_per_step=16, schedule="cosine"),
    )
