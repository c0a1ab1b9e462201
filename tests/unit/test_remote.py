"""Addresses: prompts are read from them and results sent to them, through fsspec's memory and local file systems."""

import json

import fsspec
import pytest

from prefloop.artifact import Key, open_artifact
from prefloop.commands.export import export_to
from prefloop.errors import ConfigError, DataError
from prefloop.prompts.dataset import read_prompts
from prefloop.remote import fetched, send
from prefloop.rows import VERBATIM, Completion, Message, PreferencePair, Prompt
from tiny import write_jsonl

ROWS = [{"prompt": f"Day {i}", "completion": f" it rained {i}."} for i in range(40)]


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_prompts_at_an_address_are_those_of_the_file(memory, tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    memory.pipe("/bucket/prompts.jsonl", path.read_bytes())
    there, here = read_prompts("memory://bucket/prompts.jsonl"), read_prompts(str(path))
    assert [p.messages for p in there.prompts] == [p.messages for p in here.prompts]
    assert there.prompts[6].source == "memory://bucket/prompts.jsonl:7"
    assert len(read_prompts(f"file://{path}").prompts) == 40


def test_a_bad_row_is_named_by_its_address(memory):
    memory.pipe("/bucket/bad.jsonl", b'{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(DataError, match=r"^memory://bucket/bad\.jsonl:2: "):
        read_prompts("memory://bucket/bad.jsonl")


def test_a_folder_is_fetched_whole(memory, tmp_path):
    for name in ("a/x.txt", "a/b/y.txt"):
        memory.pipe(f"/bucket/{name}", name.encode())
    with fetched("memory://bucket/a") as local:
        assert sorted(p.read_text() for p in local.rglob("*.txt")) == ["a/b/y.txt", "a/x.txt"]
    assert not local.exists()


def test_a_folder_is_sent_whole_and_once(memory, tmp_path):
    (tmp_path / "policy" / "sub").mkdir(parents=True)
    (tmp_path / "policy" / "config.json").write_text("{}")
    (tmp_path / "policy" / "sub" / "more.txt").write_text("more")
    send(tmp_path / "policy", "memory://bucket/mine")
    assert memory.cat("/bucket/mine/sub/more.txt") == b"more"
    with pytest.raises(ConfigError, match="memory://bucket/mine: exists already"):
        send(tmp_path / "policy", "memory://bucket/mine")


def test_pairs_are_exported_to_an_address(memory, tmp_path):
    sides = [Completion(side, f" {side}", None, None, "stop", 0, "given") for side in ("chosen", "rejected")]
    prompt = Prompt("0" * 16, (Message(VERBATIM, "Once"),), None, "train", "f:1")
    building = open_artifact(tmp_path / "run" / "round-000" / "3-pairs", Key("pairs", {}), PreferencePair)
    building.write_part(0, [PreferencePair("p", prompt, *sides, None, None, 1.0, None, 1.0, "ranked", 0)])
    building.finish()
    said = export_to("pairs", tmp_path / "run", "memory://bucket/pairs.jsonl")
    assert said == "memory://bucket/pairs.jsonl: 1 pairs"
    row = json.loads(memory.cat("/bucket/pairs.jsonl"))
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Once", " chosen", " rejected")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("memory://bucket/none.jsonl", "memory://bucket/none.jsonl: cannot be read"),
        ("nothing://bucket/p.jsonl", "Protocol not known: nothing"),
    ],
)
def test_an_address_that_leads_nowhere_is_named(memory, address, words):
    with pytest.raises(ConfigError, match=words):
        read_prompts(address)
