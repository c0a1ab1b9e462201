"""What W1 and W5 start from, the same for every side: the story model, and the prompts of each round."""

from pathlib import Path

from benchmarks.records import Options
from benchmarks.specs import LoopSpec
from prefloop.inputs import embedded_policy, resolve_prompts
from prefloop.launch import read_recipe
from prefloop.recipe import Recipe
from prefloop.rows import Prompt, digest_of

SEED = 0


def story_model(options: Options) -> Path:
    """Return the folder of the model: the one that the command line names, else the one that prefloop ships."""
    return Path(options.stories) if options.stories else embedded_policy()


def loop_recipe(spec: LoopSpec, options: Options) -> tuple[Recipe, dict[str, str]]:
    """Return W1 as a recipe of prefloop: best of K against worst by VADER, every round accepted."""
    return read_recipe(
        "iterative_dpo",
        [
            f"policy={story_model(options)}",
            "prompts=embedded",
            f"seed={SEED}",
            f"rounds={spec.rounds}",
            f"prompts_per_round={spec.prompts}",
            f"sampler.completions={spec.completions}",
            f"sampler.max_new_tokens={spec.new_tokens}",
            f"sampler.device={options.device}",
            "judge=lexicon",
            "loss.beta=0.1",
            "gate=always",
            "train.epochs=1",
            f"train.learning_rate={spec.learning_rate}",
            f"train.pairs_per_step={spec.pairs_per_step}",
            f"train.device={options.device}",
            f"evaluate.prompts={spec.evaluated}",
            f"threads={options.threads}",
        ],
    )


def round_prompts(spec: LoopSpec, number: int, options: Options) -> list[Prompt]:
    """Return the prompts that prefloop's round `number` takes: a slice of an order that the seed decides."""
    train = resolve_prompts(loop_recipe(spec, options)[0]).train
    ordered = sorted(train, key=lambda p: digest_of(SEED, p.prompt_id))
    first = number * spec.prompts
    return [ordered[(first + i) % len(ordered)] for i in range(min(spec.prompts, len(ordered)))]
