"""Hostile input for every reader: a result, or an error that names the place. The long run is `make fuzz`."""

import json
import os
import random

import pytest

from benchmarks.reliability import corpus
from benchmarks.reliability.fuzz import Count, fuzz, give, unclear
from benchmarks.reliability.mutate import mutated
from benchmarks.reliability.readers import Reader, readers
from prefloop.artifact import Key, load_artifact, locked, open_artifact
from prefloop.disk import sealed
from prefloop.errors import ConfigError, CorruptArtifact, DataError, PrefloopError, printable
from prefloop.launch import read_recipe
from prefloop.prompts.dataset import read_prompts
from prefloop.recipe import read_override, read_yaml
from prefloop.rows import VERBATIM, Message, Prompt
from prefloop.sample import _server_wire
from tiny import write_jsonl

NAMES = (
    *("prompts, JSON lines", "prompts, JSON array", "prompts, text", "prompts, Parquet", "corrections", "label import"),
    *("recipe, YAML", "recipe, key=value", "judge reply, text", "judge reply, json", "server response"),
    *("chat templating", "chat template", "manifest", "key file", "artifact rows", "summary"),
)
PER_READER = 60


@pytest.fixture(scope="module")
def every_reader(tmp_path_factory):
    return {reader.name: reader for reader in readers(tmp_path_factory.mktemp("seeds"))}


@pytest.mark.parametrize("name", NAMES)
def test_hostile_input_is_read_or_refused_by_name(every_reader, tmp_path, name):
    reader = every_reader[name]
    count = fuzz(reader, PER_READER // reader.cost, 1, tmp_path, giants=False)
    assert (count.crashed, count.unclear) == (0, 0), count.examples
    assert count.read > 0
    assert count.refused > 0


def test_the_list_of_readers_is_whole(every_reader):
    assert tuple(every_reader) == NAMES


def test_a_crash_and_an_unclear_refusal_are_noticed(tmp_path):
    def read(data, folder):
        if data == b"crash":
            raise KeyError("x")
        raise DataError("somewhere" if data == b"unclear" else "p.jsonl:3: bad")

    reader = Reader("r", "", read, (b"clear",), corpus.texts(), ("p.jsonl",))
    count = Count("r", "")
    for data in (b"crash", b"unclear", b"clear"):
        give(reader, data, tmp_path, count)
    assert (count.inputs, count.crashed, count.unclear, count.refused, count.read) == (3, 1, 1, 1, 0)
    assert unclear(reader, "p.jsonl: \x1b[31m red") == "has characters that a terminal obeys"


def test_mutations_are_a_function_of_the_seed():
    first, again = ([mutated((b"abc", b"12"), random.Random(5)) for _ in range(20)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 1 or first[0] != b"abc"


# What chance does not find


def test_a_line_of_ten_megabytes_is_read(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x" * corpus.TEN_MB}])
    assert len(read_prompts(str(path), holdout=0.5).prompts[0].text) == corpus.TEN_MB


def test_a_line_above_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("prefloop.prompts.dataset._lines.__defaults__", (100,))
    path = write_jsonl(tmp_path / "p.txt", [{"prompt": "short"}, {"prompt": "x" * 100}])
    with pytest.raises(DataError, match=r"p\.txt:2: longer than 100 bytes"):
        read_prompts(str(path))


def test_a_file_of_kilobytes_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("prefloop.columns.UNPACKED", 2**22)
    path = tmp_path / "p.parquet"
    for bomb in (corpus.shared_value(20_000, 200_000), corpus.repeated_item(20_000, 1_000)):
        assert len(bomb) < 100_000
        path.write_bytes(bomb)
        with pytest.raises(DataError, match=r"p\.parquet: .*unpacks to more than 100 times its size"):
            read_prompts(str(path))
    path.write_bytes(corpus.shared_value(20_000, 100))
    assert len(read_prompts(str(path), holdout=0.5).prompts) == 1


@pytest.mark.parametrize(("place", "bomb"), list(enumerate(corpus.bombs_yaml())))
def test_yaml_bombs(tmp_path, place, bomb):
    path = tmp_path / "mine.yaml"
    path.write_bytes(bomb)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        read_recipe(str(path), [])


def test_only_safe_yaml_tags_are_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.yaml: not valid YAML"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="command line"):
        read_override(f"name=!!python/object/apply:os.mkdir ['{tmp_path}/made']")
    assert not (tmp_path / "made").exists()


def test_an_alias_that_is_used_twice_is_still_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("sampler: &s {kind: hf}\neval_sampler: *s\n", encoding="utf-8")
    assert read_yaml(path)[0]["eval_sampler"] == {"kind": "hf"}


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "9" * 40, "1e999"])
@pytest.mark.parametrize("key", ["train.learning_rate", "loss.beta", "judge.some_number", "seed"])
def test_numbers_that_are_none_are_refused_with_their_origin(key, value):
    with pytest.raises(ConfigError, match=rf"command line: {key}"):
        read_recipe("iterative_dpo", [f"{key}={value}"])


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", r'"a\x1b[2Jb"', r'"a\nb"'])
def test_a_name_that_leads_out_of_the_runs_is_refused(name):
    with pytest.raises(ConfigError, match="name: must name a folder inside runs"):
        read_recipe("iterative_dpo", [f"name={name}"])


# A run folder from somebody else

KEY = Key("prompts", {"limit": 3})
ROWS = [Prompt(f"{i:016x}", (Message(VERBATIM, f"p {i}"),), None, "train", f"f:{i}") for i in range(3)]


def artifact(folder):
    building = open_artifact(folder, KEY, Prompt)
    building.write_part(0, ROWS)
    return building


def test_a_part_that_is_a_link_out_of_the_run_is_refused(tmp_path):
    stage = tmp_path / "run" / "prompts"
    building = artifact(stage)
    part = stage / "part-00000.parquet"
    secret = tmp_path / "secret.parquet"
    os.rename(part, secret)
    part.symlink_to(secret)
    with pytest.raises(CorruptArtifact, match="a link out of its folder"):
        list(building.parts())
    building.finish()
    with pytest.raises(CorruptArtifact, match="a link out of its folder"):
        list(load_artifact(stage, Prompt))


@pytest.mark.parametrize("name", ["part-/../../../secret", "/etc/passwd", "../x", "part-\0"])
def test_a_manifest_with_a_name_that_leads_out_is_refused(tmp_path, name):
    artifact(tmp_path / "s").finish()
    manifest = tmp_path / "s" / "manifest.json"
    escaped = name.replace("\0", "\\u0000")
    forged = json.loads(manifest.read_text().replace("part-00000.parquet", escaped))
    manifest.write_text(json.dumps(sealed(forged)), encoding="utf-8")
    with pytest.raises(CorruptArtifact, match="no name inside the folder"):
        load_artifact(tmp_path / "s", Prompt)


def test_a_lock_that_is_a_link_is_not_written_to(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    with pytest.raises(ConfigError, match="is a link"), locked(tmp_path / "run"):
        pass
    assert precious.read_text() == "keep me"


def test_messages_hold_nothing_that_a_terminal_obeys():
    hostile = "a\x1b]0;title\x07b\ud800\u202egnp.exe\x9b2J\r"
    for text in (printable(hostile), str(PrefloopError(hostile)), str(DataError(hostile))):
        assert text == r"a\x1b]0;title\x07b\ud800\u202egnp.exe\x9b2J\r"
    assert len(str(DataError("x" * 10**7))) < 4000
    assert str(DataError("näïve – text\n\twith lines 🐍")) == "näïve – text\n\twith lines 🐍"


# What `make fuzz` found


@pytest.mark.parametrize(
    "text", ["judge.kind=" + "a" * 5000, "judge=./" + "x/" * 3000 + "y.py:Y", "prompts=" + "z" * 400]
)
def test_a_name_that_no_file_can_have(text):
    with pytest.raises(ConfigError, match=r"command line: .* no file has so long a name"):
        read_recipe("iterative_dpo", [text])


def test_a_response_whose_lists_are_none():
    wanted = _server_wire.Wanted((Message(VERBATIM, "q"),), 1, 8, 0)
    choice = {"text": "a", "logprobs": {"tokens": -17, "token_logprobs": True}}
    (drawn,) = _server_wire.read({"choices": [choice]}, wanted)
    assert (drawn.text, drawn.token_ids, drawn.logps) == ("a", None, None)


@pytest.mark.parametrize("text", ["prompts.l=10", "policy.x=1", "evaluate.x=1", "train.lora.rnk=2"])
def test_an_unknown_key_below_an_optional_part(text):
    with pytest.raises(ConfigError, match="unknown key"):
        read_recipe("iterative_dpo", [text])


def test_instructions_without_their_arguments(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "instruction_id_list": ["punctuation:no_comma"]}])
    with pytest.raises(DataError, match=r"p\.jsonl:1: instruction_id_list without kwargs"):
        read_prompts(str(path))
