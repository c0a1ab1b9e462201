"""The capacity model: published sizes, what sharding divides, and what does not fit."""

import pytest

from prefloop.commands.plan_capacity import FIXED, GIB, GPUS, SHAPES, Load, capacity, read_gpus, training_memory
from prefloop.errors import ConfigError
from prefloop.train.settings import LoraSettings, TrainSettings


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_their_published_parameters(name):
    shape = SHAPES[name]
    # Embeddings and head are one matrix up to 3B, two above: what is left is norms and, in Qwen, biases.
    matrices = 1 if name in ("0.5B", "1B", "3B") else 2
    counted = shape.layers * shape.layer + matrices * shape.vocabulary * shape.width
    assert counted == pytest.approx(shape.parameters, rel=0.002)


def test_sixteen_bytes_a_parameter_are_divided_by_the_ranks():
    shape = SHAPES["8B"]
    names = ("weights, float32", "gradients, float32", "AdamW's two moments, float32")
    for ranks in (1, 8, 64):
        _, found = training_memory(shape, TrainSettings(), ranks, 8)
        assert sum(found[name] for name in names) == pytest.approx(16 * shape.parameters / ranks)
    kind, found = training_memory(shape, TrainSettings(sharding="hybrid"), 64, 8)
    assert (kind, found["weights, float32"]) == ("hybrid", pytest.approx(4 * shape.parameters / 8))


def test_an_adapter_costs_what_it_has():
    settings = TrainSettings(lora=LoraSettings(rank=16))
    _, found = training_memory(SHAPES["8B"], settings, 8, 8)
    # PEFT counts 41,943,040 parameters for rank 16 on all linear layers of Llama 3 8B.
    assert found["gradients, float32"] == 4 * 41_943_040


def test_recomputing_saves_activations_and_nothing_else():
    plain = training_memory(SHAPES["8B"], TrainSettings(), 8, 8)[1]
    again = training_memory(SHAPES["8B"], TrainSettings(gradient_checkpointing=True), 8, 8)[1]
    assert again["activations"] < plain["activations"] / 10
    assert {k: v for k, v in plain.items() if k != "activations"} == {
        k: v for k, v in again.items() if k != "activations"
    }


def test_seventy_billion_fit_sharded_and_not_whole():
    found = capacity("64xH100", "70B", TrainSettings(gradient_checkpointing=True), Load(pairs=10_000_000))
    room = GPUS["H100"].memory * GIB
    assert max(found.peak, found.loading, found.scoring) < room < found.sampling
    # Its share of 70.55 billion weights, and the embeddings, which are gathered when the policy is saved.
    assert found.loading == pytest.approx(4 * 70.55e9 / 64 + 4 * 128256 * 8192 + FIXED)
    unfit = [line for line in found.lines() if "DOES NOT FIT" in line]
    assert len(unfit) == 1
    assert "sampling in process" in unfit[0]
    assert "sampler.kind=server" in unfit[0]
    whole = capacity("1xH100", "70B", TrainSettings(gradient_checkpointing=True), Load())
    assert min(whole.loading, whole.scoring, whole.peak) > room


def test_twice_the_gpus_take_half_the_time():
    one = capacity("8xH100", "8B", TrainSettings(), Load())
    two = capacity("16xH100", "8B", TrainSettings(), Load())
    assert two.hours == {name: pytest.approx(hours / 2) for name, hours in one.hours.items()}


@pytest.mark.parametrize(
    ("text", "found"), [("8xH100", (8, "H100")), ("h200", (1, "H200")), ("4 × A100-40", (4, "A100-40"))]
)
def test_gpus_are_read(text, found):
    assert read_gpus(text) == found


@pytest.mark.parametrize("text", ["8xV3", "", "0xH100", "xH100"])
def test_unknown_gpus_are_refused(text):
    with pytest.raises(ConfigError, match="--gpus"):
        read_gpus(text)


def test_an_unknown_model_is_refused():
    with pytest.raises(ConfigError, match="--model: '9000B'"):
        capacity("8xH100", "9000B", TrainSettings(), Load())
