"""DPO, PPO, SimPO and LN-DPO on the same prompts, with the same reward model and as many completions and updates."""

from benchmarks.claims.engine.records import Arm, Claim, Comparison
from benchmarks.claims.engine.worlds import PLEASANT

CLAIM = Claim(
    title="PPO, SimPO and LN-DPO beat DPO",
    statement="PPO ends better than DPO (Unpacking DPO and PPO), and so do losses that go by the mean log-prob of a "
    "token: SimPO (its paper) and LN-DPO (A Practical Analysis of Human Alignment with *PO, which finds them nearly "
    "equal at their best settings).",
    source="arXiv 2406.09279, 2405.14734, 2407.15229",
    judge="reward",
    quality=PLEASANT,
    common=(
        "rounds=4",
        "prompts_per_round=84",
        "sampler.completions=4",
        "sampler.temperature=1.0",
        "reference=initial",
    ),
    arms=(
        Arm("DPO", "iterative_dpo", (), "best against worst of four, beta 0.1"),
        Arm(
            "PPO",
            "ppo",
            (
                "loss.beta=0.02",
                "trainer.value_learning_rate=1e-3",
                "trainer.value_clip=null",
                "train.pairs_per_step=64",
            ),
            "all four, each with its reward, and a value model",
        ),
        Arm("SimPO", "simpo", ("loss.beta=2.5",), "DPO's pairs, mean log-prob, no reference, beta 2.5, gamma 1.375"),
        Arm("LN-DPO", "ln_dpo", ("loss.beta=5",), "DPO's pairs, log-ratios by length, beta 5"),
    ),
    comparisons=(
        Comparison("PPO beats DPO", ("PPO",), ("DPO",)),
        Comparison("SimPO beats DPO", ("SimPO",), ("DPO",)),
        Comparison("LN-DPO beats DPO", ("LN-DPO",), ("DPO",)),
    ),
    beside=("vader",),
    notes=(
        "Losses and PPO have the settings that their recipes have, PPO's those for the story model. Steps of PPO are "
        "on 64 rollouts and the others' on 16 pairs, for the same number of updates.",
        "The papers' DPO, SimPO and LN-DPO learn from preference data as they are; here they learn, like PPO, from "
        "completions of the current policy that the reward model has scored, so that samples are the same for all. "
        "Results on offline data may differ.",
        "VADER is what the reward model imitates: no arm asks it, and it takes no part in the verdict. Where it or the "
        "quality falls as the reward rises, the reward model is being exploited.",
    ),
)
