"""The lean decoding step: equal to the model's own, chosen only where it is."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefloop.models import decoding_llama
from prefloop.models.decoding import decoding
from prefloop.models.decoding_batch import DecodingBatch
from prefloop.models.decoding_llama import lean_step

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LEAN: list[tuple[str, dict[str, object]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": False}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("qwen2", {"num_key_value_heads": 2}),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    ("mistral", {"num_key_value_heads": 1, "sliding_window": None}),
]
NOT_LEAN: list[tuple[str, dict[str, object], str]] = [
    ("gpt2", {}, "not a Llama-type model"),
    ("gpt_neox", {}, "not a Llama-type model"),
    ("gemma2", {"head_dim": 8}, "not a Llama-type model"),
    ("granite", {"logits_scaling": 4.0}, "not a Llama-type model"),
    ("mistral", {"sliding_window": 8}, "sliding window"),
    ("llama", {"hidden_act": "gelu"}, "activation gelu"),
    ("llama", {"attention_bias": True}, "biases"),
    ("llama", {"mlp_bias": True}, "biases"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "rotary angles"),
    ("llama", {"attn_implementation": "eager"}, "kind of attention"),
]


def model_of(architecture: str, options: dict[str, object]) -> PreTrainedModel:
    """Random weights everywhere, norms and biases too."""
    config = AutoConfig.for_model(
        architecture,
        **{
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
            **{"max_position_embeddings": 128, "vocab_size": 96, "pad_token_id": 0},
            **options,
        },
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(("architecture", "options"), LEAN)
@torch.inference_mode()
def test_a_lean_batch_has_the_model_s_logits(architecture: str, options: dict[str, object]) -> None:
    """Prompts of three lengths, rows that end, rows that join, rooms that grow: logits of a plain forward."""
    model = model_of(architecture, options)
    generator = torch.Generator().manual_seed(5)

    def check(logits: torch.Tensor) -> None:
        for row, ids in zip(logits, texts, strict=True):
            torch.testing.assert_close(row, model(torch.tensor([ids])).logits[0, -1], atol=1e-4, rtol=1e-4)

    def start(prompts: list[list[int]], rows: list[int]) -> tuple[DecodingBatch, torch.Tensor]:
        fresh = DecodingBatch(model, lean)
        return fresh, fresh.start(prompts, rows, 90)

    lean = lean_step(model, 128)
    assert lean is not None
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [1]]
    texts = [[*prompts[row]] for row in (0, 0, 1, 2, 2)]
    with decoding(model):
        batch, logits = start(prompts, [0, 0, 1, 2, 2])
        for step in range(85):
            if step in (4, 30):
                batch.keep([0, 2, 3] if step == 4 else [1, 2, 4])
                texts = [texts[row] for row in ([0, 2, 3] if step == 4 else [1, 2, 4])]
            if step in (6, 31):
                other = [[20, 21], [30] * 20]
                second, first_logits = start(other, [0, 1, 1])
                batch.join(second, 90)
                texts += [[*other[row]] for row in (0, 1, 1)]
                check(torch.cat([logits[: len(texts) - 3], first_logits]))
            tokens = torch.randint(96, (len(texts),), generator=generator)
            for ids, token in zip(texts, tokens.tolist(), strict=True):
                ids.append(token)
            logits = batch.advance(tokens)
            if step % 6 == 0 or step in (5, 30):
                check(logits)


@pytest.mark.parametrize(("architecture", "options", "reason"), NOT_LEAN)
def test_a_model_that_is_not_recognised_keeps_its_own_forward_and_says_so(
    architecture: str, options: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert lean_step(model_of(architecture, options), 64) is None
    assert f"{architecture} decodes with transformers' own forward" in caplog.text
    assert reason in caplog.text


def test_other_weights_types_and_sizes_are_not_lean(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", {})
    monkeypatch.setattr(decoding_llama, "LARGEST", 1000)
    assert lean_step(model, 64) is None
    monkeypatch.undo()
    assert lean_step(model, 64) is not None
    assert lean_step(model.bfloat16(), 64) is None


def test_a_model_that_computes_something_else_fails_the_check(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama", {})
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    with caplog.at_level(logging.INFO):
        assert lean_step(model, 64) is None
    assert "differ by" in caplog.text


@pytest.mark.parametrize("part", ["scaling", "pairs", "eps", "angles"])
def test_every_part_of_the_step_is_checked(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is wrong in one thing is refused."""
    made = decoding_llama.LeanStep.__init__

    def wrong(step: decoding_llama.LeanStep, model: PreTrainedModel, reach: int) -> None:
        made(step, model, reach)
        change = {
            "scaling": step.scaling * 1.001,
            "pairs": torch.arange(step.width),
            "eps": 1e-3,
            "angles": step.angles.roll(1, 0),
        }
        setattr(step, part, change[part])

    monkeypatch.setattr(decoding_llama.LeanStep, "__init__", wrong)
    assert lean_step(model_of("llama", {}), 64) is None
