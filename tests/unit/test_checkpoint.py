import pytest
import torch

from prefloop.errors import CorruptArtifact
from prefloop.rows import StepLog
from prefloop.train.checkpoint import TrainingState, optimizer_moments, restore_moments, save_state
from tiny import newest

CPU = torch.device("cpu")


def state(step: int) -> TrainingState:
    row = StepLog(step, 0.5, 0.69, 0, 0, 0, 0.5, 0.5, -1, -2, 1.0, 1e-3)
    return TrainingState(step, {"w": torch.full((2, 3), float(step))}, {"w.step": torch.tensor(1.0)}, (row,))


def test_the_newest_state_is_loaded_and_two_are_kept(tmp_path):
    for step in (1, 2, 3):
        save_state(tmp_path, state(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    found = newest(tmp_path, CPU)
    assert found.step == 3
    assert found.weights["w"].equal(torch.full((2, 3), 3.0))
    assert found.steps == state(3).steps


@pytest.mark.parametrize("name", ["weights.safetensors", "moments.safetensors", "steps.parquet", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "delete", "zero"])
def test_a_damaged_state_is_set_aside_and_the_one_before_is_used(tmp_path, name, damage):
    for step in (1, 2):
        save_state(tmp_path, state(step))
    path = tmp_path / "step-00000002" / name
    data = path.read_bytes()
    path.unlink()
    if damage != "delete":
        path.write_bytes(data[:-3] if damage == "truncate" else bytes(len(data)))
    assert newest(tmp_path, CPU).step == 1
    assert (tmp_path / "step-00000002.damaged-1").is_dir()


def test_no_state_is_none(tmp_path):
    assert newest(tmp_path, CPU) is None


def test_moments_go_back_by_name():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.sum().backward()
    optimizer.step()
    moments = optimizer_moments(optimizer, {parameter: "layer.w"})
    assert set(moments) == {"layer.w.step", "layer.w.exp_avg", "layer.w.exp_avg_sq"}
    fresh = torch.optim.AdamW([parameter], fused=True)
    restore_moments(fresh, {parameter: "layer.w"}, moments)
    assert fresh.state[parameter]["exp_avg"].equal(optimizer.state[parameter]["exp_avg"])


def test_missing_moments_are_an_error_not_a_silent_restart():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    with pytest.raises(CorruptArtifact, match=r"no optimizer moments for layer\.w"):
        restore_moments(optimizer, {parameter: "layer.w"}, {})
