"""Ranks that share a model read their own rows only, and have what plain transformers would have read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import share_cases
from prefloop.errors import DataError
from prefloop.models import causal_lm
from prefloop.models.skeleton import causal_lm_skeleton, is_stand_in
from prefloop.train.reference import score_reference
from rank_launch import found_by, start_ranks
from tiny import BYTE_VOCABULARY, byte_tokenizer, save_tiny_policy

SLACK = 12
"""MiB: what Python and torch take beside weights."""


def save_large(folder: Path) -> float:
    """Write a policy of some 90 MiB and return the size of its largest weight, MiB."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return 8192 * 512 * 4 / share_cases.MIB


def save_mixture(folder: Path) -> None:
    config = MixtralConfig(
        vocab_size=BYTE_VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.mark.slow
def test_ranks_read_their_own_rows_only(tmp_path):
    # Tied and untied heads, renamed weights (GPT-NeoX), transposed ones (GPT-2), buffers, and fused experts.
    for architecture in ("llama", "qwen2", "gpt_neox", "gpt2", "gemma2"):
        save_tiny_policy(tmp_path / architecture, architecture)
    save_mixture(tmp_path / "mixtral")
    largest = save_large(tmp_path / share_cases.LARGE)
    whole = sum(t.numel() for t in load_file(tmp_path / share_cases.LARGE / "model.safetensors").values()) * 4
    share = whole / 2 / share_cases.MIB
    start_ranks("share_cases.py", 2, str(tmp_path))
    found = found_by(tmp_path, 2)

    start_ranks("share_cases.py", 1, str(tmp_path))
    assert found_by(tmp_path, 1)[0]["loading"] > 2 * share - SLACK
    for each in found:
        assert share - SLACK < each["peaks"]["loading"] < share + largest + SLACK, each["peaks"]
    assert found[1]["peaks"]["saving"] < 2 * largest + SLACK  # gathered, and not kept
    assert found[0]["peaks"]["saving"] < 2 * share + 2 * largest + SLACK  # one file at a time, here all of it

    plain = causal_lm.load(str(tmp_path / "llama"), precision="fp32", device="cpu", cache=False).model
    for rank in range(2):
        alone = score_reference(plain, share_cases.pairs_of(rank, 2), "padded", 40)
        assert found[rank]["scored"] == json.loads(
            json.dumps([[pair.reference_chosen, pair.reference_rejected] for pair in alone])
        )

    again = AutoModelForCausalLM.from_pretrained(tmp_path / share_cases.LARGE / "out")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / share_cases.LARGE)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), first.parameters(), strict=True))
    saved = [(tmp_path / share_cases.LARGE / name / "model.safetensors").read_bytes() for name in (".", "out")]
    assert saved[0] == saved[1]


def test_a_skeleton_takes_no_memory_and_looks_like_the_model(tmp_path):
    folder = save_tiny_policy(tmp_path / "llama")
    found = causal_lm_skeleton(str(folder), precision="bf16", device="cpu")
    assert found is not None
    lm, _ = found
    plain = causal_lm.load(str(folder), precision="bf16", device="cpu", cache=False)
    assert all(is_stand_in(p) and p.untyped_storage().nbytes() <= 2 for p in lm.model.parameters())
    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    assert (lm.digest, lm.stop_ids, lm.model.dtype) == (plain.digest, plain.stop_ids, torch.bfloat16)
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (lm.model, plain.model)]
    assert shapes[0] == shapes[1]


def damaged(folder: Path, change) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "1 weights that config.json asks for are missing"),
        (lambda w: w.update({"model.norm.weight": torch.ones(7)}), "the weights do not match config.json"),
    ],
)
def test_weights_that_do_not_fit_are_left_to_the_loader_that_says_so(change, said, tmp_path):
    folder = damaged(save_tiny_policy(tmp_path / "llama"), change)
    assert causal_lm_skeleton(str(folder), precision="fp32", device="cpu") is None
    with pytest.raises(DataError, match=said):
        causal_lm.load(str(folder), precision="fp32", device="cpu", cache=False)


def test_two_weights_for_one_tied_name_are_left_to_transformers(tmp_path):
    folder = save_tiny_policy(tmp_path / "llama")
    damaged(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    assert causal_lm_skeleton(str(folder), precision="fp32", device="cpu") is None
