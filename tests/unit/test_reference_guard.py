"""A reference that changes while a round trains is noticed: on disk, in memory, and in its stored log-probs."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from prefloop.errors import CorruptArtifact, TrainingDiverged
from prefloop.losses.dpo import DPO
from prefloop.models import causal_lm
from prefloop.reference_guard import unchanged_reference
from prefloop.rows import PolicyRef, TokenizedPair
from prefloop.team import ALONE
from prefloop.train.job import Job
from prefloop.train.reference import score_reference
from prefloop.train.settings import TrainSettings
from tiny import save_tiny_policy

TRAIN = TrainSettings(device="cpu")
RUN = SimpleNamespace(
    recipe=SimpleNamespace(train=TRAIN, trainer=SimpleNamespace(kind="update"), loss=SimpleNamespace(kind="dpo")),
    team=ALONE,
)


@pytest.fixture
def round_(tmp_path):
    folder = save_tiny_policy(tmp_path / "policy")
    reference = PolicyRef(str(folder), causal_lm.folder_digest(folder), 0)
    pairs = [TokenizedPair(f"p{i}", (5, 6), (7, 8 + i), (9,), None, None, None, 1.0) for i in range(40)]
    stored = score_reference(causal_lm.load(str(folder), device="cpu").model, pairs, "padded", 500)
    trained = causal_lm.load(str(folder), device="cpu", cache=False).model
    job = Job(trained, stored, DPO(), TRAIN, "padded", 0, tmp_path / "5-policy" / ".state", reference, True)
    yield folder, reference, job
    causal_lm.forget()


def test_training_the_policy_is_no_change_of_the_reference(round_):
    _, reference, job = round_
    with unchanged_reference(RUN, reference, job), torch.no_grad():
        for parameter in job.model.parameters():
            parameter.add_(1)
    with unchanged_reference(RUN, None, job):
        pass


def test_changed_files_are_named_before_and_after(round_):
    folder, reference, job = round_
    guard = unchanged_reference(RUN, reference, job)
    with pytest.raises(CorruptArtifact, match="policy: the reference's files changed after training"), guard:
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(CorruptArtifact, match="changed before training"), unchanged_reference(RUN, reference, job):
        pass


def test_a_weight_changed_in_memory_is_named(round_):
    folder, reference, job = round_
    shared = causal_lm.load(str(folder), device="cpu").model
    told = pytest.raises(TrainingDiverged, match=r"changed the reference: reference model\.norm\.weight")
    with told, unchanged_reference(RUN, reference, job), torch.no_grad():
        shared.model.norm.weight[0] += 1e-6


def test_a_frozen_base_below_an_adapter_is_watched_too(round_):
    _, reference, job = round_
    frozen = job.model.model.embed_tokens.weight.requires_grad_(False)
    told = pytest.raises(TrainingDiverged, match=r"changed the reference: model\.embed_tokens\.weight")
    with told, unchanged_reference(RUN, reference, job), torch.no_grad():
        frozen[3, 3] = 0


def test_stored_log_probs_of_another_model_are_refused(round_):
    _, reference, job = round_
    wrong = [dataclasses.replace(p, reference_chosen=tuple(v - 0.01 for v in p.reference_chosen)) for p in job.pairs]
    told = pytest.raises(CorruptArtifact, match=r"stored log-probs of the reference differ from live ones by 0\.01")
    with told, unchanged_reference(RUN, reference, dataclasses.replace(job, pairs=wrong)):
        pass
