"""Metrics of texts alone: length, share stopped, repetition, distinct n-grams and self-BLEU.

Each takes the completions of some prompts and returns a `Metric` with a 95 % interval over prompts; see `bootstrap`.
Unless it says otherwise a value is the mean over a prompt's completions, then over prompts. A metric for which no
prompt has what it needs raises `DataError`. `correctness` and `safety` hold the metrics that need verdicts.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from prefloop.errors import DataError
from prefloop.evaluate.bleu import Matches, bleu_of, matches_of_others
from prefloop.evaluate.bootstrap import RESAMPLES, Interval, jackknife, paired_bootstrap
from prefloop.rows import Completion, JudgedGroup, Metric, SampleGroup

Group = SampleGroup | JudgedGroup

PERCENT = (0.0, 100.0)
SHARE = (0.0, 1.0)

# Scripts written without spaces between words: kana, Han, Thai, Lao, Khmer, Burmese.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['’][^\W{_UNSPACED}]+)*|[^\w\s]")


def words(text: str) -> list[str]:
    """Return the lower-cased words of a text.

    A word is a run of letters, digits and inner apostrophes; a single character of a script that is written
    without spaces (Chinese, Japanese, Thai, …); or a single punctuation mark, so that "!!!!!!" counts as
    repetition.

    Example:
        >>> words("Don't go, Tom!")
        ["don't", 'go', ',', 'tom', '!']

    """
    return _WORD.findall(text.lower())


def repetition(text: str) -> float:
    """Return the share of repeated 3-grams, 1 − distinct / total over `words`; 0 for fewer than 3 words.

    Example:
        >>> repetition("so happy so happy so happy")
        0.5

    """
    found = grams(text, 3)
    return 1 - len(set(found)) / len(found) if found else 0.0


def repeated_phrases(text: str) -> float:
    """Return the share of words that stand in a phrase that occurs more than once; 0 for a text without words.

    The repetition rate of video-SALMONN 2 (arXiv 2506.15220): split at punctuation into phrases, count each; words in
    recurring phrases / all words. Our readings: every occurrence of a recurring phrase counts, the first one too;
    case is ignored; a line break splits; hyphens and apostrophes do not; words are those of `words` without
    punctuation.

    Example:
        >>> repeated_phrases("A dog barks, a cat sleeps. A dog barks!")
        0.6666666666666666

    """
    phrases = [[w for w in words(part) if w.isalnum() or len(w) > 1] for part in re.split(r"[^\w\s'’-]|\n", text)]
    counts = Counter(tuple(phrase) for phrase in phrases if phrase)
    total = sum(len(phrase) * count for phrase, count in counts.items())
    return sum(len(p) * count for p, count in counts.items() if count > 1) / total if total else 0.0


def grams(text: str, size: int) -> list[tuple[str, ...]]:
    """Return the runs of `size` consecutive `words`, in order."""
    found = words(text)
    return list(zip(*(found[i:] for i in range(size)), strict=False))


def per_prompt(groups: Iterable[Group], measure: Callable[[Completion], float | None]) -> list[float]:
    """Return the mean over completions of `measure`, for each prompt where it is known for one at least."""
    found = ([v for c in g.completions if (v := measure(c)) is not None] for g in groups)
    return [float(np.mean(values)) for values in found if values]


def as_metric(interval: Interval, unit: str, estimator: str) -> Metric:
    """Return an interval as the record that reports hold."""
    return Metric(interval.value, interval.low, interval.high, interval.n, unit, estimator)


def mean_metric(
    what: str,
    values: Sequence[float],
    unit: str,
    bounds: tuple[float, float] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Metric:
    """Return the mean of one value for each prompt; `what` says how it was measured.

    Raises:
        DataError: there are none, or one is NaN or infinite.

    """
    if not values:
        raise DataError(f"{what}: no prompt has a completion that it can be measured on")
    interval = paired_bootstrap(values, bounds=bounds, seed=seed, resamples=resamples)
    return as_metric(interval, unit, f"{what}, mean over prompts")


def length(groups: Iterable[Group], *, seed: int = 0, resamples: int = RESAMPLES) -> Metric:
    """Return the tokens sampled, the end token included; completions without token ids are left out."""
    tokens = per_prompt(groups, lambda c: None if c.token_ids is None else float(len(c.token_ids)))
    return mean_metric("tokens sampled, end token included", tokens, "tokens", seed=seed, resamples=resamples)


def length_in_words(groups: Iterable[Group], *, seed: int = 0, resamples: int = RESAMPLES) -> Metric:
    """Return the runs of characters between white space: what policies with different tokenizers are compared by."""
    counts = per_prompt(groups, lambda c: float(len(c.text.split())))
    return mean_metric("runs between white space", counts, "words", seed=seed, resamples=resamples)


def stopped(groups: Iterable[Group], *, seed: int = 0, resamples: int = RESAMPLES) -> Metric:
    """Return the share of completions that ended by themselves, `finish_reason` stop, in %."""
    shares = per_prompt(groups, lambda c: 100.0 * (c.finish_reason == "stop"))
    return mean_metric("finish_reason stop", shares, "%", PERCENT, seed=seed, resamples=resamples)


def repetition_rate(groups: Iterable[Group], *, seed: int = 0, resamples: int = RESAMPLES) -> Metric:
    """Return the share of repeated 3-grams in a completion, 0–1: see `repetition`."""
    shares = per_prompt(groups, lambda c: repetition(c.text))
    return mean_metric("repeated 3-grams of words", shares, "share", SHARE, seed=seed, resamples=resamples)


def phrase_repetition_rate(groups: Iterable[Group], *, seed: int = 0, resamples: int = RESAMPLES) -> Metric:
    """Return the share of words in recurring phrases of a completion, 0–1: see `repeated_phrases`."""
    shares = per_prompt(groups, lambda c: repeated_phrases(c.text))
    return mean_metric("words in recurring phrases", shares, "share", SHARE, seed=seed, resamples=resamples)


def distinct(groups: Sequence[Group], size: int) -> Metric:
    """Return distinct / total of `size` consecutive words over all completions of all prompts, 0–1.

    Distinct-n of Li et al. 2016 (arXiv 1510.03055). It falls with the amount of text, so compare it between equal
    numbers of completions of like length only. The interval is the delete-one-prompt jackknife.

    Raises:
        DataError: fewer than two prompts have a completion of `size` words, or `size` is below 1.

    """
    if size < 1:
        raise DataError(f"distinct: the number of consecutive words must be ≥ 1, got {size}")
    by_prompt = [Counter(gram for c in g.completions for gram in grams(c.text, size)) for g in groups]
    holders = Counter(gram for counts in by_prompt for gram in counts)
    total = sum(counts.total() for counts in by_prompt)
    # Without prompt i, its grams are gone from the total, and those that only it has from the distinct ones.
    rest = [(sum(holders[g] == 1 for g in counts), total - counts.total()) for counts in by_prompt]
    if total == 0 or not all(left for _, left in rest):
        raise DataError(f"distinct_{size}: fewer than two prompts have a completion of {size} words")
    interval = jackknife(len(holders) / total, [(len(holders) - own) / left for own, left in rest], bounds=SHARE)
    estimator = f"distinct {size}-grams of words over all completions, delete-one-prompt jackknife"
    return as_metric(interval, "share", estimator)


def self_bleu(groups: Sequence[Group], order: int = 4) -> Metric:
    """Return how alike the completions of a prompt are, 0–1: BLEU of each against the prompt's others.

    Self-BLEU of Zhu et al. 2018 (Texygen, arXiv 1802.01886), which takes one set of texts and averages over sentences.
    Here references are the other completions of the same prompt, and n-gram counts and lengths are pooled over all
    completions of all prompts before the one BLEU is taken, as Papineni et al. 2002 do for a corpus: one completion
    without a common 4-gram then does not count as 0. Words are those of `words`. More completions mean more
    references, so compare equal numbers only. The interval is the delete-one-prompt jackknife.

    Args:
        groups: completions; a prompt with one only is left out.
        order: the longest n-gram, weights 1 / order.

    Raises:
        DataError: no prompt has two completions, or `order` is below 1.

    """
    if order < 1:
        raise DataError(f"self_bleu: order must be ≥ 1, got {order}")
    several = [[words(c.text) for c in g.completions] for g in groups if len(g.completions) > 1]
    if not several:
        raise DataError("self_bleu: no prompt has two completions; raise the number of completions")
    parts = [sum(matches_of_others(texts, order), Matches.none(order)) for texts in several]
    total = sum(parts, Matches.none(order))
    left_out = [bleu_of(total - part) for part in parts]
    estimator = f"corpus BLEU-{order} against the prompt's other completions, delete-one-prompt jackknife"
    return as_metric(jackknife(bleu_of(total), left_out, bounds=SHARE), "share", estimator)
