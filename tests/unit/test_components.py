import pytest

from prefloop.components import build, key_of, kinds
from prefloop.errors import ConfigError
from prefloop.recipe import Spec

USER_JUDGE = """
from dataclasses import dataclass
from prefloop.rows import Verdict

@dataclass(frozen=True)
class Longest:
    scale: float = 1.0

    def __call__(self, groups, context):
        lengths = [[self.scale * len(c.text) for c in g.completions] for g in groups]
        return [Verdict(tuple(row), (None,) * len(row)) for row in lengths]
"""


def spec(**fields):
    return Spec.model_validate(fields)


def test_a_file_in_the_folder_is_a_kind():
    assert {"lexicon", "verifier"} <= set(kinds("judge"))
    assert "dpo" in kinds("loss")


def test_kind_and_fields_build_the_component():
    assert build("loss", spec(kind="dpo", beta=0.3)).beta == 0.3


def test_a_users_file_is_a_kind(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER_JUDGE, encoding="utf-8")
    kind = f"{path}:Longest"
    judge = build("judge", spec(kind=kind, scale=2.0))
    before = key_of(judge, kind)
    assert before["scale"] == 2.0
    path.write_text(USER_JUDGE + "\n# changed\n", encoding="utf-8")
    assert key_of(judge, kind) != before


@pytest.mark.parametrize(
    ("place", "fields", "message"),
    [
        ("loss", {"kind": "simp"}, r"loss\.kind: no 'simp' .* did you mean simpo\?"),
        ("loss", {"kind": "../secrets"}, r"loss\.kind: no"),
        ("loss", {"kind": "dpo", "bета": 1}, r"loss\.bета: unknown key for kind dpo"),
        ("loss", {"kind": "dpo", "beta": "x"}, r"loss\.beta: .*got 'x'"),
        ("loss", {"kind": "dpo", "beta": -1}, "beta"),
        ("judge", {"kind": "reward_model"}, r"judge\.path: not set, and kind reward_model needs it"),
        ("judge", {"kind": "./none.py:Mine"}, r"judge\.kind: .*none\.py"),
    ],
)
def test_bad_components_are_refused(place, fields, message):
    with pytest.raises(ConfigError, match=message):
        build(place, spec(**fields))


def test_new_weights_in_the_same_folder_are_another_key(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    judge = build("judge", spec(kind="reward_model", path=str(tmp_path)))
    before = key_of(judge, "reward_model")
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert key_of(judge, "reward_model") != before
