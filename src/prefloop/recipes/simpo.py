"""SimPO: pairs from the policy's own completions, trained without a reference on the mean log-probability.

Source: Meng et al. 2024, arXiv 2405.14734, and its code (princeton-nlp/SimPO): the on-policy setting,
Llama3-Instruct.

    y_1 … y_5 ~ π(· | x) for each prompt x, temperature 0.8
    y_w = argmax r(x, y_k),  y_l = argmin r(x, y_k);  prompts whose completions are all the same are dropped
    π = argmin −log σ(β·log π(y_w|x)/|y_w| − β·log π(y_l|x)/|y_l| − γ),   β = 2.5, γ = 0.55·β

The values are from the paper's README and configurations. They depend on the model: `losses/simpo.py` lists beta and
gamma for the others; the learning rate matters most (3e-7 to 1e-6, and 1e-5 wrecks the model).

Departs from the source: their reward model becomes any judge; the policy is promoted only if the gate accepts it;
pairs longer than the limit are dropped, not truncated; Adam's settings are AdamW's defaults. The paper makes one
round: set `rounds` for more, each of which starts from the last promoted policy. Nothing holds the policy to its
start, which is the method; watch `kl_policy_start`.
"""

from prefloop.recipe import Recipe, Spec
from prefloop.train.settings import TrainSettings

SOURCE = "arXiv 2405.14734"


def recipe() -> Recipe:
    """Return SimPO's settings for Llama3-Instruct: one round, K = 5, best against worst, beta 2.5, gamma 1.375."""
    return Recipe(
        recipe="simpo",
        rounds=1,
        sampler=Spec.model_validate({"kind": "hf", "completions": 5, "temperature": 0.8}),
        pair_builder=Spec.model_validate({"kind": "ranked", "rule": "best_vs_worst"}),
        loss=Spec.model_validate({"kind": "simpo", "beta": 2.5, "gamma": 1.375}),
        start_from="previous",
        reference="none",
        train=TrainSettings(
            learning_rate=1e-6, epochs=1, pairs_per_step=128, schedule="cosine", warmup=0.1, max_tokens=2048
        ),
    )
