"""Models that ranks share: how they load, score and save; run as a script, one rank of several.

python share_cases.py FOLDER    with the environment that a launcher sets; FOLDER/POLICY are the models. One process
                                only measures what a whole policy takes.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from prefloop.models.adapters import add_lora, plain_weights
from prefloop.models.pieces import export_pieces
from prefloop.models.shares import held_rows, local
from prefloop.ranks import joined
from prefloop.rows import TokenizedPair
from prefloop.team import ALONE, Team
from prefloop.train.opening import open_frozen, open_trainable
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from prefloop.train.sharding import shard

SETTINGS = TrainSettings(sharding="full", device="cpu", layout="padded")
LARGE = "large"
MIB = 1 << 20


def peak_above(before: int) -> float:
    return (memory("VmHWM") - before) / MIB


def memory(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def forget_peak() -> int:
    """Let the highest memory of this process be that of now, and return it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def load(folder: Path, team: Team, settings: TrainSettings = SETTINGS) -> tuple[Any, Any]:
    said: list[str] = []
    opened = open_trainable(str(folder), settings, team, said.append)
    fused = "mixtral" in folder.name
    assert (opened.checkpoint is None) == fused
    assert bool(said) == (fused and team.main), said
    opened.lm.model.requires_grad_(True)
    assert shard(opened.lm.model, team, settings, opened.checkpoint)
    return opened.lm, opened.checkpoint


def check_weights(folder: Path, team: Team) -> None:
    """Compare each rank's rows, buffers and what the model says with those of a plain load."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lm, _ = load(folder, team)
    own, theirs = dict(lm.model.named_parameters()), dict(plain.named_parameters())
    assert list(own) == list(theirs)
    for name, parameter in own.items():
        first, last = held_rows(parameter)
        assert torch.equal(local(parameter), theirs[name][first:last]), name
    buffers = dict(lm.model.named_buffers())
    assert buffers.keys() == dict(plain.named_buffers()).keys()
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(lm.model(tokens).logits, plain(tokens).logits)
    assert lm.model.generation_config.to_dict() == plain.generation_config.to_dict()


def check_adapter(folder: Path, team: Team) -> None:
    """An adapter on a shared model begins as one on a whole model: the same numbers."""
    plain = add_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 4, 8.0, seed=3)
    opened = open_trainable(str(folder), SETTINGS, team, print)
    adapted = add_lora(opened.lm.model, 4, 8.0, seed=3)
    assert shard(adapted, team, SETTINGS, opened.checkpoint)
    theirs = dict(plain.named_parameters())
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, p in theirs.items() if p.requires_grad}
    assert all(torch.equal(p, theirs[name]) for name, p in trained.items())
    whole = dict(plain_weights(plain))
    assert all(torch.equal(local(p), whole[n][slice(*held_rows(p))]) for n, p in plain_weights(adapted))


def scored(folder: Path, team: Team) -> list[Any]:
    """Score pairs of this rank, of which ranks have different numbers and the last has none."""
    frozen = open_frozen(str(folder), SETTINGS, team)
    assert frozen.shared
    return [
        [pair.reference_chosen, pair.reference_rejected]
        for pair in score_reference(frozen.lm.model, pairs_of(team.rank, team.size), "padded", 40, team)
    ]


def pairs_of(rank: int, size: int) -> list[TokenizedPair]:
    count = 0 if rank == size - 1 else 5 + rank
    ids = [tuple(range(4 + i, 9 + 2 * i)) for i in range(count)]
    return [TokenizedPair(f"{rank}-{i}", t, t[::-1], t[1:], None, None, None, 1.0) for i, t in enumerate(ids)]


def peaks(folder: Path, team: Team) -> dict[str, float]:
    """Return the most memory that loading and saving took, MiB above what was there."""
    before = forget_peak()
    lm, checkpoint = load(folder, team)
    loading = peak_above(before)
    held = forget_peak()
    export_pieces(lm.model, lm.tokenizer, folder / "out", "", checkpoint, write=team.main)
    return {"loading": loading, "saving": peak_above(held)}


def alone(folder: Path) -> dict[str, float]:
    """Return the most memory that the whole policy takes in one process, every weight of it read, MiB."""
    before = forget_peak()
    model = open_trainable(str(folder), SETTINGS, ALONE, print).lm.model
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return {"loading": peak_above(before)}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with joined() as team:
        if team.size == 1:
            (folder / "found-0-of-1.json").write_text(json.dumps(alone(folder / LARGE)))
            return
        found: dict[str, Any] = {"peaks": peaks(folder / LARGE, team), "scored": scored(folder / "llama", team)}
        for policy in sorted(folder.iterdir()):
            if policy.is_dir() and policy.name != LARGE:
                check_weights(policy, team)
        check_adapter(folder / "gpt2", team)
    (folder / f"found-{team.rank}-of-{team.size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
