"""The policy judges its own completions by how likely it finds a good word after them, against a bad one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from prefloop.errors import ConfigError
from prefloop.judge._odds import Logps, log_odds, word_ids, word_logps
from prefloop.models.causal_lm import CausalLM, encode_prompt, load, quiet
from prefloop.protocols import RoundContext
from prefloop.rows import (
    TRAIN,
    VERBATIM,
    Completion,
    Judgement,
    Message,
    Prompt,
    SampleGroup,
    Verdict,
    digest_of,
    prompt_id,
)

NO_VERDICT = "no verdict: longer with the question than the policy takes, or its log-probs are not finite"


@dataclass(frozen=True)
class SelfLikelihood:
    """A self-judge for policies too small to write a verdict: the log-odds of two words after a question.

        s(x, y) = log π(good | x, y, question) − log π(bad | x, y, question)

    π is the policy that made the round's samples, x the prompt and y the completion; summed over the words' tokens. For
    a plain-text prompt the question continues the text; in a conversation it is the user's next turn. Reading a verdict
    off two words' likelihoods is P(True) of Kadavath et al. 2022, arXiv:2207.05221; taking it as the reward of
    self-training, and the words, are ours. It stands in for Self-Rewarding's written rubric (arXiv:2401.10020) and
    shares its danger: the policy may learn to please its own question.

    Nothing is compared, so there is no order to prefer. A completion has no score, and a note, where it is longer with
    its question than the policy takes, or the log-odds are not finite.

    With `keep_judgements` the two words are the judgements of each completion, each with its log-probs, the good one
    with score 1 and the bad one with 0. With `meta_question` too, the policy rates them by the same log-odds after
    another question: a stand-in for the meta-judge of Meta-Rewarding (arXiv:2407.19594), which teaches the policy to
    answer one question as it answers the other.

    The policy changes, and with it the judge: held-out prompts are refused.

    Raises:
        ConfigError: a field is out of range, or held-out prompts are to be judged.

    """

    question: str = "\n\nIs the answer above helpful and correct? Answer yes or no:"
    """What follows the completion. Default ours."""
    good: str = " yes"
    """The word of a good completion, with the space that it begins with."""
    bad: str = " no"
    """The word of a bad one."""
    keep_judgements: bool = False
    """Return the words as `Verdict.judgements`, to train on (Meta-Rewarding)."""
    meta_question: str | None = None
    """Another question with the same two answers, that rates the judgements. Default: they have no rating."""
    batch_tokens: int = 8192
    """At most this many tokens in one forward pass; a longer single completion goes alone."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    """auto: the first GPU if there is one; or cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ConfigError("judge.question (judge/self_likelihood.py): empty; say what follows a completion")
        if not self.good or not self.bad or self.good == self.bad:
            raise ConfigError(f"judge.good: needs two different words, got {self.good!r} and {self.bad!r}")
        if self.meta_question is not None and (not self.keep_judgements or self.meta_question == self.question):
            raise ConfigError(
                "judge.meta_question: rates kept judgements by another question; set judge.keep_judgements=true and "
                "another one than judge.question"
            )
        if self.batch_tokens < 1:
            raise ConfigError(f"judge.batch_tokens: must be ≥ 1, got {self.batch_tokens!r}")

    @property
    def is_policy(self) -> bool:
        """It is another judge in every round, and so no judge of held-out prompts."""
        return True

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order.

        Raises:
            ConfigError: the groups are held-out ones; or no such policy.
            DataError: the policy cannot be loaded, a prompt cannot be tokenized, or the words have the same tokens.

        """
        if not groups:
            return []
        if context.round < 0:
            raise ConfigError(
                "eval_judge: self_likelihood is the policy itself, another judge in every round, so its scores of "
                "held-out prompts do not compare; set eval_judge to a judge that stays"
            )
        lm = load(context.policy.path, precision=self.precision, device=self.device)
        shown = [_shown(group, completion) for group in groups for completion in group.completions]
        found = iter(self._answers(lm, shown, self.question))
        rated = iter(self._answers(lm, shown, self.meta_question) if self.meta_question else [None] * len(shown))
        verdicts = []
        for group in groups:
            count = len(group.completions)
            verdicts.append(self._verdict(list(islice(found, count)), list(islice(rated, count)), lm.digest))
        return verdicts

    def _answers(self, lm: CausalLM, shown: Sequence[tuple[Message, ...]], question: str) -> list["_Answer | None"]:
        """Return what the policy answers to `question` after each of `shown`; `None` where that is too long."""
        words = word_ids(lm, (self.good, self.bad))
        asked = [_asked(messages, question) for messages in shown]
        logps = word_logps(lm, [_encoded(lm, messages) for messages in asked], words, self.batch_tokens)
        return [
            None if found is None else _Answer(messages, words, found)
            for messages, found in zip(asked, logps, strict=True)
        ]

    def _verdict(self, found: Sequence["_Answer | None"], rated: Sequence["_Answer | None"], source: str) -> Verdict:
        scores = tuple(None if answer is None else answer.log_odds for answer in found)
        notes = tuple(NO_VERDICT if answer is None else None for answer in found)
        if not self.keep_judgements:
            return Verdict(scores, notes)
        judgements = [
            Judgement(
                completion=index,
                messages=answer.messages,
                judgement=answer.judgement(side, word, source),
                score=1.0 - side,
                rating=None if rating is None else (rating.log_odds, -rating.log_odds)[side],
            )
            for index, (answer, rating) in enumerate(zip(found, rated, strict=True))
            if answer is not None
            for side, word in enumerate((self.good, self.bad))
        ]
        return Verdict(scores, notes, judgements=tuple(judgements))


@dataclass(frozen=True)
class _Answer:
    """How likely the policy finds the good word and the bad one after `messages`: their token ids and log-probs."""

    messages: tuple[Message, ...]
    words: tuple[tuple[int, ...], ...]
    logps: Logps

    @property
    def log_odds(self) -> float:
        """log π(good) − log π(bad), nats."""
        return log_odds(self.logps)

    def judgement(self, side: int, word: str, source: str) -> Completion:
        """Return the good word (side 0) or the bad one (side 1) as what the policy `source` has said."""
        return Completion(
            completion_id=digest_of("self_likelihood", source, prompt_id(self.messages), word),
            text=word,
            token_ids=self.words[side],
            sampler_logps=self.logps[side],
            finish_reason="length",  # the text would go on, so there is no end to be learned
            seed=0,
            source=source,
        )


def _shown(group: SampleGroup, completion: Completion) -> tuple[Message, ...]:
    messages = group.prompt.messages
    if len(messages) == 1 and messages[0].role == VERBATIM:
        return (Message(VERBATIM, messages[0].content + completion.text),)
    return (*messages, Message("assistant", completion.text))


def _asked(shown: tuple[Message, ...], question: str) -> tuple[Message, ...]:
    if shown[-1].role == VERBATIM:
        return (Message(VERBATIM, shown[-1].content + question),)
    return (*shown, Message("user", question.strip()))


def _encoded(lm: CausalLM, messages: tuple[Message, ...]) -> tuple[int, ...]:
    with quiet():  # the tokenizer warns of a text that is too long, which then is not asked about
        return tuple(encode_prompt(lm.tokenizer, Prompt(prompt_id(messages), messages, None, TRAIN, "judge")))
