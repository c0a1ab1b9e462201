"""Verdicts by a language model: at any OpenAI-compatible endpoint, in this process, or the policy itself."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from prefloop.errors import ConfigError
from prefloop.judge._llm_asking import Answer, Asker, Backend
from prefloop.judge._llm_endpoint import Endpoint
from prefloop.judge._llm_local import Local
from prefloop.judge._llm_meta import contests_of, judgements_of, rated
from prefloop.judge._llm_questions import Asked, Plan, asked_of, verdict_of
from prefloop.judge._llm_replies import REASON, Form, WholeNumber
from prefloop.judge._llm_store import InMemory, VerdictStore, open_file
from prefloop.judge._llm_templates import Template, load_template
from prefloop.protocols import RoundContext
from prefloop.rows import Judgement, SampleGroup, Verdict

POLICY = "policy"
"""What `model` is called to let the round's own policy judge."""
FILE = "verdicts.sqlite"
"""Name of the store in `RoundContext.scratch`."""
WORDED = ("additive", "ten", "step")
"""Templates whose words name their lowest and highest grade."""
SCALES = {"additive": (0, 5), "ten": (1, 10), "criteria": (1, 5), "step": (0, 1)}
"""Lowest and highest grade of prefloop's own templates."""
_CRITERION = re.compile(r"[A-Za-z][A-Za-z0-9 -]{0,39}")


@dataclass(frozen=True)
class Llm:
    """A language model grades, compares or ranks completions: LLM-as-a-judge (Zheng et al. 2023, arXiv:2306.05685).

    - `grade`: each completion by itself; the score is the mean over `repeats` and over criteria, in the rubric's
      points. The default rubric is Self-Rewarding's additive one, 0 to 5 (Yuan et al. 2024, arXiv:2401.10020), in our
      words.
    - `compare`: every two completions, in both orders, ties allowed. `win_prob` is the mean over both orders, and the
      score of a completion the mean of its win probabilities against the others, in [0, 1]. Two completions of which
      one order has no verdict are not compared; the group then has no `win_prob`.
    - `rank`: all completions of a prompt at once, forward and backward; then as `compare`.

    A reply that does not hold exactly one verdict in the asked form is no verdict: the score is `None` and the note
    says why and repeats the reply. What stands inside a completion cannot be read as a verdict. Completions with equal
    texts are asked about once. Every reply is stored as it arrives, and a stored one is never asked for again.

    Departs from the paper: the templates are ours, and a winner that changes with the order counts as half a win for
    both, as a tie does.

    Raises:
        ConfigError: a field is out of range or contradicts another one, the template cannot be used, or the key's
            variable or the `openai` package is missing; on the first question: no such model.

    """

    model: str
    """With `base_url`: the model's name there. Else a `save_pretrained` folder or hub id, judging in this process; or
    `policy`: the policy that made the round's samples (Self-Rewarding)."""
    base_url: str | None = None
    """Address of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1. Default: in this process."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the endpoint's key. Default: no key is sent."""
    mode: Literal["grade", "compare", "rank"] = "grade"
    """grade: one completion at a time, K questions; compare: two, K·(K − 1) questions; rank: all, 2 questions."""
    template: str | None = None
    """additive, ten, criteria or, for `locator`, step for `grade`; or a text file of your own. Default: additive, or
    criteria where `criteria` is set; compare; rank."""
    scale: tuple[int, int] | None = None
    """grade: lowest and highest whole grade, for criteria and for a file of your own, which needs one. Default: that of
    the template, (0, 5) additive, (1, 10) ten, (1, 5) criteria, (0, 1) step; the words of the others say theirs."""
    criteria: tuple[str, ...] = ()
    """grade: names, or `name: what it means`; each gets a grade of its own and the score is their mean."""
    reply: Literal["auto", "json", "text"] = "auto"
    """json: a JSON object, held to a schema where the server can. text: a last line such as `Score: 4`. auto: json
    where the server takes a schema, else text. In this process text."""
    repeats: int = 1
    """Replies to each question, ≥ 1; more than one needs `temperature` > 0. Self-Rewarding takes 3."""
    temperature: float | None = 0.0
    """Divides the logits, ≥ 0; default 0, the most probable reply. None: the server's own."""
    max_tokens: int = 512
    """Most tokens of a reply, ≥ 1. A reply that is cut off is no verdict; a model that thinks first needs more."""
    check_model: bool = True
    """Refuse a model that the endpoint does not list. Off: for servers that take more than they list. A model that is
    a folder here is never looked up."""
    concurrency: int = 32
    """Requests under way at a time, ≥ 1."""
    timeout: float = 120.0
    """Seconds to wait for the server's next bytes, > 0."""
    retries: int = 6
    """Attempts after the first that failed by timeout, connection, HTTP 429 or 5xx, ≥ 0; waits of 0.5 s, doubled up to
    30 s, or what Retry-After says."""
    max_failures: int = 0
    """Requests that may fail after all attempts, ≥ 0; these are no verdicts. One more stops the run, to be resumed."""
    max_calls: int | None = None
    """Replies of this model that the store may hold, ≥ 1. Default: no limit."""
    max_tokens_total: int | None = None
    """Tokens of their questions and replies, ≥ 1; requests under way when it is reached still count. Default: no
    limit."""
    store: str | None = None
    """SQLite file that keeps every reply. Default: judge-store/verdicts.sqlite of the run, or memory where there is
    no run."""
    keep_judgements: bool = False
    """grade: return the judge's texts as `Verdict.judgements`, to train on (Meta-Rewarding)."""
    meta: int = 0
    """0, or ≥ 2: so many judgements of each completion are compared two by two in both orders by the same model and get
    a `rating`; needs `keep_judgements` and `repeats` ≥ this. Meta-Rewarding, Wu et al. 2024, arXiv:2407.19594."""
    meta_template: str = "meta"
    """Template of these comparisons, or a text file of your own."""
    batch: int = 16
    """In this process: replies generated together, ≥ 1."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """In this process. auto: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    """In this process. auto: the first GPU if there is one; or cpu, cuda, cuda:1."""

    one_process: ClassVar[bool] = True  # its store and its budget count for all
    without_effect: ClassVar[tuple[str, ...]] = (
        *("api_key_env", "check_model", "concurrency", "timeout", "retries"),
        *("max_failures", "max_calls", "max_tokens_total", "store"),
    )
    """Settings that change no verdict, so that one may raise a budget and go on."""

    def __post_init__(self) -> None:
        for name, holds, rule in self._rules():
            if not holds:
                raise ConfigError(f"judge.{name}: must be {rule}, got {getattr(self, name)!r}")
        _check_criteria(self.criteria)
        for problem in self._contradictions():
            raise ConfigError(problem)
        self._templates()
        self._endpoint  # noqa: B018 - a missing key or package is told before any work

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        yield "model", bool(self.model.strip()), "a model's name, a folder, a hub id or policy"
        yield "mode", self.mode in ("grade", "compare", "rank"), "grade, compare or rank"
        yield "reply", self.reply in ("auto", "json", "text"), "auto, json or text"
        for name in ("repeats", "max_tokens", "concurrency", "batch"):
            yield name, getattr(self, name) >= 1, "≥ 1"
        for name in ("retries", "max_failures"):
            yield name, getattr(self, name) >= 0, "≥ 0"
        for name in ("max_calls", "max_tokens_total"):
            yield name, getattr(self, name) is None or getattr(self, name) >= 1, "≥ 1, or null for no limit"
        temperature = self.temperature
        yield "temperature", temperature is None or 0 <= temperature < math.inf, "≥ 0, or null for the server's own"
        yield "timeout", 0 < self.timeout < math.inf, "a number of seconds > 0"
        yield "meta", self.meta == 0 or self.meta >= 2, "0 or ≥ 2"
        scale = self.scale
        readable = scale is None or -(10**9) < scale[0] < scale[1] < 10**9
        yield "scale", readable, "two whole numbers of at most 9 digits, the lower first"

    def _without_endpoint(self) -> Iterator[str]:
        if self.api_key_env is not None:
            yield "judge.api_key_env: there is no endpoint to send a key to; set judge.base_url, or leave it out"
        if self.reply == "json":
            yield "judge.reply: json needs an endpoint, set judge.base_url; or leave it out"
        if self.temperature is None:
            yield "judge.temperature: null means the server's own, and there is none; give a number"

    def _contradictions(self) -> Iterator[str]:
        if self.base_url is None:
            yield from self._without_endpoint()
        if self.repeats > 1 and self.temperature == 0:
            yield f"judge.repeats: {self.repeats} replies at temperature 0 are the same; set judge.temperature, say 0.7"
        if self.mode != "grade":
            for name in ("scale", "criteria", "keep_judgements", "meta"):
                if getattr(self, name):
                    yield f"judge.{name}: only judge.mode=grade has it, mode is {self.mode}; leave it out"
        if self.meta and not self.keep_judgements:
            yield "judge.meta: rates judgements, which are not kept; set judge.keep_judgements=true"
        if self.meta > self.repeats:
            yield f"judge.meta: compares {self.meta} judgements of a completion; set judge.repeats to that or more"

    @property
    def is_policy(self) -> bool:
        """Whether it is another judge in every round, and so no judge of held-out prompts."""
        return self.model == POLICY and self.base_url is None

    @property
    def top_score(self) -> float | None:
        """The best grade; `None` where completions are compared."""
        named = self.template or ("criteria" if self.criteria else "additive")
        return float((self.scale or SCALES[named])[1]) if self.mode == "grade" else None

    def _templates(self) -> tuple[Template, Template | None]:
        """Read the templates anew: a file may have been edited since."""
        named = self.template or {"grade": "criteria" if self.criteria else "additive"}.get(self.mode, self.mode)
        template = load_template(named, self.mode)
        if self.mode == "grade" and self.scale is None and named not in SCALES:
            raise ConfigError(f"judge.scale: not set; template {named} needs its lowest and highest grade, say [1, 10]")
        if self.scale is not None and named in WORDED and self.scale != SCALES[named]:
            low, high = SCALES[named]
            raise ConfigError(
                f"judge.scale: template {named} asks for {low} to {high}, got {list(self.scale)}; leave it out, or "
                "name a template of your own"
            )
        if ("criteria" in template.placeholders) != bool(self.criteria):
            raise ConfigError(
                f"judge.criteria: template {named} has no {{{{criteria}}}} to name them; choose another"
                if self.criteria
                else f"judge.criteria: not set, and template {named} asks for them; say [helpfulness, correctness]"
            )
        return template, load_template(self.meta_template, "meta", "meta_template") if self.meta else None

    @cached_property
    def _endpoint(self) -> Endpoint | None:
        if self.base_url is None:
            return None
        return Endpoint(
            model=self.model,
            base_url=self.base_url,
            api_key_env=self.api_key_env,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            reply=self.reply,
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
            max_failures=self.max_failures,
            check_model=self.check_model,
        )

    def _backend(self, context: RoundContext) -> Backend:
        if self._endpoint is not None:
            return self._endpoint
        assert self.temperature is not None  # refused with no endpoint
        return Local(
            path=context.policy.path if self.model == POLICY else self.model,
            setting="judge.model",
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            batch=self.batch,
            precision=self.precision,
            device=self.device,
        )

    @cached_property
    def _memory(self) -> InMemory:
        return InMemory()

    @contextmanager
    def _opened(self, context: RoundContext) -> Iterator[VerdictStore]:
        if self.store is not None:
            path = Path(self.store)
        elif context.scratch is not None:
            path = Path(context.scratch, FILE)
        else:
            yield self._memory
            return
        with open_file(path) as file:
            yield file

    def __call__(self, groups: Sequence[SampleGroup], context: RoundContext) -> list[Verdict]:
        """Return one verdict for each group, in order. The model is asked what the store does not hold.

        Raises:
            ConfigError, DataError: the model cannot be had, or the store cannot be used; or the policy is to judge
                held-out prompts.
            JudgeError: the endpoint failed for good, or a budget is used up; what was answered is stored.

        """
        if not groups:
            return []
        if context.round < 0 and self.is_policy:
            raise ConfigError(
                "eval_judge: model=policy is another judge in every round, so its scores of held-out prompts do not "
                "compare; set eval_judge to a judge that stays"
            )
        backend = self._backend(context)
        template, meta_template = self._templates()
        plan = self._plan(template, backend, context)
        asked = [asked_of(group, plan) for group in groups]
        with self._opened(context) as store:
            asker = Asker(backend, store, self.max_calls, self.max_tokens_total)
            answers = _shared_out(asked, asker.ask([question for one in asked for question in one.questions]))
            verdicts = [verdict_of(one, mine, self.mode) for one, mine in zip(asked, answers, strict=True)]
            if not self.keep_judgements:
                return verdicts
            kept = [judgements_of(one, mine, backend) for one, mine in zip(asked, answers, strict=True)]
            if meta_template is not None:
                kept = self._rated(asked, kept, asker, (plan, meta_template))
        return [replace(verdict, judgements=tuple(some)) for verdict, some in zip(verdicts, kept, strict=True)]

    def _plan(self, template: Template, backend: Backend, context: RoundContext) -> Plan:
        low, high = self.scale or SCALES.get(template.name, (0, 1))
        labels = tuple(_name(criterion) for criterion in self.criteria) or ("score",)
        return Plan(
            mode=self.mode,
            template=template,
            grade=Form(labels, WholeNumber(low, high)),
            repeats=self.repeats,
            styles=backend.styles,
            marks=backend.marks,
            seed=None if self.temperature == 0 else context.seed,
            plain={"criteria": "\n".join(f"- {criterion}" for criterion in self.criteria)},
        )

    def _rated(
        self, asked: Sequence[Asked], kept: list[list[Judgement]], asker: Asker, how: tuple[Plan, Template]
    ) -> list[list[Judgement]]:
        contests = [contests_of(one, some, self.meta, *how) for one, some in zip(asked, kept, strict=True)]
        answers = iter(asker.ask([q for some in contests for contest in some for q in contest.questions]))
        for number, some in enumerate(contests):
            for contest in some:
                kept[number] = rated(kept[number], contest, [next(answers) for _ in contest.questions])
        return kept


def _name(criterion: str) -> str:
    """Return the name of a criterion that is written as `name` or as `name: what it means`."""
    return criterion.partition(":")[0].strip()


def _check_criteria(criteria: Sequence[str]) -> None:
    names = [_name(criterion).lower() for criterion in criteria]
    for name in names:
        if not _CRITERION.fullmatch(name) or name == REASON:
            raise ConfigError(
                f"judge.criteria: {name!r} cannot be a criterion's name; take letters, digits and spaces, at most 40, "
                f"and not {REASON!r}"
            )
        # A line `style: 4` must not stand within `writing style: 4`.
        if sum(other.endswith(name) for other in names) > 1:
            raise ConfigError(f"judge.criteria: {name!r} ends two names; rename one")


def _shared_out(asked: Sequence[Asked], answers: Sequence[Answer]) -> list[list[Answer]]:
    """Return the answers of each group."""
    following = iter(answers)
    return [[next(following) for _ in one.questions] for one in asked]
