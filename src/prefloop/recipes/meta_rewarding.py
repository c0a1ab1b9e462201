"""Meta-Rewarding: Self-Rewarding, and the policy also judges its judgements and learns to judge from them.

Source: Meta-Rewarding Language Models, Wu et al. 2024, arXiv 2407.19594. No code of the authors was found.

    for t in 1 … 4:
        y_1 … y_7 ~ π_t(· | x) for each prompt x
        j_k1 … j_k11: judgements that π_t writes of y_k, each with a grade from 0 to 5;  s_k = their mean
        actor: a short one of the best-graded y_k against a long one of the worst-graded (length control)
        judge, in rounds 1 and 2: π_t compares the judgements of a y_k two by two, in both orders; best against worst
        π_{t+1} = argmin DPO(π; reference π_t, both kinds of pairs)

Departs from the source: the first policy is yours and is not tuned here on examples of judging; prompts are yours; all
templates are in our words; only the first 3 judgements of each y_k are compared, not all 11, and those of every y_k, of
which the pair rule then takes one: set `judge.meta` to compare more; both orders count the same, without weights
against position bias; the gate decides with another judge, `eval_judge`, whether a round is promoted.

How sure: 5,000 prompts a round, 4 rounds, judge pairs in the first two, length control, judgements from the y_k whose
grades vary most: second-hand. 7 completions, 11 judgements: recalled. Not found, and ours: the width of the band (rho),
temperature, beta, learning rate, pairs a step.

On the story model, which is too small to write a verdict, `judge/self_likelihood.py` stands in for both judges: the
policy's log-odds of `happy` against `sad` after one question are the scores, after another one the ratings. A pair for
the judge is then one word against the other after the first question.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2407.19594"

EMBEDDED = {
    "judge": {
        "kind": "self_likelihood",
        "question": "\nThey felt",
        "meta_question": "\nEveryone was very",
        "good": " happy",
        "bad": " sad",
        "keep_judgements": True,
    },
    "eval_judge": {"kind": "lexicon"},
}
"""On the story model: it judges and meta-judges by two questions, and a word list that no round sees decides."""


def recipe() -> Recipe:
    """Return four rounds of 5,000 prompts, 7 completions, 11 judgements of each, judge pairs in the first two."""
    return Recipe(
        recipe="meta_rewarding",
        rounds=4,
        prompts_per_round=5_000,
        sampler=Spec.model_validate({"kind": "hf", "completions": 7, "temperature": 0.8}),
        judge=Spec.model_validate(
            {
                "kind": "llm",
                "model": "policy",
                "mode": "grade",
                "template": "additive",
                "repeats": 11,
                "temperature": 0.8,
                "keep_judgements": True,
                "meta": 3,
            }
        ),
        pair_builder=Spec.model_validate({"kind": "meta_rewarding"}),
        loss=Spec.model_validate({"kind": "dpo", "beta": 0.1}),
        start_from="previous",
        reference="previous",
        per_round={"pair_builder.judge_pairs": (True, True, False, False)},
        train=TrainSettings(learning_rate=5e-7, epochs=1, pairs_per_step=16, schedule="cosine", max_tokens=4096),
    )
