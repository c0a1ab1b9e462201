"""Draft, then revise: each completion is written again by the same policy with its draft in the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefloop.errors import ConfigError
from prefloop.protocols import RoundContext
from prefloop.revision import INSTRUCTION, TEMPLATE, RevisionPrompt
from prefloop.rows import Completion, Message, Prompt, SampleGroup, digest_of, prompt_id
from prefloop.sample.hf import Hf

REVISED = "revised"


@dataclass(frozen=True)
class Revise:
    """Self-revision at sampling, as SRPO does (arXiv 2406.01660): y₀ ~ π(·|x), then y_k ~ π†(·|y_{k−1}, x), n times.

    π and π† are the same weights; π† reads the prompt of `revision.py`. Returned are the last revisions; they carry no
    sampler log-probs, because these are under another prompt. The paper goes up to n = 5; more can hurt, so choose n
    on held-out prompts (`prefloop evaluate --revisions 0,1,2,3`).

    Raises:
        ConfigError: a field is out of range, or the template lacks a placeholder.

    """

    revisions: int = 1
    """n: how often each draft is written again, ≥ 0; 0 is plain sampling."""
    completions: int = 4
    """K: completions for each prompt, ≥ 1."""
    max_new_tokens: int = 256
    """Most tokens of one draft or revision, the end token included, ≥ 1."""
    temperature: float = 1.0
    """Divides the logits, ≥ 0; 0 takes the most probable token."""
    top_p: float = 1.0
    """Nucleus, in (0, 1]; 1: all tokens."""
    top_k: int = 0
    """Keep the k most probable tokens, ≥ 0; 0: all."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, as in hf."""
    batch: int = 64
    """Completions decoded together, ≥ 1."""
    precision: str = "auto"
    """`fp32`, `bf16`, or `auto`: fp32 on CPU, bf16 on CUDA."""
    device: str = "auto"
    """A torch device, or `auto`: CUDA where there is one, else CPU."""
    instruction: str = INSTRUCTION
    """What a chat model is asked to do with its draft; as in training."""
    template: str = TEMPLATE
    """Plain-text prompts: how {prompt} and {draft} are put together; as in training."""

    def __post_init__(self) -> None:
        if self.revisions < 0:
            raise ConfigError(f"sampler.revisions (sample/revise.py): must be ≥ 0, got {self.revisions!r}")
        self._hf(1)
        RevisionPrompt(self.instruction, self.template)

    def __call__(self, prompts: Sequence[Prompt], context: RoundContext) -> list[SampleGroup]:
        """Return one group of last revisions for each prompt, in order.

        Raises:
            ConfigError, DataError, SamplerError: as `hf` does; a draft that leaves no room for a revision too.

        """
        groups = self._hf(self.completions)(prompts, context)
        for turn in range(self.revisions):
            groups = self._revised(groups, turn, context)
        return groups

    def _revised(self, groups: Sequence[SampleGroup], turn: int, context: RoundContext) -> list[SampleGroup]:
        ask = RevisionPrompt(self.instruction, self.template)
        wanted = [
            [_as_prompt(group.prompt, ask.messages(group.prompt.messages, draft.text)) for draft in group.completions]
            for group in groups
        ]
        # A seed of its own for each turn; equal drafts of one prompt are told apart by their place.
        found = [
            self._hf(1)([prompts[place] for prompts in wanted], replace(context, seed=_seed(context.seed, turn, place)))
            for place in range(self.completions)
        ]
        return [
            replace(group, completions=tuple(_completion(found[place][row], turn) for place in range(self.completions)))
            for row, group in enumerate(groups)
        ]

    def _hf(self, completions: int) -> Hf:
        return Hf(
            completions=completions,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop,
            batch=self.batch,
            precision=self.precision,
            device=self.device,
        )


def _as_prompt(prompt: Prompt, messages: tuple[Message, ...]) -> Prompt:
    return replace(prompt, prompt_id=prompt_id(messages), messages=messages)


def _seed(seed: int, turn: int, place: int) -> int:
    return int(digest_of(REVISED, seed, turn, place)[:12], 16)


def _completion(group: SampleGroup, turn: int) -> Completion:
    (completion,) = group.completions
    name = digest_of(REVISED, completion.completion_id, group.prompt.prompt_id, turn, completion.seed)
    return replace(completion, completion_id=name, sampler_logps=None)
