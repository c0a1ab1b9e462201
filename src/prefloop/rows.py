"""The records that stages exchange, as they lie on disk. One class, one row of a Parquet part.

A record is frozen and torch-free. Fields are given with their unit; `None` means "not known", never zero.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

TRAIN = "train"
HOLDOUT = "holdout"
VERBATIM = "text"
"""Role of the only message of a plain-text prompt: its content is tokenized as it is, without a chat template."""


_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def digest_of(*parts: object) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of `parts` as canonical JSON."""
    return hashlib.sha256(_canonical(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def digest_of_list(items: Iterable[object]) -> str:
    """Return `digest_of(list(items))`, without holding all of them in memory.

    Example:
        >>> digest_of_list(iter(["a", 1])) == digest_of(["a", 1])
        True

    """
    found = hashlib.sha256(b"[[")
    rest, between = iter(items), b""
    while some := list(islice(rest, 1024)):
        found.update(between + _canonical(some)[1:-1].encode("utf-8", "surrogatepass"))
        between = b","
    found.update(b"]]")
    return found.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; or `VERBATIM` for a plain-text prompt."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A completion that the data bring along. `score` is its rating there, higher is better; `None`: it has none."""

    text: str
    score: float | None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy is asked to continue or answer.

    `prompt_id` is a digest of the messages, so the same prompt has the same id in every run. `gold` is a human
    or reference answer. `split` is `TRAIN` or `HOLDOUT`, decided once by hash. `source` says where the row came
    from (file and line). `media` lists paths of images or videos. `candidates` are completions that the data hold.
    `origin` names the data set that the row says it comes from.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    gold: str | None
    split: str
    source: str
    media: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    origin: str | None = None

    @property
    def text(self) -> str:
        """The prompt as a person reads it: contents, with roles where there is more than one message."""
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n".join(f"{m.role}: {m.content}" for m in self.messages)


def prompt_id(messages: Sequence[Message]) -> str:
    """Return the id of a prompt: 16 hexadecimal digits that depend on roles and contents only."""
    return digest_of([[m.role, m.content] for m in messages])


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled or given completion.

    `token_ids` are the ids as sampled, the end token included when the model emitted one; `None` for a text that
    no sampler of ours produced. `sampler_logps` are the sampling policy's log-probabilities of those tokens at
    temperature 1 and before top-p or top-k, in nats. `finish_reason` is `stop` or `length`. `seed` is the seed of
    this completion's own random stream. `source` is the digest of the policy, or a name such as `gold`.
    """

    completion_id: str
    text: str
    token_ids: tuple[int, ...] | None
    sampler_logps: tuple[float, ...] | None
    finish_reason: str
    seed: int
    source: str
    media: tuple[str, ...] = ()


GOLD = "gold"
"""Source of a completion that is the prompt's reference answer."""


def gold_completion(prompt: Prompt) -> Completion:
    """Return the prompt's reference answer as a completion: text without token ids, ended by itself.

    Raises:
        ValueError: the prompt has none.

    """
    if prompt.gold is None:
        raise ValueError(f"prompt {prompt.prompt_id} ({prompt.source}) has no gold answer")
    return Completion(digest_of(GOLD, prompt.prompt_id, prompt.gold), prompt.gold, None, None, "stop", 0, GOLD)


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """The K completions of one prompt, by one policy, in one round."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    policy: str
    round: int
    temperature: float
    top_p: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judging model wrote about one completion: `judgement` answers `messages` and gave `score`.

    `rating` ranks the judgements of one completion against each other where a meta-judge compared them, higher is
    better; `None` where none did. Index `completion` is the completion's place in its group.
    """

    completion: int
    messages: tuple[Message, ...]
    judgement: Completion
    score: float | None
    rating: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a solution: its text, and how many of the completion's token ids it takes."""

    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Solution:
    """A completion cut into steps, which follow each other from its first token on.

    An end token belongs to no step, and neither does a tail that the length limit cut off. `first_wrong` is the number,
    from 1, of the first wrong step; `None` where none is wrong or nobody looked.
    """

    steps: tuple[Step, ...]
    first_wrong: int | None = None


@dataclass(frozen=True, slots=True)
class JudgedGroup:
    """A `SampleGroup` with the judge's verdicts.

    `scores` has one entry for each completion, higher is better, `None` where the judge gave no verdict; `notes`
    then says why. `win_prob[i][j]` is the probability that completion i beats completion j, where the judge
    compares; else `None`. `judgements` are the judge's own texts, where it keeps them. `solutions` are the completions'
    steps, one for each, where a corrector has cut them.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    policy: str
    round: int
    temperature: float
    top_p: float
    scores: tuple[float | None, ...]
    win_prob: tuple[tuple[float, ...], ...] | None
    judge: str
    notes: tuple[str | None, ...]
    judgements: tuple[Judgement, ...] = ()
    solutions: tuple[Solution, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptMargin:
    """log π(best candidate) − log π(worst candidate) of one prompt under one policy, nats, summed over tokens."""

    prompt_id: str
    policy: str
    margin: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one group: see `JudgedGroup` for the fields."""

    scores: tuple[float | None, ...]
    notes: tuple[str | None, ...]
    win_prob: tuple[tuple[float, ...], ...] | None = None
    judgements: tuple[Judgement, ...] = ()


ABSENT = Completion("absent", "", (), None, "length", 0, "absent")
"""The side that a pair does not have: a completion that is only known to be good, or only to be bad."""


@dataclass(frozen=True, slots=True)
class View:
    """A completion under a prompt of its own, whose log-probs a loss needs beside the two sides of a pair.

    `name` is what the loss calls it: see its `views`.
    """

    name: str
    messages: tuple[Message, ...]
    completion: Completion


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Chosen against rejected completion of one prompt.

    `margin` is chosen score minus rejected score, in the judge's units, ≥ 0. `win_prob` is the probability that
    chosen is better, where the judge gave one. `weight` scales the pair's loss. `builder` names the pair rule.
    `flipped` is true when a correction exchanged the two sides. `prefix` stands between the prompt and both sides, and
    is not trained on: the steps that two next steps share. A side may be `ABSENT`. `views` is what the loss reads
    beside the sides.
    """

    pair_id: str
    prompt: Prompt
    chosen: Completion
    rejected: Completion
    chosen_score: float | None
    rejected_score: float | None
    margin: float
    win_prob: float | None
    weight: float
    builder: str
    round: int
    flipped: bool = False
    prefix: Completion | None = None
    views: tuple[View, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenizedView:
    """A `View` as the trainer reads it; `reference` holds one log-probability in nats for each of `tokens`."""

    name: str
    context: tuple[int, ...]
    tokens: tuple[int, ...]
    reference: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair as the trainer reads it: token ids and, where the loss needs them, the reference's log-probs.

    `context` are the prompt's ids after the chat template, with the tokenizer's own beginning-of-sequence token
    once, and the tokens that both sides share. `reference_chosen` and `reference_rejected` hold one log-probability in
    nats for each completion token. An absent side has no tokens. `chosen_score` and `rejected_score` are the judge's.
    `sampled_chosen` are the sampling policy's log-probs of the chosen side, where it was sampled.
    """

    pair_id: str
    context: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    reference_chosen: tuple[float, ...] | None
    reference_rejected: tuple[float, ...] | None
    win_prob: float | None
    weight: float
    views: tuple[TokenizedView, ...] = ()
    chosen_score: float | None = None
    rejected_score: float | None = None
    sampled_chosen: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class CompletionScore:
    """Log-probabilities of one completion's tokens under the policy with digest `policy`, in nats."""

    completion_id: str
    policy: str
    token_logps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class NamedValue:
    """A number that one loss or trainer logs beside the common ones."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class StepLog:
    """What one optimizer step looked like. Means over the pairs of the global step; log-probs in nats.

    `saturation` is the mean of σ(−margin of implicit rewards): 0.5 at the start, near 0 when the pairs teach
    nothing any more. `extra` holds what the loss or the trainer adds. `chosen_gradient` and `rejected_gradient` are the
    size of the gradient by the log-prob of a side, |∂L/∂log π(y)|; where the loss treats tokens differently, the mean
    over tokens. `None` where the trainer does not look.
    """

    step: int
    epoch: float
    loss: float
    chosen_reward: float
    rejected_reward: float
    margin: float
    accuracy: float
    saturation: float
    chosen_logp: float
    rejected_logp: float
    grad_norm: float
    learning_rate: float
    extra: tuple[NamedValue, ...] = ()
    chosen_gradient: float | None = None
    rejected_gradient: float | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured number with its interval. `n` counts prompts; `unit` and `estimator` say what it is.

    `level` is the interval's coverage, 0–1: 0.95 but where several looks share one error rate.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str
    estimator: str = ""
    level: float = 0.95


@dataclass(frozen=True, slots=True)
class Decision:
    """A gate's verdict on a round: accepted or not, and every reason in words."""

    accepted: bool
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PolicyRef:
    """A policy on disk. `path` is a `save_pretrained` folder; `digest` covers its files.

    `base` is set when `path/adapter` holds a LoRA adapter that continues from that base policy; `path` itself
    always holds whole, merged weights.
    """

    path: str
    digest: str
    round: int
    kind: str = "causal_lm"
    base: str | None = None
