"""train.compile: the same step as without, the same names of weights, whatever the layout."""

import pytest
import torch

from prefloop.errors import ConfigError
from prefloop.losses.dpo import DPO
from prefloop.models import adapters, causal_lm
from prefloop.models.logps import choose_layout
from prefloop.models.training import checkpoint_activations, compile_layers
from prefloop.rows import TokenizedPair
from prefloop.train.batches import pair_logps
from tiny import byte_tokenizer, tiny_model

# Compiling, torch warns of itself, and hides with a filter of its own what here would be an error first.
pytestmark = pytest.mark.filterwarnings("default")


def pairs(count: int) -> list[TokenizedPair]:
    def ids(first: int, size: int) -> tuple[int, ...]:
        return tuple(4 + (first * 7 + 3 * i) % 90 for i in range(size))

    return [
        TokenizedPair(
            f"p{i}", ids(i, 5 + i), ids(i + 1, 4 + i), ids(i + 2, 6), (-4.0,) * (4 + i), (-4.5,) * 6, None, 1.0
        )
        for i in range(count)
    ]


def step(model: torch.nn.Module, layout: str, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = DPO()(pair_logps(model, pairs(count), layout)).loss.sum()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_steps(model: torch.nn.Module, plain: torch.nn.Module, layout: str) -> None:
    for count in (2, 5, 3):  # lengths that differ from step to step
        (loss, gradients), (expected, wanted) = step(model, layout, count), step(plain, layout, count)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_compiled_layers_take_the_same_step(tmp_path):
    torch._dynamo.reset()
    plain, model = tiny_model("llama"), tiny_model("llama")
    compile_layers(model)
    before = compiled_graphs()
    assert choose_layout(model)[0] == "shared"
    assert compiled_graphs() == before, "the check of the layouts should not compile"
    for layout in ("shared", "padded"):
        assert_same_steps(model, plain, layout)
    assert compiled_graphs() > before
    for name, one in (("plain", plain), ("compiled", model)):
        causal_lm.export(one, byte_tokenizer(), tmp_path / name, "card")
    assert causal_lm.folder_digest(tmp_path / "plain") == causal_lm.folder_digest(tmp_path / "compiled")


@pytest.mark.slow
def test_compiled_layers_recompute_activations_and_carry_an_adapter():
    torch._dynamo.reset()
    models = [tiny_model("llama") for _ in range(2)]
    for model in models:
        checkpoint_activations(model)
    compile_layers(models[1])
    wrapped = [adapters.add_lora(model, 4, 8.0) for model in models]
    before = compiled_graphs()
    assert_same_steps(wrapped[1], wrapped[0], "shared")
    assert compiled_graphs() > before
    assert adapters.merge_lora(wrapped[1]).state_dict().keys() == tiny_model("llama").state_dict().keys()


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"train\.compile: there is no C\+\+ compiler no-such-compiler"):
        compile_layers(tiny_model("llama"))


def test_a_model_without_known_layers_is_refused():
    with pytest.raises(ConfigError, match=r"train\.compile: Linear has no known decoder layers"):
        compile_layers(torch.nn.Linear(1, 1))
