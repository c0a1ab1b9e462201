import pytest
import torch

from prefloop.models.training import checkpoint_activations
from tiny import tiny_model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_activations_are_recomputed_and_gradients_stay(architecture):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model(architecture).requires_grad_(True)
        layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        count: list[int] = []
        layers[0].register_forward_pre_hook(lambda *_, seen=count: seen.append(1))
        inner = next(
            m for m in layers[0].modules() if isinstance(m, (torch.nn.Linear,)) or "Conv1D" in type(m).__name__
        )
        inner.register_forward_pre_hook(lambda *_, seen=count: seen.append(1))
        if checkpointing:
            checkpoint_activations(model)
        model(torch.arange(4, 20)[None], use_cache=False).logits.logsumexp(-1).sum().backward()
        calls.append(len(count))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert calls[1] > calls[0]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_dropout_is_off():
    model = tiny_model("gpt2")
    model.transformer.drop.p = 0.5
    checkpoint_activations(model)
    ids = torch.arange(4, 20)[None]
    assert model(ids).logits.equal(model(ids).logits)
