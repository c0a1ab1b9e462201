"""One call of the corrector: cut completions into steps, ask the locator, draw and judge more solutions."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from prefloop.correct._cases import Case, Judged
from prefloop.correct._splitting import Decoding, cut, step_ends
from prefloop.models.causal_lm import decode_completion, encode_prompt, load_tokenizer
from prefloop.protocols import CorrectionTools, RoundContext, Start
from prefloop.rows import Completion, JudgedGroup, Prompt, SampleGroup, Solution, digest_of


@dataclass
class Work:
    """What a call works with: the pattern that ends a step, the tools, and where in the run it stands."""

    pattern: re.Pattern[str]
    tools: CorrectionTools
    context: RoundContext
    pieces: dict[int, str] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the policy that made the samples."""
        return _tokenizer(self.context.policy.path, self.context.policy.digest)

    def in_steps(
        self, prompt: Prompt, completion: Completion, score: float | None, shared: Judged | None = None
    ) -> Judged:
        """Return a completion cut into steps; where it goes on from the steps of `shared`, those stay as they are."""
        kept = shared.solution.steps if shared is not None else ()
        ids, text = completion.token_ids or (), completion.text
        done, shown = sum(step.tokens for step in kept), "".join(step.text for step in kept)
        if not ids or not text.startswith(shown):
            return Judged(completion, Solution(()), score)
        before = [*encode_prompt(self.tokenizer, prompt), *ids[:done]]
        rest = text[len(shown) :]
        ends = step_ends(rest, self.pattern, finished=completion.finish_reason == "stop")
        decoding = Decoding(partial(decode_completion, self.tokenizer, before), self.pieces)
        return Judged(completion, Solution((*kept, *cut(ids[done:], rest, ends, decoding))), score)

    def score(self, asked: Sequence[tuple[Case, Judged, int]]) -> list[float | None]:
        """Return the locator's score of the first so many steps of each solution."""
        assert self.tools.locator is not None
        groups = [_as_group(case.group, [one.beginning(depth)]) for case, one, depth in asked]
        return [verdict.scores[0] for verdict in self.tools.locator(groups, self.context)] if groups else []

    def draw(self, purpose: str, asked: Sequence[tuple[Case, int]], numbers: Iterable[int]) -> list[list[Judged]]:
        """Return judged solutions that go on from the first so many steps of each case, one for each of `numbers`."""
        numbers = list(numbers)
        starts = [self._start(purpose, case, depth, numbers) for case, depth in asked]
        if not starts:
            return []
        drawn = self.tools.sampler.go_on(starts, self.context)
        groups = [_as_group(case.group, some) for (case, _), some in zip(asked, drawn, strict=True)]
        verdicts = self.tools.judge(groups, self.context)
        found = []
        for (case, depth), some, verdict in zip(asked, drawn, verdicts, strict=True):
            shared = replace(case.wrong, solution=Solution(case.wrong.solution.steps[:depth]))
            scored = zip(some, verdict.scores, strict=True)
            found.append([self.in_steps(case.group.prompt, one, score, shared) for one, score in scored])
        return found

    def _start(self, purpose: str, case: Case, depth: int, numbers: Sequence[int]) -> Start:
        """Return where to go on; the seeds depend on run, round, prompt, solution and draw, and on nothing else."""
        before = case.wrong.beginning(depth)
        place = (self.context.seed, self.context.round, case.group.prompt.prompt_id, case.place)
        seeds = tuple(int(digest_of(purpose, *place, depth, number), 16) >> 1 for number in numbers)
        return Start(case.group.prompt, before.token_ids or (), before.sampler_logps, seeds)


def _as_group(group: JudgedGroup, completions: Sequence[Completion]) -> SampleGroup:
    return SampleGroup(group.prompt, tuple(completions), group.policy, group.round, group.temperature, group.top_p)


@lru_cache(maxsize=2)
def _tokenizer(path: str, digest: str) -> Any:
    """Load a policy's tokenizer; `digest` tells apart policies that were written to one folder."""
    return load_tokenizer(Path(path))
