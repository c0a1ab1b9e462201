"""The texts that the report shows: few, cut to a length, and chosen by rules that do not depend on who looks."""




@dataclass(frozen=True, slots=True)
class Sample:
    """The same prompt before and after training, first completion of each; `gain` is the difference in
    score."""

    prompt: str
    before: str
    after: str
    before_score: float | None
    after_score: float | None
    note: str

    @property
    def gain(self) -> float | None:
        """Score after minus score before, where both are known."""
        if self.before_score is None or self.after_score is None:
            return None
        return self.after_score - self.before_score


def samples(start: Sequence[JudgedGroup], after: Sequence[JudgedGroup]) -> list[tuple[str, list[Sample]]]:
    """Return prompts that gained most, lost most, and a fixed choice, none twice."""
    later = {g.prompt.prompt_id: g for g in after}
    # The id is a hash of the prompt: its order is arbitrary, and the same in every run.
    both = sorted((g for g in start if g.prompt.prompt_id in later), key=lambda g: g.prompt.prompt_id)
    samples = [_sample(group, later[group.prompt.prompt_id]) for group in both]
    ranked = sorted((s for s in samples if s.gain is not None), key=lambda s: s.gain or 0.0)
    lost = [s for s in ranked[:_SAMPLES] if (s.gain or 0.0) < 0]
    gained = [s for s in reversed(ranked[-_SAMPLES:]) if (s.gain or 0.0) > 0]
    fixed = [s for s in samples if s not in gained and s not in lost][:_SAMPLES]
    kinds = (("Gained most", gained), ("Lost most", lost), ("Chosen without looking at scores", fixed))
    return [(title, chosen) for title, chosen in kinds if chosen]


def _sample(before: JudgedGroup, after: JudgedGroup) -> Sample:
    note = after.notes[0] if after.notes else None
    return Sample(
        clip(before.prompt.text, _TEXT),
        _text(before.completions[0]),
        _text(after.completions[0]),
        before.scores[0],
        after.scores[0],
        clip(note or "", _WHY),
    )


def _text(completion: Completion) -> str:
    return clip(completion.text, _TEXT)


def pairs(root: Path, rounds: Sequence[int]) -> list[tuple[int, list[tuple[str, PreferencePair]]]]:
    """Return a few pairs of each round: largest margin, smallest margin, and two by the order of their
    ids."""
    found = []
    for number_of_round in _ends(rounds, _COLUMNS):
        artifact = load_artifact(_round_folder(root, number_of_round) / "3-pairs", PreferencePair)
        kept: list[PreferencePair] = []
        for part in artifact.parts() if artifact else ():
            kept = [pair for _, pair in _few_pairs([*kept, *part])]
        if kept:
            found.append((number_of_round, [(why, _cut(pair)) for why, pair in _few_pairs(kept)]))
    return found


def _few_pairs(pairs: Sequence[PreferencePair]) -> list[tuple[str, PreferencePair]]:
    by_margin = sorted(pairs, key=lambda p: (p.margin, p.pair_id))
    chosen = {by_margin[-1].pair_id: ("largest margin", by_margin[-1])}
    chosen.setdefault(by_margin[0].pair_id, ("smallest margin", by_margin[0]))
    rest = sorted((p for p in pairs if p.pair_id not in chosen), key=lambda p: p.pair_id)
    return [*chosen.values(), *(("any", pair) for pair in rest[:2])]


def _cut(pair: PreferencePair) -> PreferencePair:
    message = replace(pair.prompt.messages[0], content=clip(pair.prompt.text, _TEXT))
    return replace(
        pair,
        prompt=replace(pair.prompt, messages=(message,)),
        chosen=replace(pair.chosen, text=_text(pair.chosen)),
        rejected=replace(pair.rejected, text=_text(pair.rejected)),
    )


def clip(text: str, most: int) -> str:
    text = str(text)
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"
