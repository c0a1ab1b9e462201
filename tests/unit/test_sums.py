"""The sums world: questions, judge and first wrong step against Python's own arithmetic, and the shipped model."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefloop.inputs import embedded_policy, embedded_prompts, policy_folder, resolve_prompts
from prefloop.judge.sums import Sums, first_wrong_step, solution, steps
from prefloop.judge.verifier import Verifier
from prefloop.models.causal_lm import decode_completion, encode_prompt
from prefloop.prompts.dataset import read_prompts
from prefloop.protocols import RoundContext
from prefloop.recipe import Recipe
from prefloop.rows import VERBATIM, Completion, Message, PolicyRef, Prompt, SampleGroup, prompt_id

NAME = "embedded-sums"
POLICY = PolicyRef("p", "0", 0)
CONTEXT = RoundContext(seed=0, round=0, policy=POLICY, start=POLICY)
QUESTION = "Q: 27+8-5+6=?\n"
RIGHT = "Step 1: 27+8=35\nStep 2: 35-5=30\nStep 3: 30+6=36\nAnswer: 36"


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in embedded_prompts(NAME).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def shipped():
    folder = embedded_policy(NAME)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def sum_of(question):
    """Python's own value of the expression in a question."""
    return eval(question.removeprefix("Q: ").removesuffix("=?\n"), {"__builtins__": {}})


def group_of(question, *texts, gold=None):
    messages = (Message(VERBATIM, question),)
    prompt = Prompt(prompt_id(messages), messages, gold, "train", "test:1")
    completions = tuple(Completion(f"c{i}", t, None, None, "stop", 0, "p") for i, t in enumerate(texts))
    return SampleGroup(prompt, completions, "p", 0, 1.0, 1.0)


def scores(judge, question, *texts, gold=None):
    (verdict,) = judge([group_of(question, *texts, gold=gold)], CONTEXT)
    return verdict.scores


def test_shipped_questions_are_different_and_their_solutions_right(rows):
    assert len(rows) == len({row["prompt"] for row in rows}) == 1500
    for row in rows:
        assert int(row["answer"]) == sum_of(row["prompt"])
        *lines, answer = row["gold"].split("\n")
        assert answer == f"Answer: {row['answer']}"
        expression = row["prompt"].removeprefix("Q: ").removesuffix("=?\n")
        for number, line in enumerate(lines, 1):
            label, left, right = line.partition(": ")[0], *line.partition(": ")[2].split("=")
            assert label == f"Step {number}"
            assert eval(left, {"__builtins__": {}}) == int(right)
            # The step does the first operation that is left; its result takes the place of both numbers.
            assert expression.startswith(left)
            expression = right + expression.removeprefix(left)
        assert expression == row["answer"]
        assert all(0 <= int(line.rpartition("=")[2]) <= 99 for line in lines)


def test_the_judge_finds_its_own_solutions_right_in_every_line(rows):
    for row in rows:
        assert solution(row["prompt"]) == row["gold"]
        assert first_wrong_step(row["prompt"], row["gold"]) is None
        assert scores(Sums(), row["prompt"], row["gold"]) == scores(Sums(partial=True), row["prompt"], row["gold"])
        assert scores(Sums(), row["prompt"], row["gold"]) == (1.0,)


def planted(row, rng):
    """A wrong solution: one step's result is off, and the rest goes on with it; with the number of that step."""
    lines, wrong = row["gold"].split("\n"), rng.randrange(row["gold"].count("\n"))
    value, text = None, []
    for index, line in enumerate(lines[:-1]):
        label, left = line.split("=")[0].split(": ")
        if value is not None:
            sign = "+" if "+" in left else "-"
            left = f"{value}{sign}{left.rpartition(sign)[2]}"
        value = eval(left, {"__builtins__": {}}) + (rng.choice([-10, -1, 1, 10]) if index == wrong else 0)
        text.append(f"{label}: {left}={value}\n")
        if index >= wrong and value < 0:
            return None
    return "".join(text) + f"Answer: {value}", wrong + 1


def test_a_planted_error_is_found_though_the_rest_follows_from_it(rows):
    rng, found = random.Random(0), 0
    for row in rows[:400]:
        made = planted(row, rng)
        if made is None:  # a negative value has no way to be written here
            continue
        text, number = made
        assert first_wrong_step(row["prompt"], text) == number
        lines = row["gold"].count("\n") + 1
        assert scores(Sums(), row["prompt"], text) == (0.0,)
        assert scores(Sums(partial=True), row["prompt"], text) == (pytest.approx((number - 1) / lines),)
        found += 1
    assert found > 350


@pytest.mark.parametrize(
    ("text", "number", "score", "share"),
    [
        (RIGHT, None, 1.0, 1.0),
        (RIGHT + "\n", None, 1.0, 1.0),
        ("Step 1:  27+8=35 \n" + RIGHT.split("\n", 1)[1], None, 1.0, 1.0),
        ("", 1, 0.0, 0.0),
        ("\n" + RIGHT, 1, 1.0, 0.0),
        ("Answer: 36", 1, 1.0, 0.0),
        ("Step 1: 27+8=35\n", 2, 0.0, 0.25),
        ("Step 1: 27+8=35\nStep 2: 35-5=30\nAnswer: 36", 3, 1.0, 0.5),
        (RIGHT.replace("35-5", "35+5"), 2, 1.0, 0.25),
        (RIGHT.replace("Step 2", "Step 3"), 2, 1.0, 0.25),
        (RIGHT.replace("Answer: 36", "Answer: 46"), 4, 0.0, 0.75),
        (RIGHT.replace("Answer: 36", "Answer: 3"), 4, 0.0, 0.75),
        (RIGHT.replace("\nAnswer: 36", ""), 4, 0.0, 0.75),
        (RIGHT + "\nStep 5: 36+1=37", 5, 0.0, 0.75),
        (RIGHT.replace("Answer: 36", "Answer: 35\nAnswer: 36"), 4, 0.0, 0.75),
        (RIGHT + "\nAnswer: 36", 5, 0.0, 0.75),
        ("Answer: " + "9" * 5000, 1, 0.0, 0.0),
        ("Answer: ٣٦", 1, 0.0, 0.0),
    ],
)
def test_odd_completions(text, number, score, share):
    assert first_wrong_step(QUESTION, text) == number
    assert scores(Sums(), QUESTION, text) == (score,)
    assert scores(Sums(partial=True), QUESTION, text) == (share,)


def test_a_right_answer_after_two_wrongs_counts_only_without_partial():
    text = "Step 1: 27+8=45\nStep 2: 45-5=30\nStep 3: 30+6=36\nAnswer: 36"
    assert scores(Sums(), QUESTION, text) == (1.0,)
    assert scores(Sums(partial=True), QUESTION, text) == (0.0,)


def test_values_below_zero_and_other_places_in_a_prompt():
    assert solution("user: Q: 1-12+4=?") == "Step 1: 1-12=-11\nStep 2: -11+4=-7\nAnswer: -7"
    assert solution("Q: 1+1=?\nAnswer: 2\nQ: 2+2=?\n") == "Step 1: 2+2=4\nAnswer: 4"


@pytest.mark.parametrize("question", ["Say yes.", "", "Q: 5=?", "Q: 1*2=?", "Q: +=?"])
def test_another_prompt_has_no_score_but_a_note(question):
    (verdict,) = Sums()([group_of(question, "Answer: 3")], CONTEXT)
    assert verdict.scores == (None,)
    assert "test:1: the prompt asks for no sum" in verdict.notes
    assert solution(question) is None
    with pytest.raises(ValueError, match="its form is"):
        first_wrong_step(question, "Answer: 3")


@pytest.mark.parametrize("text", ["", "\n", "a", "a\n", "a\n\nb\n\n", "\n\na\n", "a\r\nb", RIGHT])
def test_steps_joined_are_the_completion(text):
    assert "".join(steps(text)) == text
    assert all(step.strip("\n") for step in steps(text)[1:])
    assert len(steps(RIGHT)) == 4


def test_names_of_the_sums_world_in_a_recipe():
    recipe = Recipe.model_validate({"policy": NAME, "prompts": NAME})
    assert policy_folder(recipe).name == "sums_model"
    found = resolve_prompts(recipe)
    assert len(found.train) + len(found.holdout) == 1500
    assert len(found.holdout) > 250
    assert found.prompts[0].gold.endswith(f"Answer: {sum_of(found.prompts[0].text)}")


def test_an_unknown_embedded_model_is_refused():
    with pytest.raises(ValueError, match="there are embedded, embedded-sums"):
        embedded_policy("embedded-preferences")


def test_the_tokenizer_keeps_every_text_and_every_cut(shipped, rows):
    _, tokenizer = shipped
    for row in rows[:50]:
        whole = row["prompt"] + row["gold"]
        ids = tokenizer(whole)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == whole
        for cut in (row["prompt"], row["prompt"] + "Step 1:", row["prompt"] + steps(row["gold"])[0]):
            before = tokenizer(cut)["input_ids"]
            assert ids[: len(before)] == before
            assert decode_completion(tokenizer, before, ids[len(before) :]) == whole.removeprefix(cut)


@torch.inference_mode()
def test_the_model_is_partly_skilled_under_plain_transformers(shipped):
    model, tokenizer = shipped
    prompts = read_prompts(str(embedded_prompts(NAME))).holdout[:100]
    batch = tokenizer([p.text for p in prompts], return_tensors="pt", padding=True)
    assert batch["input_ids"][0, -1] == encode_prompt(tokenizer, prompts[0])[-1]
    out = model.generate(**batch, do_sample=False, max_new_tokens=80, temperature=None, top_k=None)
    assert (out == tokenizer.eos_token_id).any(1).all()
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [f"Answer: {sum_of(p.text)}" in t.split("\n") for p, t in zip(prompts, texts, strict=True)]
    assert 0.25 <= sum(right) / 100 <= 0.75
    # Neither judge was told the other's verdict: the sum is computed, the verifier reads the gold answer's last number.
    by_sums = [scores(Sums(), p.text, t)[0] for p, t in zip(prompts, texts, strict=True)]
    number = Verifier(mode="number")
    assert by_sums == [scores(number, p.text, t, gold=p.gold)[0] for p, t in zip(prompts, texts, strict=True)]
    assert by_sums == [float(r) for r in right]
    firsts = {first_wrong_step(p.text, t) for p, t in zip(prompts, texts, strict=True)}
    assert {None, 1, 2, 3} <= firsts
