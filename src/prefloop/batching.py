"""The stage 4-batches: pairs become token ids, with the reference's log-probs beside them."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from prefloop import shelf
from prefloop.artifact import Artifact, Building, Key
from prefloop.errors import DataError
from prefloop.models import causal_lm
from prefloop.rows import PolicyRef, PreferencePair, TokenizedPair
from prefloop.stages import PAIRS_PER_PART, Run, batched, completion_ids
from prefloop.train.reference import Encoding, sampler_gap, score_reference, tokenize_pairs
from prefloop.train.reference_cache import ReferenceCache
from prefloop.waves import Reader, stop_together, waves

SPOT_CHECKS = 16
"""Pairs on which the sampler's log-probs are compared with live ones of the same policy."""
SAMPLER_GAP = 1e-3
"""Largest difference of one token's log-prob, nats, up to which the sampler's are used as the reference's."""


def batch(
    run: Run, path: Path, pairs: Sequence[Artifact[PreferencePair]], reference: PolicyRef | None, policy: PolicyRef
) -> Artifact[TokenizedPair]:
    """4-batches: token ids of the round's pairs and of replayed ones, with the reference's log-probs.

    Raises:
        DataError: every pair was dropped.

    """
    inputs = {f"pairs-{i}": p.digest for i, p in enumerate(pairs)}
    inputs |= {"tokenizer": policy.digest} | ({"reference": reference.digest} if reference else {})
    opened = run.open(path, Key("batches", _settings(run), inputs), TokenizedPair, together=True)
    if isinstance(opened, Building):
        opened = _batched(run, opened, pairs, Scorer.of(run, reference, policy))
    if run.team.main:
        shelf.clear(path)
    return opened


def _settings(run: Run) -> dict[str, Any]:
    return {"max_tokens": run.recipe.train.max_tokens, "layout": run.recipe.train.layout}


def _batched(
    run: Run, opened: Building[TokenizedPair], pairs: Sequence[Artifact[PreferencePair]], scorer: "Scorer"
) -> Artifact[TokenizedPair]:
    began = time.monotonic()
    facts = BatchFacts()
    run.progress.start("reference", sum(artifact.rows for artifact in pairs), "pairs")
    ahead = scored_ahead(run, opened.path, scorer) if shelf.folder_of(opened.path).is_dir() else None
    parts = scorer.parts((p for artifact in pairs for p in artifact), facts.dropped)
    for index, part, wave in waves(run.team, parts):
        for each in wave:
            facts.count(each)
        missing = index is not None and not opened.has_part(index)
        gap = scorer.gap(part)
        facts.compare(run.team.gathered(gap))
        known = ahead.take(index) if ahead and missing and index is not None and not serves(gap) else None
        if known is None or [_unscored(p) for p in known] != [_unscored(p) for p in part]:
            # All ranks score at once, some of them nothing.
            known = scorer.scored(part if missing and not serves(gap) else []) or list(part)
        if missing and index is not None:
            opened.write_part(index, known)
        run.progress.advance(sum(map(len, wave)))
        stop_together(run, "reference log-probs")
    run.progress.finish()
    if scorer.cache and scorer.cache.used:
        run.progress.say(f"reference log-probs: those of {scorer.cache.used} pairs were in {scorer.cache.folder}")
    if not facts.pairs:
        raise DataError(f"{opened.path}: no pair is left to train on; dropped: {dict(facts.dropped)}")
    layout = {"layout": scorer.reader.layout, "layout_why": scorer.reader.why}
    found = facts.as_dict(with_reference=scorer.reference is not None)
    return opened.finish(found | layout, seconds=time.monotonic() - began)


@dataclass(frozen=True)
class Scorer:
    """Makes parts of tokenized pairs, and puts the log-probs of `reference` beside them.

    Where ranks share the reference's weights they score together: all call `gap` and `scored` at once, with pairs of
    their own, or none.
    """

    reader: Reader
    reference: PolicyRef | None
    encoding: Encoding
    tokens_per_batch: int
    cache: ReferenceCache | None

    @classmethod
    def of(cls, run: Run, reference: PolicyRef | None, policy: PolicyRef) -> "Scorer":
        """Return the scorer of a round; loads the reference, or `policy` where there is none."""
        settings = run.recipe.train
        reader = Reader(run, (reference or policy).path)
        lm = reader.lm
        encoding = Encoding(
            partial(causal_lm.encode_prompt, lm.tokenizer), partial(completion_ids, lm), settings.max_tokens
        )
        cache = None
        if reference is not None and settings.reference_cache is not None:
            cache = ReferenceCache.of(Path(settings.reference_cache).expanduser(), reference.digest, lm.model)
        return cls(reader, reference, encoding, settings.tokens_per_microbatch, cache)

    def parts(self, pairs: Iterable[PreferencePair], dropped: Counter[str]) -> Iterator[list[TokenizedPair]]:
        """Yield the parts of 4-batches, with the sampler's log-probs at the most; what is left out is counted."""
        sampled_by = self.reference.digest if self.reference else None
        return batched(tokenize_pairs(pairs, self.encoding, dropped, sampled_by), PAIRS_PER_PART)

    def gap(self, part: Sequence[TokenizedPair]) -> float | None:
        """Measure how far the sampler's log-probs are from the reference's, on pairs all over the part.

        `None` where there is no reference, a pair has none of the sampler's, or more is to be scored than its two
        sides.
        """
        if self.reference is None:
            return None
        known = part and all(p.reference_chosen is not None and p.reference_rejected is not None for p in part)
        probe = part[:: max(1, len(part) // SPOT_CHECKS)][:SPOT_CHECKS]
        asked = probe if known and not any(p.views for p in part) else []
        live = self._live(asked)
        return sampler_gap(asked, live) if asked else None

    def scored(self, part: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        """Return the part with the reference's log-probs; as it is where there is no reference."""
        if self.reference is None:
            return list(part)
        return self.cache.score(part, self._live) if self.cache else self._live(part)

    def _live(self, part: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        reader = self.reader
        return score_reference(
            reader.lm.model, part, layout=reader.layout, tokens_per_batch=self.tokens_per_batch, team=reader.team
        )


def serves(gap: float | None) -> bool:
    """Return whether the sampler's log-probs can stand for the reference's."""
    return gap is not None and gap <= SAMPLER_GAP


def scored_ahead(run: Run, path: Path, scorer: Scorer) -> shelf.Shelf[TokenizedPair]:
    """Return the parts of 4-batches in folder `path` that were scored while completions were being judged."""
    reference = {"reference": scorer.reference.digest} if scorer.reference else {}
    return shelf.Shelf.of(path, Key("batches", _settings(run), reference), TokenizedPair)


def _unscored(pair: TokenizedPair) -> TokenizedPair:
    views = tuple(replace(view, reference=None) for view in pair.views)
    return replace(pair, reference_chosen=None, reference_rejected=None, views=views)


@dataclass
class BatchFacts:
    """What 4-batches says of its pairs. `sampler_parts` of `parts` took the sampler's log-probs as the reference's."""

    pairs: int = 0
    tokens: int = 0
    parts: int = 0
    sampler_parts: int = 0
    sampler_gap: float | None = None
    dropped: Counter[str] = field(default_factory=Counter)

    def count(self, part: Sequence[TokenizedPair]) -> None:
        """Count the pairs of a part."""
        self.parts += 1
        self.pairs += len(part)
        self.tokens += sum(len(p.context) + len(p.chosen) + len(p.rejected) for p in part)

    def compare(self, gaps: Sequence[float | None]) -> None:
        """Note how far the sampler's log-probs of some parts are from live ones; `None` where it has none."""
        known = [gap for gap in gaps if gap is not None]
        self.sampler_gap = max([*known, self.sampler_gap or 0.0]) if known else self.sampler_gap
        self.sampler_parts += sum(map(serves, gaps))

    def as_dict(self, with_reference: bool) -> dict[str, Any]:
        """Return the facts as the manifest holds them."""
        sources = {0: "computed", self.parts: "sampler"}
        facts: dict[str, Any] = {"pairs": self.pairs, "dropped": dict(self.dropped), "tokens": self.tokens}
        facts["reference_logps"] = sources.get(self.sampler_parts, "both") if with_reference else "none"
        return facts if self.sampler_gap is None else facts | {"sampler_gap": self.sampler_gap}
