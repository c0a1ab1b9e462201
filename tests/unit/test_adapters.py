import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import tiny
from prefloop.errors import ConfigError, DataError
from prefloop.models import adapters

TOKENS = torch.arange(4, 24).view(2, 10)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def disturb(model, seed=1):
    """Give the zero half of every update random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def adapted(architecture="llama", **settings):
    return adapters.add_lora(tiny.tiny_model(architecture), 4, 8.0, **settings)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_fresh_adapter_changes_nothing_and_merging_changes_nothing(architecture):
    base = logits(tiny.tiny_model(architecture))
    model = adapted(architecture)
    assert torch.equal(logits(model), base)
    expected = logits(disturb(model))
    assert (expected - base).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    merged = adapters.merge_lora(model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert type(merged) is type(tiny.tiny_model(architecture))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert all(parameter.requires_grad for parameter in merged.parameters())


def weights(model):
    return {name: p.detach().double() for name, p in model.named_parameters()}


def rounds(architecture, count, rank, train):
    """`count` rounds of a fresh adapter, `train`ed and merged; yields the logits before and the weights after each."""
    model = tiny.tiny_model(architecture)
    for number in range(count):
        snapshot = logits(model)
        adapted_now = train(adapters.add_lora(model, rank, 2.0 * rank, seed=number), number)
        with adapted_now.disable_adapter():
            assert torch.equal(logits(adapted_now), snapshot), "the reference is the model of the round's start"
        model = adapters.merge_lora(adapted_now)
        yield snapshot, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_that_learn_nothing_change_no_weight(dtype):
    start = tiny.tiny_model("llama").to(dtype)
    model = copy.deepcopy(start)
    for number in range(4):
        model = adapters.merge_lora(adapters.add_lora(model, 3, 6.0, seed=number))
    for name, value in start.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_update_of_many_rounds_has_a_larger_rank_than_one_adapter_could(architecture):
    """R rounds of rank r: at most R·r, and more than r. The reason for merging (arXiv 2506.15220)."""
    rank, start = 2, weights(tiny.tiny_model(architecture))
    adapted_names = {n.replace(".base_layer", "") for n in adapted_layers(architecture)}
    for number, (_, model) in enumerate(rounds(architecture, 3, rank, lambda m, n: disturb(m, seed=n)), 1):
        found = {
            name: int(torch.linalg.matrix_rank(value - start[name], rtol=1e-4))
            for name, value in weights(model).items()
            if value.ndim == 2
        }
        assert {name for name, size in found.items() if size} == adapted_names
        assert {size for size in found.values() if size} == {number * rank}


def adapted_layers(architecture):
    """Names of the weights that an adapter changes."""
    model = adapted(architecture)
    layers = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    return {n.removeprefix("base_model.model.") + ".weight" for n in layers}


def test_a_fresh_adapter_on_merged_weights_changes_nothing():
    (_, _), (_, last) = rounds("llama", 2, 4, lambda m, n: disturb(m, seed=n))
    before = logits(last)
    assert torch.equal(logits(adapters.add_lora(last, 4, 8.0, seed=9)), before)


def test_only_the_adapter_is_trainable_and_never_the_head():
    model = adapted()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 7
    assert all("lora_" in name and "lm_head" not in name for name in trainable)
    assert not model.training


def test_seed_alone_decides_the_adapter_and_the_global_state_is_kept():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = adapted(seed=3).state_dict()
    tiny_state = one.keys()
    two = adapted(seed=3).state_dict()
    other = adapted(seed=4).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in tiny_state)
    assert any(not torch.equal(one[name], other[name]) for name in tiny_state if "lora_A" in name)
    model = tiny.tiny_model("llama")
    torch.set_rng_state(state)
    adapters.add_lora(model, 4, 8.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_merging_rounds_once():
    half = disturb(adapters.add_lora(tiny.tiny_model("llama").to(torch.bfloat16), 4, 8.0))
    exact = copy.deepcopy(half).float()
    merged = adapters.merge_lora(half)
    expected = adapters.merge_lora(exact)
    for name, value in expected.state_dict().items():
        assert merged.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(merged.state_dict()[name], value.bfloat16()), name


@pytest.mark.parametrize("trainable", [True, False])
def test_saved_adapter_comes_back(tmp_path, trainable):
    model = disturb(adapted(targets=["q_proj", "v_proj"]))
    adapters.save_adapter(model, tmp_path)
    again = adapters.load_adapter(tiny.tiny_model("llama"), tmp_path, trainable)
    assert isinstance(again, PeftModel)
    assert torch.equal(logits(again), logits(model))
    assert any(p.requires_grad for p in again.parameters()) == trainable
    assert all("q_proj" in name or "v_proj" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert not list(tmp_path.glob("*.bin"))


def test_same_adapter_same_bytes(tmp_path):
    for name in "ab":
        adapters.save_adapter(disturb(adapted()), tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    names = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)
    assert len(names) == 2 * 7


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0, "alpha": 1.0}, "rank ≥ 1"),
        ({"rank": 1, "alpha": 0.0}, "alpha > 0"),
        ({"rank": 1, "alpha": 1.0, "dropout": 1.0}, "dropout in"),
        ({"rank": 1, "alpha": 1.0, "targets": ["lm_head"]}, "LM head"),
        ({"rank": 1, "alpha": 1.0, "targets": "q_prj"}, "there are down_proj"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        adapters.add_lora(tiny.tiny_model("llama"), **settings)


def test_unusable_folders_are_refused(tmp_path):
    model = tiny.tiny_model("llama")
    with pytest.raises(DataError, match=r"no adapter_config\.json"):
        adapters.load_adapter(model, tmp_path, trainable=False)
    adapters.save_adapter(adapted("gpt2"), tmp_path / "other")
    with pytest.raises(DataError, match="does not fit LlamaForCausalLM"):
        adapters.load_adapter(model, tmp_path / "other", trainable=False)
