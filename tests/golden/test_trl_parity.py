"""DPO's loss and gradients equal those of TRL's own trainer on the same token ids."""

import copy
import random
import warnings

import pytest
import torch
from datasets import Dataset

import tiny
from prefloop.losses.dpo import DPO
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.rows import TokenizedPair
from prefloop.train.batches import pair_logps

BETA = 0.3


def token_pairs():
    draw = random.Random(0)

    def ids(count):
        return tuple(draw.randrange(4, tiny.BYTE_VOCABULARY) for _ in range(count))

    start = ids(3)
    return [(ids(12), ids(9), ids(5)), (ids(1), start + ids(2), start + ids(8)), (ids(6), ids(1), ids(7))]


@pytest.fixture(scope="module")
def trl_result(tmp_path_factory):
    """Loss and gradients by `DPOTrainer.compute_loss`, with the model and the reference it used."""
    with warnings.catch_warnings():
        # TRL's own: it imports and calls deprecated names of transformers, torch and accelerate.
        warnings.simplefilter("ignore")
        from trl import DPOConfig, DPOTrainer  # noqa: PLC0415  the warnings come with the import

        policy = tiny.tiny_model("llama", tiny.BYTE_VOCABULARY, seed=0)
        reference = tiny.tiny_model("llama", tiny.BYTE_VOCABULARY, seed=1)
        before = copy.deepcopy(policy)
        rows = {"prompt": ["a", "b"], "chosen": ["x", "y"], "rejected": ["z", "w"]}
        trainer = DPOTrainer(
            model=policy,
            ref_model=copy.deepcopy(reference),
            args=DPOConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")),
                beta=BETA,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                report_to="none",
            ),
            train_dataset=Dataset.from_dict(rows),
            processing_class=tiny.byte_tokenizer(chat=False),
        )
        batch = trainer.data_collator(
            [
                {"prompt_ids": list(context), "chosen_ids": list(chosen), "rejected_ids": list(rejected)}
                for context, chosen, rejected in token_pairs()
            ]
        )
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    return loss.detach(), gradients, before, reference


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_loss_and_gradients_equal_those_of_trl(trl_result, layout):
    loss, gradients, model, reference = trl_result
    groups = [TokenGroup(context, (chosen, rejected)) for context, chosen, rejected in token_pairs()]
    with torch.no_grad():
        stored = completion_logps(reference, groups, layout=layout)
    values = [tuple(row[mask].tolist()) for row, mask in zip(stored.token_logps, stored.mask, strict=True)]
    pairs = [
        TokenizedPair(str(i), *ids, values[2 * i], values[2 * i + 1], None, 1.0) for i, ids in enumerate(token_pairs())
    ]
    model.zero_grad()
    ours = DPO(beta=BETA)(pair_logps(model, pairs, layout=layout)).loss.mean()
    ours.backward()
    torch.testing.assert_close(ours.detach(), loss, rtol=1e-5, atol=0)
    assert abs(float(loss) - 0.6931) > 0.05, "the reference should differ from the policy"
    for name, parameter in model.named_parameters():
        gap = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert gap < 1e-5, (name, float(gap))
