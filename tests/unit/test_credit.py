"""Credit maps of a file's completions: numbers against transformers' own logits; what page and terminal show."""

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tiny
from prefloop.cli import app
from prefloop.commands.credit import CAVEAT, Asked, credit
from prefloop.errors import ConfigError, DataError
from prefloop.evaluate.credit import (
    Credit,
    CreditGroup,
    TokenCredit,
    centred,
    extremes,
    shared_scale,
    step_sums,
)
from prefloop.evaluate.credit_page import credit_page
from prefloop.evaluate.credit_terminal import credit_lines

HOSTILE = '<script>alert(1)</script> & "quotes" \x1b[31mred é\nsecond line {{ 7 * 7 }}'


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [str(tiny.save_tiny_policy(root / str(seed), seed=seed)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [
        {"prompt": "Q: 1+1?", "chosen": "Step 1: 1+1=2\nAnswer: 2", "rejected": "Answer: 3"},
        {"prompt": "Q: 1+1?", "completion": HOSTILE},
        {"prompt": [{"role": "user", "content": "Hello"}], "completions": ["Hi.", "No."], "scores": [1.5, -2]},
        {"prompt": "unpaired", "completion": " fine", "label": False},
    ]
    return str(tiny.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows))


@pytest.fixture(scope="module")
def found(models, data):
    return credit(Asked(Path(models[0]), reference=models[1], data=data, beta=0.3))


def by_hand(folder, context, ids):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logps = model(torch.tensor([context + ids])).logits[0].double().log_softmax(-1)
    return [float(logps[len(context) - 1 + place, token]) for place, token in enumerate(ids)]


def test_every_token_has_beta_times_its_log_ratio(found, models):
    _, groups = found
    tokenizer = tiny.byte_tokenizer()
    texts = ["<bos>Q: 1+1?", "<bos>Q: 1+1?", "<bos>[user]Hello[assistant]", "<bos>unpaired"]
    for group, before in zip(groups, texts, strict=True):
        context = tokenizer(before, add_special_tokens=False)["input_ids"]
        for one in group.completions:
            ids = [*tokenizer(one.text, add_special_tokens=False)["input_ids"], 2]
            assert [token.token for token in one.tokens] == ids
            ours, theirs = (by_hand(folder, context, ids) for folder in models)
            expected = [0.3 * (a - b) for a, b in zip(ours, theirs, strict=True)]
            assert [token.reward for token in one.tokens] == pytest.approx(expected, abs=1e-5)
            assert one.reward == pytest.approx(0.3 * (sum(ours) - sum(theirs)), abs=1e-4)


def test_rows_of_one_prompt_stay_apart_and_keep_their_names_and_scores(found):
    _, groups = found
    named = [[(c.name, c.score) for c in group.completions] for group in groups]
    assert named == [
        [("chosen", 1.0), ("rejected", 0.0)],
        [("completion", None)],
        [("completion 1", 1.5), ("completion 2", -2.0)],
        [("completion", 0.0)],
    ]
    rewards = [c.reward for c in groups[0].completions]
    assert groups[0].margin == rewards[0] - rewards[1]
    assert [group.margin for group in groups[1:]] == [None] * 3


def test_the_texts_of_the_tokens_are_the_text(found):
    _, groups = found
    for group in groups:
        for one in group.completions:
            assert "".join(token.text for token in one.tokens) == one.text
            assert one.tokens[-1].text == ""
            assert one.tokens[-1].label == "<eos>"


def test_steps_add_up_to_the_whole(found):
    _, groups = found
    chosen, rejected = groups[0].completions
    assert [(step.text, step.tokens) for step in chosen.steps] == [("Step 1: 1+1=2\n", 14), ("Answer: 2", 9), ("", 1)]
    assert sum(step.reward for step in chosen.steps) == pytest.approx(chosen.reward)
    assert chosen.steps[0].reward == pytest.approx(sum(token.reward for token in chosen.tokens[:14]))
    assert rejected.steps == ()


def test_the_ways_to_cut_into_steps(models, data):
    for split, count in (("none", 0), ("labels", 0), (r"[+=]", 3)):
        _, groups = credit(Asked(Path(models[0]), reference=models[1], data=data, steps=split, limit=1))
        assert len([s for s in groups[0].completions[0].steps if s.text]) == count
    with pytest.raises(ConfigError, match="--steps: '\\('"):
        credit(Asked(Path(models[0]), reference=models[1], data=data, steps="("))


def test_a_model_against_itself_gives_zeros_and_says_so(models, data):
    found, groups = credit(Asked(Path(models[0]), reference=models[0], data=data))
    assert found["scale"] == 0
    assert {token.reward for group in groups for one in group.completions for token in one.tokens} == {0.0}
    assert any("nothing to colour" in note for note in found["notes"])
    assert "<script>alert" not in credit_page(found, groups)
    assert list(credit_lines(groups, 0.0))


def made(*rewards, text=None):
    tokens = tuple(TokenCredit(i, f"t{i} ", "", -1.0, -1.0 - r, r, r) for i, r in enumerate(rewards))
    return Credit("completion", text or "", None, tokens)


def test_centring_takes_away_what_all_have_at_a_position():
    groups = [CreditGroup("p", "", (made(1.0, 2.0, 7.0), made(3.0, -2.0)))]
    (group,) = centred(groups)
    assert [[t.shade for t in one.tokens] for one in group.completions] == [[-1.0, 2.0, 0.0], [1.0, -2.0]]
    assert [one.reward for one in group.completions] == [10.0, 1.0]


def test_one_scale_for_all_and_no_outlier_rules_it():
    few = [CreditGroup("p", "", (made(0.1), made(-0.4)))]
    assert shared_scale(few) == pytest.approx(0.4)
    many = [CreditGroup("p", "", (made(*([0.1] * 199), 50.0),))]
    assert shared_scale(many) == pytest.approx(0.1)
    assert shared_scale([]) == 0


def test_extremes_are_the_strongest_of_each_sign():
    most, least = extremes(made(0.1, -0.5, 0.9, 0.3, 0.2))
    assert [token.shade for token in most] == [0.9, 0.3, 0.2]
    assert [token.shade for token in least] == [-0.5]


def test_step_sums_need_two_steps_and_count_what_is_left():
    assert step_sums([("all", 3)], [1.0, 2.0, 3.0]) == ()
    found = step_sums([("a", 1), ("b", 1)], [1.0, 2.0, 4.0])
    assert [(step.text, step.tokens, step.reward) for step in found] == [("a", 1, 1.0), ("b", 1, 2.0), ("", 1, 4.0)]


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.maps, self.inside = [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "p" and dict(attrs).get("class") == "map":
            self.inside = True
            self.maps.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "p"

    def handle_data(self, data):
        if self.inside:
            self.maps[-1] += data


def test_the_page_stands_alone_and_shows_every_text_as_text(found):
    text = credit_page(*found)
    page = Page()
    page.feed(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on") or a in ("src", "href")]
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert "url(" not in text
    shown = [one.text.replace("\n", "⏎\n") + "⟨<eos>⟩" for group in found[1] for one in group.completions]
    # The first byte of é is a token of its own.
    assert page.maps == [text.replace("é", "⟨·⟩é") for text in shown]
    assert CAVEAT.split(":")[0] in text.replace("&#39;", "'")
    sides = [(attrs["class"], attrs["style"]) for _, attrs in page.tags if attrs.get("class") in ("u", "d")]
    assert {side for side, _ in sides} == {"u", "d"}
    strengths = [float(style.removeprefix("--a:")) for _, style in sides]
    assert max(strengths) == 0.75
    assert min(strengths) >= 0.02


def printed(groups, scale, **how):
    out = io.StringIO()
    console = Console(file=out, width=200, **how)
    for line in credit_lines(groups, scale):
        console.print(line, soft_wrap=True, highlight=False)
    return out.getvalue()


def test_the_terminal_shows_colours_only_where_it_may(found, monkeypatch):
    groups, scale = found[1], found[0]["scale"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = printed(groups, scale, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;" in coloured
    plain = printed(groups, scale)
    assert "\x1b" not in plain
    monkeypatch.setenv("NO_COLOR", "1")
    quiet = printed(groups, scale, force_terminal=True)
    assert "38;2" not in quiet
    assert "48;2" not in quiet
    assert "chosen − rejected" in plain
    assert "  up   '" in plain
    assert "  down '" in plain


def test_no_text_steers_the_terminal(found):
    plain = printed(found[1], found[0]["scale"])
    assert "\N{REPLACEMENT CHARACTER}[31mred" in plain
    assert "<script>alert(1)</script>" in plain


def test_few_colours_are_the_common_ones(found):
    lines = list(credit_lines(found[1], found[0]["scale"], few_colours=True))
    styles = {str(span.style) for line in lines for span in line.spans}
    assert {s for s in styles if " on " in s} <= {
        "black on bright_cyan",
        "bright_white on blue",
        "black on bright_yellow",
        "bright_white on red",
    }
    assert any(" on " in s for s in styles)


def test_the_command_prints_json_and_writes_the_page(models, data, tmp_path):
    page = tmp_path / "page.html"
    words = ["credit", models[0], "--reference", models[1], "--data", data, "--beta", "0.3", "--html", str(page)]
    as_json = CliRunner().invoke(app, [*words, "--json"])
    assert as_json.exit_code == 0, as_json.output
    found = json.loads(as_json.stdout)
    for group in found["groups"]:
        for one in group["completions"]:
            assert one["reward"] == pytest.approx(sum(token["reward"] for token in one["tokens"]))
            assert one["reward"] == pytest.approx(0.3 * (one["policy_logp"] - one["reference_logp"]))
    assert found["caveat"] == CAVEAT
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "beta 0.3 (as given)" in shown.output
    assert "potential-based shaping" in shown.output
    assert "\x1b" not in shown.output


def test_a_completion_that_does_not_fit_is_left_out_and_counted(models, tmp_path):
    rows = [{"prompt": "a", "completion": "x" * 200}, {"prompt": "a", "completion": "short"}]
    data = str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows))
    found, groups = credit(Asked(Path(models[0]), reference=models[1], data=data))
    assert [one.text for group in groups for one in group.completions] == ["short"]
    assert found["notes"] == ["1 completions are empty or longer than the models take: left out."]
    with pytest.raises(DataError, match="no completion can be shown"):
        credit(Asked(Path(models[0]), reference=models[1], data=data, limit=1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": None}, "give --reference and --data"),
        ({"reference": None}, "give --reference and --data"),
        ({"beta": 0.0}, "--beta"),
        ({"beta": float("nan")}, "--beta"),
        ({"limit": 0}, "--limit"),
        ({"of": "everything"}, "--of"),
        ({"of": "holdout"}, "leave out --of"),
        ({"round": 0}, "leave out --of"),
        ({"reference": "nothing/here/at/all"}, "--reference: no folder"),
        ({"data": "nothing.jsonl"}, "no file or folder"),
    ],
)
def test_what_cannot_be_shown_is_refused(models, data, settings, words):
    with pytest.raises(ConfigError, match=words):
        credit(Asked(Path(models[0]), **{"reference": models[1], "data": data, **settings}))


def test_models_of_different_tokens_are_refused(models, data, tmp_path):
    other = tiny.save_tiny_policy(tmp_path / "other")
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match="another tokenizer"):
        credit(Asked(Path(models[0]), reference=str(other), data=data))


def test_a_row_without_a_completion_is_named(models, tmp_path):
    data = str(tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}]))
    with pytest.raises(DataError, match=r"rows.jsonl:1: no completion"):
        credit(Asked(Path(models[0]), reference=models[1], data=data))
