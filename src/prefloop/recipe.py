"""Recipe: every choice of a run, where each value came from, and how YAML and key=value change it.

Later layers win: the field's default, the method's recipe, the embedded default (only where the user names neither
policy nor prompts), the user's YAML file, key=value from the command line.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from prefloop.errors import ConfigError
from prefloop.train.settings import TrainSettings

PARTS = (
    *("order", "sampler", "eval_sampler", "judge", "eval_judge", "corrector", "locator"),
    *("pair_builder", "loss", "trainer", "gate"),
)
"""Fields that choose a component by `kind`."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _folder_name(value: str) -> str:
    if Path(value).is_absolute() or ".." in Path(value).parts or not value.isprintable():
        raise ValueError("must name a folder inside runs; to put the run elsewhere, use --out")
    return value


LONGEST_NAME = 255
"""Bytes of the longest name of a file, on every common file system."""
LONGEST_PATH = 4000
"""Characters of the longest path; the usual limit of a system is 4096 bytes."""


def _path(value: str) -> str:
    longest = max([0, *(len(part.encode("utf-8", "surrogatepass")) for part in Path(value).parts)])
    if len(value) > LONGEST_PATH or longest > LONGEST_NAME:
        raise ValueError(f"no file has so long a name ({len(value)} characters)")
    return value


NameOrPath = Annotated[str, AfterValidator(_path)]


def _named(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _kinded(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping) else value


class Spec(BaseModel):
    """A component: `kind` is its file's name in its folder, or `./my_file.py:Name`; the rest are its fields."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: NameOrPath

    def settings(self) -> dict[str, Any]:
        """Return the component's own fields."""
        return dict(self.model_extra or {})


Component = Annotated[Spec, BeforeValidator(_kinded)]


class PolicySettings(_Settings):
    """The model to improve."""

    path: NameOrPath
    """A `save_pretrained` folder, here or at an address such as s3://…, a hub id, or a model that prefloop ships:
    `embedded`, which writes stories, or `embedded-sums`, which does sums step by step."""
    revision: str | None = None
    """Commit or tag of a hub id. Default: the hub's main."""


class PromptSettings(_Settings):
    """Where prompts come from."""

    path: NameOrPath
    """A .jsonl, .parquet or .txt file, a folder of Parquet parts or of `save_to_disk`, a hub data set; or what prefloop
    ships: `embedded`, openings of stories, `embedded-preferences`, pairs of continuations, `embedded-sums`, sums."""
    column: str = "prompt"
    """Name of the column with the prompt: a string, or a list of messages."""
    gold: str | None = None
    """Name of the column with a human or reference answer. Default: gold, answer, completion or chosen if present."""
    split: str = "train"
    """Split of a hub data set."""
    holdout: Annotated[float, Field(gt=0, le=0.9)] = 0.2
    """Share of prompts, chosen by hash, that is never trained on and that every round is evaluated on."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Read at most this many rows. Default: all."""


class EvaluateSettings(_Settings):
    """How every round is measured on held-out prompts."""

    prompts: Annotated[int, Field(ge=2)] = 128
    """At most this many held-out prompts, the same ones in every round."""
    completions: Annotated[int, Field(ge=1)] = 1
    """Completions of each held-out prompt. The other sampler settings are the run's."""
    second_opinion: Annotated[int, Field(ge=0)] = 32
    """At most this many pairs of each round that `eval_judge` judges too, where it is another judge than `judge`: the
    report says how far the two agree. 0: none."""


class CombineSettings(_Settings):
    """How `round_exit: combine` weighs the rounds' modules: COFS-DPO, arXiv 2406.05534; its rule was not found."""

    rule: Literal["simplex", "free", "grid", "uniform", "given"] = "simplex"
    """simplex: weights ≥ 0 with sum 1, fitted on a memory of pairs. free: fitted without bounds. grid: two modules
    only, the best of steps + 1 mixtures. uniform: equal shares. given: `coefficients`."""
    coefficients: tuple[float, ...] | None = None
    """given only: the weight of each round's module, in order."""
    memory: Annotated[int, Field(ge=1)] = 64
    """Pairs of each round that the weights are fitted on."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Iterations of the fit, or parts of the grid."""


class Recipe(_Settings):
    """Every choice of a run. `policy` and `prompts` have no default: the user brings them."""

    recipe: str = ""
    """The method's name: a file of `recipes/`."""
    preset: str = ""
    """Published settings of a loss and its training, put over the method's own: see `prefloop methods --presets`."""
    name: Annotated[str, AfterValidator(_folder_name)] = ""
    """Name of the run, used for its folder. Default: the method's name."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every random stream."""
    trains: Literal["policy", "reward_model"] = "policy"
    """What comes out: a policy, or a reward model on the policy's backbone that scores completions."""
    rounds: Annotated[int, Field(ge=1, le=10_000)] = 3
    """Turns of the loop."""
    policy: Annotated[PolicySettings, BeforeValidator(_named)] | None = None
    """The model to improve."""
    prompts: Annotated[PromptSettings, BeforeValidator(_named)] | None = None
    """Where prompts come from."""
    prompts_per_round: Annotated[int, Field(ge=1)] | None = None
    """Training prompts of each round; rounds take successive slices. None: all of them in every round."""
    prompts_per_part: Annotated[int, Field(ge=1)] = 64
    """Prompts that are sampled and judged as one resumable unit."""
    order: Component = Spec(kind="shuffled")
    """Which prompts a round works on. shuffled: successive slices; easy_first: sDPO's order of existing pairs."""
    sampler: Component = Spec(kind="hf")
    """Draws completions."""
    eval_sampler: Component | None = None
    """Draws held-out completions. None: `sampler`, with `evaluate.completions`."""
    judge: Component | None = None
    """Scores completions."""
    eval_judge: Component | None = None
    """Judge of the held-out completions. None: the same as `judge`, which the report points out."""
    corrector: Component | None = None
    """Draws more completions once the round's are judged, such as corrections of wrong ones. None: the stage is left
    out."""
    locator: Component | None = None
    """A judge that the corrector asks about beginnings of solutions, to find the first wrong step. None: the corrector
    finds it without."""
    pair_builder: Component = Spec(kind="ranked")
    """Makes pairs from scores."""
    loss: Component = Spec(kind="dpo")
    """The objective."""
    trainer: Component = Spec(kind="update")
    """How optimizer steps are taken. update: plain minimisation of the loss."""
    gate: Component = Spec(kind="gate")
    """Decides whether a round's policy is promoted."""
    start_from: Literal["initial", "previous", "best"] = "previous"
    """Policy that a round starts from. previous: the last promoted one. best: the best by held-out win rate."""
    samples_from: Literal["start", "previous", "best"] = "start"
    """Policy that a round's completions are drawn from. start: the one that the round starts from. previous, best: as
    in `start_from`; so a round can train the first policy on what a later one writes (rebirth tuning)."""
    reference: Literal["initial", "previous", "adapter_off", "none"] = "previous"
    """Reference of the loss: the run's first policy; the one the round starts from; the model under the LoRA
    adapter; or none, for a loss that needs none."""
    replay: Annotated[int, Field(ge=0)] = 0
    """Past rounds whose pairs are trained on again, beside the round's own."""
    round_exit: Literal["keep", "merge_reinit", "combine"] = "merge_reinit"
    """LoRA only. merge_reinit: each round trains a fresh adapter on merged weights. keep: one adapter goes on. combine:
    each round trains a module on the first policy, and the policy is that plus a weighted sum of all modules."""
    combine: CombineSettings = CombineSettings()
    """Weights of `round_exit: combine`."""
    train: TrainSettings = TrainSettings()
    """How the policy is updated."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """How every round is measured."""
    per_round: dict[str, tuple[Any, ...]] = {}
    """What changes from round to round: {loss.beta: [0.1, 0.1, 5.0]}; the last value stays. Settings of loss, train,
    trainer, pair_builder and sampler may be given, and loss, trainer, pair_builder, start_from, samples_from, reference
    and replay as a whole: {loss: [dpo, dpo, sft]}."""
    loggers: Annotated[tuple[Component, ...], BeforeValidator(_several)] = ()
    """Where numbers are sent beside the run's own files: tensorboard, wandb, trackio, each a name or {kind: …} with its
    settings. Default: nowhere. They change no result."""
    overlap: bool = True
    """Where the sampler or the judge waits on an endpoint: judge completions and score pairs under the reference while
    others are still being drawn. Changes no result."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """CPU threads. auto: one for models under 5 M parameters, else measured when a run begins, and kept."""


@dataclass
class Layers:
    """Settings from several places, merged, with the place that each leaf came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def overlay(self, values: Mapping[str, Any], origin: str | Callable[[str], str]) -> None:
        """Put `values` over what is there. A component of another kind, or a lone string, replaces the old one."""
        name_origin = origin if callable(origin) else lambda _: origin
        self._merge(self.values, values, "", name_origin)

    def _merge(self, old: dict[str, Any], new: Mapping[str, Any], prefix: str, origin: Callable[[str], str]) -> None:
        for key, value in new.items():
            path = f"{prefix}{key}"
            value = self._normal(path, value)
            before = old.get(key)
            if isinstance(value, Mapping) and isinstance(before, dict) and not _other_kind(before, value):
                self._merge(before, value, f"{path}.", origin)
                continue
            self._forget(path)
            old[key] = _copied(value)
            for leaf in _leaves(value, path):
                self.origins[leaf] = origin(leaf)

    @staticmethod
    def _normal(path: str, value: Any) -> Any:
        if path in PARTS and isinstance(value, str):
            return {"kind": value}
        if path in ("policy", "prompts") and isinstance(value, str):
            return {"path": value}
        return value

    def _forget(self, path: str) -> None:
        for leaf in [o for o in self.origins if o == path or o.startswith(f"{path}.")]:
            del self.origins[leaf]


def _other_kind(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return "kind" in before and "kind" in after and after["kind"] != before["kind"]


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _leaves(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    else:
        yield path


MOST_NODES = 20_000
"""Values in a recipe file, aliases written out: a few lines of YAML can mean billions."""
DEEPEST = 32
"""Levels of a recipe file, or parts of a dotted key; prefloop's own recipes have four."""
_NOT_YAML = (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError, KeyError, RecursionError)
"""What PyYAML raises on text that is none: a date with a 99th day is a ValueError, a deep nesting no recursion more."""


def read_yaml(path: Path) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Return a YAML file's settings and a function that names the file and line of a dotted key.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, not a mapping, or larger or deeper than any recipe.

    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _count(tree, str(path))
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name an existing recipe file") from error
    except _NOT_YAML as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold `key: value` lines, got {type(values).__name__}")
    _require_names(values, str(path))
    lines = dict(_key_lines(tree, ""))

    def origin(key: str) -> str:
        while key and key not in lines:
            key = key.rpartition(".")[0]
        return f"{path}:{lines[key]}" if key else str(path)

    return values, origin


def _count(node: Any, place: str, depth: int = 1) -> int:
    """Return how many values a YAML tree has with every alias written out.

    Raises:
        ConfigError: there are more than `MOST_NODES`, or deeper ones than `DEEPEST`: an alias of itself has no end.

    """
    if node is None:
        return 0
    line = node.start_mark.line + 1
    if depth > DEEPEST:
        raise ConfigError(f"{place}:{line}: more than {DEEPEST} levels deep, or an alias that holds itself; flatten it")
    inner = node.value if isinstance(node.value, list) else []
    count = 1
    for item in inner:
        for part in item if isinstance(item, tuple) else (item,):
            count += _count(part, place, depth + 1)
            if count > MOST_NODES:
                raise ConfigError(f"{place}:{line}: more than {MOST_NODES} values, aliases written out; shorten it")
    return count


def _require_names(value: Any, place: str) -> None:
    """Refuse keys that are no strings: `on` and `1` are none in YAML."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{place}: the key {str(key)[:60]} is read as {type(key).__name__}; put it in quotes")
            _require_names(inner, place)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _require_names(inner, place)


def _key_lines(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _key_lines(value, f"{name}.")


def read_override(text: str) -> dict[str, Any]:
    """Return the settings of one `key=value` argument; the value is read as YAML.

    Raises:
        ConfigError: there is no `=`, or the value is not YAML.

    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"command line: {text!r} is not key=value (for example train.learning_rate=1e-4)")
    if key.count(".") >= DEEPEST:
        raise ConfigError(f"command line: {key[:60]}… has more than {DEEPEST} parts; no setting is so deep")
    try:
        _count(yaml.compose(value, Loader=yaml.SafeLoader), f"command line: {key}")
        parsed: Any = yaml.safe_load(value) if value else None
    except _NOT_YAML as error:
        raise ConfigError(f"command line: the value of {key} is not valid YAML: {value[:200]!r}") from error
    _require_names(parsed, f"command line: {key}")
    parsed = _number(parsed)
    for name in reversed(key.split(".")):
        parsed = {name: parsed}
    result: dict[str, Any] = parsed
    return result


def _number(value: Any) -> Any:
    """Read 1e-4 as a number: YAML 1.1 takes it for a string because it has no dot."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


LARGEST = 1e300
"""No setting is larger: infinity and NaN are none, and an integer of a thousand digits is no float."""
LARGEST_INTEGER = 2**63 - 1
"""The largest integer that an artifact or a random stream can hold."""


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int | float]]:
    """Yield every number of merged settings with its dotted key; an integer too large to store as infinity."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, float):
        yield key, value
    elif isinstance(value, int):
        yield key, value if abs(value) <= LARGEST_INTEGER else math.inf


def build_recipe(layers: Layers) -> Recipe:
    """Validate merged settings.

    Raises:
        ConfigError: a key is unknown (the message names the nearest known one) or a value is of the wrong type
            or out of range; the message names where it was set.

    """
    for key, value in _numbers(layers.values, ""):
        if not (abs(value) < LARGEST):  # NaN is neither below nor above
            origin = layers.origins.get(key, "recipe")
            raise ConfigError(f"{origin}: {key}: must be a number below {LARGEST:.0e}, got {str(value)[:40]}")
    try:
        return Recipe.model_validate(_with_default_kinds(layers.values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, layers.origins) for e in error.errors())) from None


def _with_default_kinds(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which a component that is given settings but no kind is of the default kind."""
    found = dict(values)
    for name in PARTS:
        default, given = Recipe.model_fields[name].default, values.get(name)
        if isinstance(default, Spec) and isinstance(given, Mapping) and "kind" not in given:
            found[name] = {"kind": default.kind, **given}
    return found


def _explain(error: Any, origins: Mapping[str, str]) -> str:
    place = [str(part) for part in error["loc"]]
    key = ".".join(place)
    origin = origins.get(key) or next((o for k, o in origins.items() if k.startswith(f"{key}.")), "recipe")
    if error["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key}; {nearest(place[-1], _known(place[:-1]))}"
    shown = repr(error["input"])
    return f"{origin}: {key}: {error['msg'].removeprefix('Value error, ')}, got {shown[:120]}"


CHANGEABLE = ("loss", "train", "trainer", "pair_builder", "sampler")
"""Fields whose settings `per_round` may change."""
EXCHANGEABLE = ("loss", "trainer", "pair_builder", "start_from", "samples_from", "reference", "replay")
"""Fields that `per_round` may change as a whole."""


def for_round(recipe: Recipe, number: int) -> Recipe:
    """Return the recipe of round `number`: `per_round` values put in place.

    Raises:
        ConfigError: `per_round` names a setting that is unknown or may not change, or gives it no or a bad value.

    """
    layers = Layers(values=recipe.model_dump(mode="python", exclude={"per_round"}))
    for key, values in recipe.per_round.items():
        if key not in EXCHANGEABLE and not ("." in key and key.partition(".")[0] in CHANGEABLE):
            raise ConfigError(
                f"per_round: {key} cannot change; settings of {', '.join(CHANGEABLE)} can, and as a whole "
                f"{', '.join(EXCHANGEABLE)}"
            )
        if not values:
            raise ConfigError(f"per_round: {key} has no values; give one for each round, or remove it")
        value: Any = values[min(number, len(values) - 1)]
        for name in reversed(key.split(".")):
            value = {name: value}
        layers.overlay(value, f"per_round, round {number}")
    return build_recipe(layers)


def distinct_rounds(recipe: Recipe) -> range:
    """Return the first rounds, up to the last that `per_round` makes different from the one before it."""
    return range(min(recipe.rounds, max([1, *map(len, recipe.per_round.values())])))


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint that names the nearest of `known`, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(sorted(known))}"


def _known(place: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for name in place:
        field = model.model_fields.get(name)
        model = (_model_in(field.annotation) if field else None) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the settings class that a type hint holds, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def dump_yaml(values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """Return settings as YAML, each leaf with a comment that says where its value came from."""
    return "\n".join(_yaml_lines(values, "", 0, origins)) + "\n"


def _yaml_lines(values: Mapping[str, Any], prefix: str, depth: int, origins: Mapping[str, str]) -> Iterator[str]:
    indent = "  " * depth
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from _yaml_lines(value, f"{path}.", depth + 1, origins)
        else:
            yield f"{indent}{key}: {flow_yaml(value)}  # {_origin_of(path, origins)}"


def flow_yaml(value: Any) -> str:
    """Return a value as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _origin_of(path: str, origins: Mapping[str, str]) -> str:
    while path:
        if path in origins:
            return origins[path]
        path = path.rpartition(".")[0]
    return "default"
