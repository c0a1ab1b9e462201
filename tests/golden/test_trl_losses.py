"""Every loss that TRL has too: value and gradient equal those of TRL's own code on the same token ids.

Run with `-s` to see the table of differences.
"""

import copy
import inspect
import random
import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

import tiny
from prefloop.losses.aot import AOT
from prefloop.losses.aot_unpaired import AOTUnpaired
from prefloop.losses.apo_down import APODown
from prefloop.losses.apo_zero import APOZero
from prefloop.losses.apo_zero_unpaired import APOZeroUnpaired
from prefloop.losses.bco import BCO
from prefloop.losses.cpo import CPO
from prefloop.losses.discopop import DiscoPOP
from prefloop.losses.dpo import DPO
from prefloop.losses.exo import EXO
from prefloop.losses.f_dpo import FDPO
from prefloop.losses.hinge import Hinge
from prefloop.losses.ipo import IPO
from prefloop.losses.kto import KTO
from prefloop.losses.ld_dpo import LDDPO
from prefloop.losses.ln_dpo import LNDPO
from prefloop.losses.mixture import Mixture
from prefloop.losses.nca import NCA
from prefloop.losses.orpo import ORPO
from prefloop.losses.robust_dpo import RobustDPO
from prefloop.losses.rpo import RPO
from prefloop.losses.sft import SFT
from prefloop.losses.simpo import SimPO
from prefloop.losses.sppo import SPPO
from prefloop.losses.wpo import WPO
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.protocols import reads_squares, views_of
from prefloop.rows import TokenizedPair, TokenizedView
from prefloop.train.batches import pair_logps
from prefloop.train.reference import score_reference

TOLERANCE = 1e-5
"""Largest allowed relative difference, of the loss and of the gradient of every weight."""
BETA = 0.3
PLAIN = {
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "discopop_tau": 0.05,
    "use_weighting": False,
}
LENGTHS = {
    "mixed": [(6, 5, 3), (3, 2, 6), (4, 1, 4), (1, 5, 2), (4, 3, 3)],
    # Equal chosen lengths, one prompt token: here TRL's mean over the batch's tokens is our mean over pairs, and
    # its likelihood of prompt and completion is that of the completion.
    # Equal lengths: policy and reference order these pairs differently, which is what the AOT losses are about.
    "equal": [(2, 4, 4), (3, 4, 4), (1, 4, 4), (4, 4, 4), (2, 4, 4), (5, 4, 4)],
    "level": [(1, 6, 5), (1, 6, 9), (1, 6, 2)],
}
"""Tokens of context, chosen and rejected."""


def token_pairs(batch):
    draw = random.Random(0)
    return [
        tuple(tuple(draw.randrange(4, tiny.BYTE_VOCABULARY) for _ in range(count)) for count in lengths)
        for lengths in LENGTHS[batch]
    ]


def models():
    """A policy whose distributions are far from uniform, and a reference some nats away from it."""
    policy = tiny.tiny_model("llama", tiny.BYTE_VOCABULARY, seed=0)
    with torch.no_grad():
        policy.get_input_embeddings().weight.mul_(6)
    reference = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * parameter.std() * noise)
    return policy, reference


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """TRL's trainers, the unchanged policy, and our pairs with the reference's log-probs."""
    policy, reference = models()
    with warnings.catch_warnings():
        # TRL's own: it imports and calls deprecated names of transformers, torch and accelerate.
        warnings.simplefilter("ignore")
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer  # noqa: PLC0415  the warnings come with the import
        from trl.experimental.cpo import CPOTrainer  # noqa: PLC0415
        from trl.experimental.orpo import ORPOTrainer  # noqa: PLC0415

        def made(trainer, config, more, **columns):
            folder = str(tmp_path_factory.mktemp("trl"))
            plain = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none"}
            return trainer(
                model=copy.deepcopy(policy),
                ref_model=copy.deepcopy(reference),
                args=config(output_dir=folder, beta=BETA, **plain, **more),
                train_dataset=Dataset.from_dict({"prompt": ["a", "b"], **columns}),
                processing_class=tiny.byte_tokenizer(chat=False),
            )

        trainer = made(DPOTrainer, DPOConfig, {"use_weighting": True}, chosen=["x", "y"], rejected=["z", "w"])
        kto = made(KTOTrainer, KTOConfig, {}, completion=["x", "y"], label=[True, False])
    batches = {}
    for name in LENGTHS:
        pairs = token_pairs(name)
        collated = trainer.data_collator(
            [{"prompt_ids": list(c), "chosen_ids": list(w), "rejected_ids": list(r)} for c, w, r in pairs]
        )
        batches[name] = (collated, scored_pairs(reference, pairs))
    # The methods that compute the loss need only these attributes; the constructors would tokenize text.
    local = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    shared = {"accelerator": local, "is_encoder_decoder": False, "aux_loss_enabled": False, "alpha": 0.0}
    cpo, orpo = CPOTrainer.__new__(CPOTrainer), ORPOTrainer.__new__(ORPOTrainer)
    cpo.__dict__ |= shared | {"pad_token_id": 0}
    orpo.__dict__ |= shared | {"padding_value": 0}
    table = []
    models_of = {"policy": policy, "reference": reference}
    yield SimpleNamespace(dpo=trainer, cpo=cpo, orpo=orpo, kto=kto, **models_of, batches=batches, table=table)
    sys.stdout.write(f"\n{'TRL':<36} {'ours':<16} {'loss':>9} {'relative':>9} {'gradient':>9}\n")
    for theirs, ours, value, relative, gradient in table:
        sys.stdout.write(f"{theirs:<36} {ours:<16} {value:>9.5f} {relative:>9.1e} {gradient:>9.1e}\n")


def scored_pairs(reference, pairs):
    groups = [TokenGroup(context, (chosen, rejected)) for context, chosen, rejected in pairs]
    with torch.no_grad():
        stored = completion_logps(reference, groups, layout="padded")
    values = [tuple(row[mask].tolist()) for row, mask in zip(stored.token_logps, stored.mask, strict=True)]
    return [TokenizedPair(str(i), *ids, values[2 * i], values[2 * i + 1], None, 1.0) for i, ids in enumerate(pairs)]


def ours(trl, loss, pairs):
    model = trl.policy
    model.zero_grad()
    value = loss(pair_logps(model, pairs, "padded", loss.needs_reference, views_of(loss), reads_squares(loss)))
    value.loss.mean().backward()
    return value.loss.mean().item(), {name: p.grad for name, p in model.named_parameters()}


def compare(trl, name, loss, batch, value, gradients):
    compare_on(trl, name, loss, trl.batches[batch][1], value, gradients)


def compare_on(trl, name, loss, pairs, value, gradients):
    mine, my_gradients = ours(trl, loss, pairs)
    relative = abs(mine - value) / abs(value)
    gaps = {n: float((my_gradients[n] - g).norm() / g.norm()) for n, g in gradients.items()}
    trl.table.append((name, type(loss).__name__, value, relative, max(gaps.values())))
    assert relative < TOLERANCE
    assert max(gaps.values()) < TOLERANCE, max(gaps, key=gaps.get)
    assert all(g.norm() > 0 for g in gradients.values())


MIX = Mixture(
    parts=(
        {"kind": "hinge", "weight": 0.5, "beta": BETA},
        {"kind": "apo_zero", "weight": 2, "beta": BETA},
        {"kind": "ln_dpo", "weight": 0.25, "beta": BETA},
    )
)
MPO = Mixture(
    parts=(
        {"kind": "dpo", "weight": 0.8, "beta": BETA},
        {"kind": "bco", "weight": 0.2, "beta": BETA},
        {"kind": "sft", "weight": 1.0},
    )
)
COUPLED = Mixture(parts=({"kind": "aot", "beta": BETA}, {"kind": "dpo", "weight": 0.5, "beta": BETA}))
CASES = [
    (["sigmoid"], {}, DPO(BETA)),
    (["hinge"], {}, Hinge(BETA)),
    (["ipo"], {}, IPO(BETA)),
    (["exo_pair"], {"label_smoothing": 0.1}, EXO(BETA, 0.1)),
    (["exo_pair"], {"label_smoothing": 1e-3}, EXO(BETA, 1e-3)),
    (["nca_pair"], {}, NCA(BETA)),
    (["robust"], {"label_smoothing": 0.1}, RobustDPO(BETA, 0.1)),
    (["bco_pair"], {}, BCO(BETA)),
    (["sppo_hard"], {}, SPPO(BETA)),
    (["apo_zero"], {}, APOZero(BETA)),
    (["apo_down"], {}, APODown(BETA)),
    (["discopop"], {"discopop_tau": 0.05}, DiscoPOP(BETA, 0.05)),
    (["discopop"], {"discopop_tau": 0.5}, DiscoPOP(BETA, 0.5)),
    (["sigmoid_norm"], {}, LNDPO(BETA)),
    (["sigmoid"], {"f_divergence_type": "reverse_kl"}, FDPO(BETA, "reverse_kl")),
    (["sigmoid"], {"f_divergence_type": "forward_kl"}, FDPO(BETA, "forward_kl")),
    (["sigmoid"], {"f_divergence_type": "js_divergence"}, FDPO(BETA, "js")),
    (["sigmoid"], {"f_divergence_type": "alpha_divergence"}, FDPO(BETA, "alpha", 0.5)),
    (["sigmoid"], {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.0}, FDPO(BETA, "alpha", 0.0)),
    (["sigmoid"], {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, FDPO(BETA, "alpha", 1.0)),
    (["sigmoid"], {"ld_alpha": 0.0}, LDDPO(BETA, 0.0)),
    (["sigmoid"], {"ld_alpha": 0.5}, LDDPO(BETA, 0.5)),
    (["sigmoid"], {"ld_alpha": 1.0}, LDDPO(BETA, 1.0)),
    (["sigmoid"], {"use_weighting": True}, WPO(BETA, cap=False)),
    (["hinge", "apo_zero", "sigmoid_norm"], {"loss_weights": [0.5, 2.0, 0.25]}, MIX),
]
EQUAL_CASES = [
    (["aot"], {}, AOT(BETA)),
    (["aot"], {"label_smoothing": 0.2}, AOT(BETA, 0.2)),
    (["aot_unpaired"], {}, AOTUnpaired(BETA)),
    (["aot_unpaired"], {"label_smoothing": 0.2}, AOTUnpaired(BETA, 0.2)),
    (["aot", "sigmoid"], {"loss_weights": [1.0, 0.5]}, COUPLED),
]
LEVEL_CASES = [
    (["sft"], {}, SFT()),
    (["sigmoid", "sft"], {"loss_weights": [1.0, 0.7]}, RPO(BETA, 0.7)),
    (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}, MPO),
]
BATCHES = {"mixed": CASES, "equal": EQUAL_CASES, "level": LEVEL_CASES}


def label(types, settings):
    return "+".join(types) + "".join(f" {v}" for k, v in settings.items() if k != "loss_weights")


@pytest.mark.parametrize(
    ("batch", "types", "settings", "loss"),
    [(batch, *case) for batch, cases in BATCHES.items() for case in cases],
    ids=[label(types, settings) for cases in BATCHES.values() for types, settings, _ in cases],
)
def test_loss_and_gradients_equal_those_of_dpo_trainer(trl, batch, types, settings, loss):
    trainer = trl.dpo
    trainer.loss_types = types
    for name, value in (PLAIN | {"loss_weights": [1.0] * len(types)} | settings).items():
        setattr(trainer.args if name == "discopop_tau" else trainer, name, value)
    trainer.model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = trainer.compute_loss(trainer.model, trl.batches[batch][0])
    theirs.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    compare(trl, label(types, settings), loss, batch, theirs.item(), gradients)


def concatenable(pairs):
    """A batch as the CPO and ORPO trainers read it: prompt and completion together, labels on the completion."""
    batch = {}
    for side, index in (("chosen", 1), ("rejected", 2)):
        rows = [pair[0] + pair[index] for pair in pairs]
        labels = [(-100,) * len(pair[0]) + pair[index] for pair in pairs]
        batch[f"{side}_input_ids"] = pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
        batch[f"{side}_attention_mask"] = pad_sequence([torch.ones(len(r)).long() for r in rows], batch_first=True)
        batch[f"{side}_labels"] = pad_sequence([torch.tensor(r) for r in labels], True, padding_value=-100)
    return batch


CPO_CASES = [
    ("mixed", {"loss_type": "sigmoid", "cpo_alpha": 0.0}, CPO(BETA, 0.0)),
    ("level", {"loss_type": "sigmoid", "cpo_alpha": 1.0}, CPO(BETA, 1.0)),
    ("mixed", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.375, "beta": 2.5}, SimPO(2.5, 1.375)),
    (
        "mixed",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 2.0, "label_smoothing": 0.1},
        SimPO(2.0, 0.5, 0.1),
    ),
]


@pytest.mark.parametrize(
    ("batch", "settings", "loss"),
    CPO_CASES,
    ids=["cpo sigmoid", "cpo sigmoid alpha 1", "cpo simpo", "cpo simpo smoothed"],
)
def test_loss_and_gradients_equal_those_of_cpo_trainer(trl, request, batch, settings, loss):
    trl.cpo.__dict__ |= {"beta": BETA, "label_smoothing": 0.0} | settings
    compare(trl, request.node.callspec.id, loss, batch, *theirs_of(trl.cpo, trl.policy, batch))


def test_loss_and_gradients_equal_those_of_orpo_trainer(trl):
    """TRL takes the likelihood of prompt and completion: equal only where the prompt is one token."""
    trl.orpo.beta = BETA
    compare(trl, "orpo", ORPO(BETA), "level", *theirs_of(trl.orpo, trl.policy, "level"))


def theirs_of(trainer, model, batch):
    model.zero_grad()
    loss, _ = trainer.get_batch_loss_metrics(model, concatenable(token_pairs(batch)))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


# Which completion each prompt's view holds, by rows: TRL's own rotation by one, and one that leads to another z₀.
KTO_CASES = [
    ("kto", 1, {}, KTO(BETA)),
    ("kto", 2, {}, KTO(BETA)),
    ("kto", 2, {"desirable_weight": 1.3, "undesirable_weight": 0.6}, KTO(BETA, 1.3, 0.6)),
    ("apo_zero_unpaired", 1, {}, APOZeroUnpaired(BETA)),
    ("apo_zero_unpaired", 1, {"desirable_weight": 1.3, "undesirable_weight": 0.6}, APOZeroUnpaired(BETA, 1.3, 0.6)),
]


def unpaired(trl, shift):
    """The mixed batch as rows of one completion each, and what TRL's collator reads: every third one is bad."""
    rows = [(c, (w, r)[i % 3 == 2], i % 3 != 2) for i, (c, w, r) in enumerate(token_pairs("mixed"))]
    examples, pairs = [], []
    for i, (context, tokens, good) in enumerate(rows):
        other = rows[i - shift][1]
        examples.append({"prompt_ids": list(context), "completion_ids": list(tokens), "label": good})
        examples[-1]["KL_completion_ids"] = list(other)
        view = TokenizedView("mismatched", context, other, None)
        sides = (tokens, ()) if good else ((), tokens)
        pairs.append(TokenizedPair(str(i), context, *sides, None, None, None, 1.0, (view,)))
    return examples, score_reference(trl.reference, pairs, "padded", 10_000)


@pytest.mark.parametrize(("loss_type", "shift", "settings", "loss"), KTO_CASES)
def test_loss_and_gradients_equal_those_of_kto_trainer(trl, loss_type, shift, settings, loss):
    trainer = trl.kto
    examples, pairs = unpaired(trl, shift)
    for name, value in ({"desirable_weight": 1.0, "undesirable_weight": 1.0} | settings).items():
        setattr(trainer, name, value)
    trainer.loss_type, trainer.calculate_KL = loss_type, loss_type == "kto"
    trainer.model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    theirs.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    compare_on(trl, label([loss_type], settings), loss, pairs, theirs.item(), gradients)


def test_the_mismatched_completions_move_the_reference_point(trl):
    """Without this the parity of KTO would be that of unpaired APO-zero."""
    found = []
    for shift in (1, 2):
        logps = pair_logps(trl.policy, unpaired(trl, shift)[1], "padded", views=("mismatched",))
        found.append(KTO(BETA)(logps).extra["z0"][0].item())
    assert max(found) > 0.1
    assert found[0] != found[1]


def named_in(method, attribute):
    """The values that a method of TRL compares `attribute` with."""
    return set(re.findall(rf'{attribute} == "(\w+)"', inspect.getsource(method)))


def test_every_loss_and_divergence_of_trl_is_compared(trl):
    """The lists are read from TRL's own code, so that a new version with more of them fails here."""
    cases = [(types, settings) for cases in BATCHES.values() for types, settings, _ in cases]
    compute = type(trl.dpo)._compute_loss
    losses = named_in(compute, "loss_type")
    assert len(losses) == 15
    assert losses == {name for types, _ in cases for name in types}
    divergences = {settings["f_divergence_type"] for _, settings in cases if "f_divergence_type" in settings}
    assert named_in(compute, "f_divergence_type") == divergences
    assert named_in(type(trl.kto)._compute_loss, "loss_type") == {case[0] for case in KTO_CASES}
    assert any("ld_alpha" in settings for _, settings in cases)
    assert any(len(types) > 1 for types, _ in cases)


def test_odds_ratio_term_equals_trl(trl):
    """The odds-ratio term on any lengths: ours less its likelihood, against `odds_ratio_loss` on mean log-probs."""
    trl.orpo.beta = BETA
    logps = pair_logps(trl.policy, trl.batches["mixed"][1], layout="padded", needs_reference=False)
    theirs, *_ = trl.orpo.odds_ratio_loss(logps.policy_chosen.mean, logps.policy_rejected.mean)
    mine = ORPO(BETA)(logps).loss - ORPO(0.0)(logps).loss
    torch.testing.assert_close(mine, -theirs, rtol=TOLERANCE, atol=1e-6)


def test_the_pairs_can_tell_losses_apart(trl):
    """Log-ratios of nats, and another order of margins under policy than under reference."""
    logps = pair_logps(trl.policy, trl.batches["equal"][1], layout="padded")
    chosen, rejected = logps.log_ratios()
    assert (chosen - rejected).abs().mean() > 0.5
    policy = logps.policy_chosen.total - logps.policy_rejected.total
    reference = logps.reference_chosen.total - logps.reference_rejected.total
    assert policy.argsort().tolist() != reference.argsort().tolist()
    assert chosen.argsort().tolist() != rejected.argsort().tolist()
