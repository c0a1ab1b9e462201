"""COFS-DPO: domains one after the other, a module for each, and a weighted sum of all modules as the policy.

Source: Online DPO with Fast-Slow Chasing, Qi et al. 2024, arXiv 2406.05534. Its full text and code were not at hand;
see `recipes/ofs_dpo.py` for what is known of the training within a domain.

    for each domain d, in order:
        F_d = the fast module of OFS-DPO on the pairs of d, trained on the frozen base π_0
        γ = weights of F_1 … F_d
        the policy is π_0 + Σ γ_i · (alpha / rank) · B_i A_i

A module is a round: the column `source` of the pairs names the domain, and there are as many rounds as domains.

How sure: that past modules are combined linearly is from the abstract. How γ is chosen was not found: `simplex` is a
reading, the loss on a small memory of past and current pairs. That products and not factors are added up is ours; it
is the exact sum.

Departs from the source: the combined policy of a round is promoted only if it beats the first policy (not the best so
far: a later domain is not asked to raise what the earlier ones raised), and only modules of promoted rounds take part
later. The report shows each domain's held-out score after each round, and what was forgotten.
"""

from prefloop.recipe import Recipe
from prefloop.recipes import ofs_dpo

SOURCE = "arXiv 2406.05534"

EMBEDDED = ofs_dpo.EMBEDDED | {"prompts_per_round": None, "order": {"names": ["mood", "writer"]}}
"""On the story model: the two sources of the pairs that prefloop ships as two domains."""


def recipe() -> Recipe:
    """Return OFS-DPO's settings, a domain in each of two rounds, modules on the first policy, combined by a fit."""
    return ofs_dpo.recipe().model_copy(
        update={
            "recipe": "cofs_dpo",
            "rounds": 2,
            "prompts_per_round": None,
            "order": ofs_dpo.recipe().order.model_copy(update={"kind": "domains"}),
            "start_from": "initial",
            "reference": "initial",
            "round_exit": "combine",
            "gate": ofs_dpo.recipe().gate.model_validate({"kind": "gate", "metric": "win_rate_vs_start"}),
        }
    )
