"""Every preset is a layer that a recipe takes, says where it is from, and names a loss that exists."""

import re

import pytest

from prefloop.components import build, kinds
from prefloop.errors import ConfigError
from prefloop.launch import read_recipe
from prefloop.losses._presets import PRESETS, preset
from prefloop.recipe import Layers, Spec, build_recipe


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_layer_whose_every_setting_arrives(name):
    found = preset(name)
    layers = Layers(values=read_recipe("iterative_dpo", [])[0].model_dump(mode="python"))
    layers.overlay(found.layer(), f"preset {name}")
    recipe = build_recipe(layers)
    loss = build("loss", recipe.loss)
    for key, value in found.loss.items():
        assert (recipe.loss.kind if key == "kind" else getattr(loss, key)) == value
    for key, value in found.train.items():
        assert getattr(recipe.train, key) == value
    assert {key for key, origin in layers.origins.items() if origin == f"preset {name}"} >= {"loss.kind"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_its_source_and_its_loss(name):
    assert re.search(r"arXiv \d{4}\.\d{5}", preset(name).source)
    kind = preset(name).loss["kind"]
    assert kind in kinds("loss")
    assert name.startswith(kind) or kind in ("rpo", "mixture")


@pytest.mark.parametrize(
    ("name", "beta", "ratio"),
    [
        ("simpo_mistral_base", 2.0, 0.8),
        ("simpo_mistral_instruct", 2.5, 0.1),
        ("simpo_llama3_base", 2.0, 0.5),
        ("simpo_llama3_instruct", 2.5, 0.55),
        ("simpo_llama3_instruct_v2", 10.0, 0.3),
        ("simpo_gemma2_9b_it", 10.0, 0.5),
    ],
)
def test_simpo_s_margin_is_the_authors_ratio_times_beta(name, beta, ratio):
    loss = build("loss", Spec.model_validate(dict(preset(name).loss)))
    assert (loss.beta, loss.gamma) == pytest.approx((beta, beta * ratio))


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean simpo_llama3_base"):
        preset("simpo_lama3_base")
    with pytest.raises(ConfigError, match="there are dpo, "):
        preset("zzz")
