"""No pickle, no code from data: what prefloop's own source may not call, and what it refuses when it is tried."""

import ast
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml

import prefloop
from prefloop.check.config import check_names
from prefloop.components import component_class
from prefloop.errors import ConfigError, DataError
from prefloop.judge.reward_model import RewardModel
from prefloop.launch import read_recipe
from prefloop.models import causal_lm
from prefloop.rows import VERBATIM, Completion, Message, Prompt, SampleGroup
from tiny import save_tiny_policy

SOURCE = Path(prefloop.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("yaml.FullLoader", "yaml.CLoader", "os.system", "os.popen", "eval", "__import__"),
}
RUNS_CODE = {"exec": ["userfile.py"], "compile": ["userfile.py"]}
"""Where a user's own file is run: nowhere else."""


def dotted(node):
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def findings(source, name):
    """What in a source file could run code from data: imports, names, remote code, shells."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from (f"{name}:{node.lineno} imports {m}" for m in modules if m.partition(".")[0] in PICKLES)
        if isinstance(node, (ast.Attribute, ast.Name)) and dotted(node) in UNSAFE:
            yield f"{name}:{node.lineno} {dotted(node)}"
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in RUNS_CODE and name not in RUNS_CODE[called]:
                yield f"{name}:{node.lineno} {called}"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else "not a constant"
                if keyword.arg == "trust_remote_code" and value is not False:
                    yield f"{name}:{node.lineno} trust_remote_code={value}"
                if keyword.arg in ("weights_only", "use_safetensors") and value is not True:
                    yield f"{name}:{node.lineno} {keyword.arg}={value}"
                if keyword.arg == "allow_pickle" or (keyword.arg == "shell" and value is not False):
                    yield f"{name}:{node.lineno} {keyword.arg}={value}"


def loaders(source):
    """Every `X.from_pretrained(…)` of a model, tokenizer or config with the names of its keywords."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and dotted(node.func).endswith(".from_pretrained"):
            yield dotted(node.func).rpartition(".")[0], {keyword.arg for keyword in node.keywords}


def test_the_source_loads_no_pickle_and_runs_no_code_from_data():
    assert len(FILES) > 150
    found = [f for path in FILES for f in findings(path.read_text(encoding="utf-8"), str(path.relative_to(SOURCE)))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "yaml.load(x, Loader=yaml.Loader)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=setting)",
        "f(use_safetensors=None)",
        "np.load(x, allow_pickle=True)",
        "exec(text)",
        "eval(text)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert list(findings(source, "x.py"))


def test_every_loader_says_that_remote_code_is_off_and_models_that_weights_are_safetensors():
    found = [pair for path in FILES for pair in loaders(path.read_text(encoding="utf-8"))]
    loading = [(name, keys) for name, keys in found if name.startswith("Auto")]
    assert len(loading) >= 4
    for name, keys in loading:
        assert "trust_remote_code" in keys, name
        assert "Model" not in name or "use_safetensors" in keys, name


GROUP = SampleGroup(
    Prompt("p", (Message(VERBATIM, "q"),), None, "train", "here:1"),
    tuple(Completion(str(i), f"c {i}", None, None, "stop", 0, "x") for i in range(2)),
    *("x", 0, 1.0, 1.0),
)


class Mischief:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_weights_are_refused_and_not_opened(tmp_path):
    folder = save_tiny_policy(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Mischief(tmp_path / "made")))
    for load in (lambda: causal_lm.load(str(folder)), lambda: RewardModel(str(folder))([GROUP], None)):
        with pytest.raises(DataError, match=r"pytorch_model\.bin|safetensors"):
            load()
    assert not (tmp_path / "made").exists()


def test_pickle_under_the_name_of_safetensors_is_refused(tmp_path):
    folder = save_tiny_policy(tmp_path / "model")
    for data in (pickle.dumps(Mischief(tmp_path / "made")), b"", b"\xff" * 64):
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(DataError, match="model"):
            causal_lm.load(str(folder))
    torch.save({"w": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(DataError, match="model"):
        causal_lm.load(str(folder))
    assert not (tmp_path / "made").exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder = save_tiny_policy(tmp_path / "model")
    made = tmp_path / "made"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(made)!r})\nclass Model: ...\nclass Config: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="model"):
        causal_lm.load(str(folder))
    assert not made.exists()


@pytest.mark.parametrize("key", ["policy", "judge", "sampler", "train", "loss"])
def test_no_setting_turns_remote_code_on(key):
    settings = ["policy.path=x", "judge.kind=lexicon", f"{key}.trust_remote_code=true"]
    with pytest.raises(ConfigError, match=rf"{key}\.trust_remote_code"):
        check_names(read_recipe("iterative_dpo", settings)[0])


def test_a_users_file_runs_only_where_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import os\nfrom dataclasses import dataclass\nos.makedirs('made')\n@dataclass\nclass Mine: ...\n"
    for name in ("mine.py", "lexicon.py", "prefloop.py", "yaml.py"):
        Path(name).write_text(code)
    for kind in ("mine", "lexicon", "prefloop.mine", "../mine", "judge/../mine", "mine.py"):
        try:
            component_class("judge", kind)
        except ConfigError:
            assert kind != "lexicon"
    assert not Path("made").exists()
    assert yaml.__file__ != str(Path("yaml.py").resolve())
    assert component_class("judge", "./mine.py:Mine").__name__ == "Mine"
    assert Path("made").exists()
