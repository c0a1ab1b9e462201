from pathlib import Path

import pytest
import yaml

from prefloop.errors import ConfigError
from prefloop.launch import EMBEDDED_DEFAULT, read_recipe
from prefloop.recipe import Layers, Recipe, build_recipe, dump_yaml, read_override, read_yaml


def test_later_layers_win_and_origins_follow():
    recipe, origins = read_recipe("iterative_dpo", ["policy=a", "prompts=b.jsonl", "loss.beta=0.3"])
    assert recipe.policy.path == "a"
    assert recipe.loss.settings() == {"beta": 0.3}
    assert origins["loss.beta"] == "command line"
    assert origins["pair_builder.rule"] == "recipe iterative_dpo"
    assert "gate.kind" not in origins


def test_the_embedded_default_is_used_only_where_the_user_names_neither_policy_nor_prompts():
    assert read_recipe("iterative_dpo", [])[0].policy.path == "embedded"
    assert read_recipe("iterative_dpo", ["policy=x"])[0].prompts is None
    assert read_recipe("iterative_dpo", ["prompts=x"])[0].train.learning_rate == 5e-7


def test_every_embedded_default_is_a_known_key():
    recipe, origins = read_recipe("iterative_dpo", [])
    assert set(origins.values()) == {"command line", "recipe iterative_dpo", "embedded default"}
    assert recipe.sampler.settings()["completions"] == EMBEDDED_DEFAULT["sampler"]["completions"]


def test_another_kind_replaces_the_component():
    recipe, _ = read_recipe("iterative_dpo", ["judge.mode=number", "judge.kind=verifier"])
    assert recipe.judge.kind == "verifier"
    assert recipe.judge.settings() == {"mode": "number"}


def test_the_same_kind_keeps_the_other_fields():
    recipe, _ = read_recipe("iterative_dpo", ["sampler.temperature=0.5"])
    assert recipe.sampler.settings()["completions"] == 4


def test_yaml_file_overlays_and_names_its_lines(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "recipe: iterative_dpo\npolicy: here\nprompts: there.jsonl\ntrain:\n  epochs: 3\n", encoding="utf-8"
    )
    recipe, origins = read_recipe(str(path), ["train.epochs=4"])
    assert recipe.train.epochs == 4
    assert origins["policy.path"] == f"{path}:2"
    path.write_text("recipe: iterative_dpo\ntrain:\n  epohcs: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.yaml:3: unknown key train\.epohcs; did you mean epochs\?"):
        read_recipe(str(path), [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rte=1", r"unknown key train\.learning_rte; did you mean learning_rate\?"),
        ("jugde=lexicon", r"unknown key jugde; did you mean judge\?"),
        ("rounds=0", "rounds: Input should be greater than or equal to 1, got 0"),
        ("rounds=many", "rounds: .*integer"),
        ("train.lora.rank=x", r"train\.lora\.rank: .*got 'x'"),
        ("start_from=best_ever", "start_from: .*'initial', 'previous' or 'best'"),
        ("sampler", "is not key=value"),
        ("a={", "not valid YAML"),
        ("recipe=spin_dpo", "no 'spin_dpo'"),
        ("recipe=rank_dpo", "rank_dpo is planned"),
    ],
)
def test_bad_settings_say_where_and_what(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_recipe("iterative_dpo", [override])
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "must hold"), ("a: [", "not valid YAML"), ("", "must hold")],
)
def test_bad_yaml_names_the_file(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path)
    assert "r.yaml" in str(error.value)


def test_missing_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_yaml_cannot_make_objects(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: !!python/object/apply:os.getcwd []", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(path)


def test_numbers_without_a_dot_are_numbers():
    assert read_override("a.b=1e-4") == {"a": {"b": 1e-4}}
    assert read_override("a=true") == {"a": True}
    assert read_override("a=") == {"a": None}


def test_the_resolved_recipe_is_yaml_that_gives_the_same_recipe():
    recipe, origins = read_recipe("iterative_dpo", ["train.lora.rank=4"])
    text = dump_yaml(recipe.model_dump(mode="json"), origins)
    assert Recipe.model_validate(yaml.safe_load(text)) == recipe
    assert "rank: 4  # command line" in text
    assert "  epsilon: 1.0e-08  # default" in text


def test_layers_forget_origins_of_what_they_replace():
    layers = Layers()
    layers.overlay({"judge": {"kind": "a", "x": 1}}, "one")
    layers.overlay({"judge": "b"}, "two")
    assert layers.values == {"judge": {"kind": "b"}}
    assert layers.origins == {"judge.kind": "two"}


def test_settings_of_a_default_component_need_no_kind():
    recipe, origins = read_recipe("iterative_dpo", ["gate.alpha=0.1"])
    assert (recipe.gate.kind, recipe.gate.settings()) == ("gate", {"alpha": 0.1})
    assert origins["gate.alpha"] == "command line"
    with pytest.raises(ConfigError, match="judge"):  # there is no default judge
        build_recipe(Layers(values={"judge": {"model": "m"}}))
