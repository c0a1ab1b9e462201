"""What the report draws: metrics by round, training by step, scores as histograms."""




@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with its heading, what it shows in words, and the colours of its lines by name."""

    title: str
    about: str
    drawing: Markup
    legend: tuple[tuple[str, str], ...] = ()


def round_charts(summary: Mapping[str, Any], rounds: Sequence[Any]) -> list[Chart]:
    columns = [(-1.0, "start", _start_metrics(summary))]
    columns += [(float(e["round"]), str(e["round"]), metrics_from_json(e["metrics"])) for e in rounds]
    if not rounds:
        return []

    def draw(title: str, about: str, names: Sequence[tuple[str, str, str]], reference: float | None = None) -> None:
        lines = []
        for place, (name, known_as, tone) in enumerate(names):
            # Two lines with intervals at the same round would hide each other.
            shift = (place - (len(names) - 1) / 2) * 0.08
            found = [(x + shift, text, metrics[name]) for x, text, metrics in columns if name in metrics]
            points = tuple(
                Point(x, m.value, m.low, m.high, f"{text if text == 'start' else f'round {text}'}: {with_interval(m)}")
                for x, text, m in found
            )
            if points:
                lines.append(Line(known_as, points if len(points) <= _MANY else thinned(points), tone))
        if lines:
            legend = tuple((line.tone, line.name) for line in lines) if len(names) > 1 else ()
            ticks = [(x, text) for x, text, _ in columns]
            drawing = line_chart(lines, f"{title} for each round", ticks=ticks, reference=reference)
            charts.append(Chart(title, about, drawing, legend))

    charts: list[Chart] = []
    draw("Score", "mean score of the judge", [("judge_score", "score", "a")])
    draw(
        "Win rate",
        "%, ties half; dashed: equal",
        [("win_rate_vs_start", "against the start", "a"), ("win_rate_vs_best", "against the best before it", "b")],
        reference=50.0,
    )
    draw("KL(policy ‖ start)", "nats per token", [("kl_policy_start", "KL", "a")])
    draw("Length", "tokens", [("length", "length", "a")])
    draw(
        "Repetition and variety",
        "shares",
        [("repetition", "repeated 3-grams", "a"), ("distinct_2", "distinct 2-grams", "b")],
    )
    draw("Stopped", "% of completions that end by themselves", [("stopped", "stopped", "a")])
    return charts


def step_charts(root: Path, rounds: Sequence[int]) -> list[Chart]:
    """Return the training curves, the rounds one after another."""
    steps: list[list[StepLog]] = []
    for number_of_round in rounds:
        logs = list(_rows(_round_folder(root, number_of_round) / "5-policy", StepLog))
        if logs:
            steps.append(logs)
    if not steps:
        return []
    offsets = np.cumsum([0, *(len(logs) for logs in steps)])
    rules = [float(offset) + 0.5 for offset in offsets[1:-1]] if len(steps) <= _MANY else []

    def draw(title: str, about: str, values: Sequence[tuple[str, str, Callable[[StepLog], float]]]) -> Chart:
        lines = [Line(name, _joined(steps, offsets.tolist(), value), tone) for name, tone, value in values]
        legend = tuple((line.tone, line.name) for line in lines) if len(lines) > 1 else ()
        return Chart(title, about, line_chart(lines, f"{title} for each step", rules=rules), legend)

    return [
        draw("Loss", "mean over the pairs of a step", [("loss", "a", lambda s: s.loss)]),
        draw("Margin", "of implicit rewards, chosen − rejected", [("margin", "a", lambda s: s.margin)]),
        draw("Accuracy", "share of pairs with a margin above 0", [("accuracy", "a", lambda s: s.accuracy)]),
        draw(
            "Saturation",
            "mean σ(−margin): near 0, nothing left to learn",
            [("saturation", "a", lambda s: s.saturation)],
        ),
        draw(
            "Log-probs of the policy",
            "nats, summed over a completion",
            [("chosen", "a", lambda s: s.chosen_logp), ("rejected", "b", lambda s: s.rejected_logp)],
        ),
        draw("Gradient norm", "before clipping", [("gradient", "a", lambda s: s.grad_norm)]),
    ]


def _joined(
    steps: Sequence[Sequence[StepLog]], offsets: Sequence[int], value: Callable[[StepLog], float]
) -> tuple[Point, ...]:
    points = [
        Point(float(offset + place + 1), value(step))
        for logs, offset in zip(steps, offsets, strict=False)
        for place, step in enumerate(logs)
    ]
    return thinned(points)


def histograms(start: Sequence[JudgedGroup], judged: Mapping[int, Sequence[JudgedGroup]]) -> list[Chart]:
    before = _scores(start)
    by_round = {n: scores for n, groups in judged.items() if len(scores := _scores(groups))}
    if not len(before) and not by_round:
        return []
    everything = np.concatenate([before, *by_round.values()])
    edges = np.histogram_bin_edges(everything, bins=_BINS)
    share = lambda scores: np.histogram(scores, edges)[0] / max(1, len(scores))  # noqa: E731
    behind = share(before)
    shares = {n: share(scores) for n, scores in by_round.items()} or {START_ROUND: behind}
    top = 1.08 * max(float(s.max()) for s in (behind, *shares.values()))
    charts = []
    for n, bars in shares.items():
        title = "Start" if n == START_ROUND else f"Round {n}"
        scores = before if n == START_ROUND else by_round[n]
        about = f"{len(scores):,} completions, mean {number(float(scores.mean()), 'score')}"
        drawing = histogram(bars.tolist(), behind.tolist(), edges.tolist(), f"Scores of {title.lower()}", top)
        charts.append(Chart(title, about, drawing))
    return charts


def _scores(groups: Iterable[JudgedGroup]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([s for g in groups for s in g.scores if s is not None], dtype=np.float64)
