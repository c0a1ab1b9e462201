import math

import pytest
import torch

from prefloop import loop
from prefloop.models import threads
from prefloop.models.threads import fastest_threads
from prefloop.recipe import Recipe
from prefloop.rows import PolicyRef
from tiny import save_tiny_policy, tiny_model


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "most", "expected"),
    [
        ({1: 1.0, 2: 0.55, 4: 0.3, 8: 0.2}, 8, 8),
        ({1: 1.0, 2: 0.55, 4: 0.52, 8: 0.1}, 8, 2),  # the search ends where twice the threads gain nothing
        ({1: 1.0, 2: 0.95}, 2, 1),  # a tie
        ({1: 1.0, 2: 30.0}, 2, 1),
        ({1: 1.0, 2: 0.5, 4: 0.25, 6: 0.2}, 6, 6),
        ({}, 1, 1),
    ],
)
def test_threads_are_doubled_while_that_is_faster(monkeypatch, seconds, most, expected):
    monkeypatch.setattr(threads, "SMALL", 0)
    monkeypatch.setattr(threads, "_seconds", lambda model, groups, count, hopeless: seconds[count])
    assert fastest_threads(tiny_model("llama"), most) == expected


def test_a_small_model_is_not_measured(monkeypatch):
    monkeypatch.setattr(threads, "_seconds", None)
    assert fastest_threads(tiny_model("llama"), 8) == 1


@pytest.mark.parametrize(("slow", "expected"), [(0.0, 2), (0.5, 1)])
def test_a_real_probe_sees_what_more_threads_cost_and_leaves_the_model_as_it_was(monkeypatch, slow, expected):
    monkeypatch.setattr(threads, "SMALL", 0)
    model = tiny_model("llama").requires_grad_(False)
    passes: dict[int, int] = {1: 0, 2: 0}

    def work(*_):
        count = torch.get_num_threads()
        passes[count] += 1
        clock[0] += {1: 0.1, 2: 0.06 + slow}[count]

    clock = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])
    model.get_decoder().register_forward_pre_hook(work)
    torch.set_num_threads(1)
    assert fastest_threads(model, 2) == expected
    assert torch.get_num_threads() == 1
    assert passes[2] == (1 if slow else 3)  # one hopeless pass, or as many as fit into the time
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_a_run_measures_once_and_goes_on_with_the_same_number(monkeypatch, tmp_path):
    policy = PolicyRef(str(save_tiny_policy(tmp_path / "policy")), "digest", -1)
    measured = iter([3])
    monkeypatch.setattr(loop, "fastest_threads", lambda model, most: next(measured))
    assert loop.set_threads(Recipe(), policy, tmp_path) == torch.get_num_threads() == 3
    (tmp_path / "summary.json").write_text('{"threads": 3}')
    torch.set_num_threads(1)
    assert loop.set_threads(Recipe(), policy, tmp_path) == torch.get_num_threads() == 3
    assert loop.set_threads(Recipe(threads=2), policy, tmp_path) == torch.get_num_threads() == 2


@pytest.mark.parametrize("text", ["{}", "{", '{"threads": null}'])
def test_a_summary_without_the_number_is_no_obstacle(monkeypatch, tmp_path, text):
    policy = PolicyRef(str(save_tiny_policy(tmp_path / "policy")), "digest", -1)
    monkeypatch.setattr(loop, "fastest_threads", lambda model, most: 2)
    (tmp_path / "summary.json").write_text(text)
    assert loop.set_threads(Recipe(), policy, tmp_path) == 2


def test_the_work_of_a_probe_is_bounded_for_large_models(monkeypatch):
    model = tiny_model("llama")
    assert sum(len(g.context) + len(g.completions[0]) for g in threads._made_up_groups(model)) == 256
    monkeypatch.setattr(model, "num_parameters", lambda: 100_000_000)
    (tokens,) = {len(g.context) + len(g.completions[0]) for g in threads._made_up_groups(model)}
    assert tokens == 20
    monkeypatch.setattr(model, "num_parameters", lambda: math.inf)
    assert len(threads._made_up_groups(model)[0].context) == 2
