"""The policy that self-play starts from: the story model, fine-tuned on the human answers of the training prompts.

SPIN and DNPO presuppose such a policy. The story model as it ships writes on where the human answers end, so that
length alone would tell own answers from human ones.
"""

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from prefloop.inputs import embedded_policy, embedded_prompts
from prefloop.models import causal_lm
from prefloop.models.logps import TokenGroup, completion_logps
from prefloop.prompts.dataset import read_prompts

EPOCHS = 3
RATE = 3e-4
BATCH = 16
SEED = 0


def tuned_policy(folder: Path, holdout: float, limit: int | None) -> str:
    """Return the folder of the fine-tuned policy; makes it if it is not there."""
    path = folder / f"tuned-{limit or 'all'}"
    if path.exists():
        return str(path)
    lm = causal_lm.load(str(embedded_policy()), precision="fp32", device="cpu", cache=False)
    prompts = read_prompts(str(embedded_prompts("embedded")), holdout=holdout, limit=limit).train
    rows = [
        TokenGroup(
            tuple(causal_lm.encode_prompt(lm.tokenizer, prompt)),
            (tuple(causal_lm.encode_completion(lm.tokenizer, prompt.gold or "", stop=True)),),
        )
        for prompt in prompts
    ]
    fine_tune(lm.model, rows)
    unfinished = folder / f"tuned-{os.getpid()}"
    unfinished.mkdir(parents=True)
    causal_lm.export(lm.model, lm.tokenizer, unfinished, CARD)
    try:
        unfinished.rename(path)
    except OSError:  # another process was faster: its policy is the same
        shutil.rmtree(unfinished)
    return str(path)


def fine_tune(model: torch.nn.Module, rows: Sequence[TokenGroup]) -> None:
    """Minimise the mean negative log-prob of the answers' tokens, end token included."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    order = random.Random(SEED)
    for _ in range(EPOCHS):
        shuffled = order.sample(list(rows), len(rows))
        for first in range(0, len(shuffled), BATCH):
            batch = shuffled[first : first + BATCH]
            found = completion_logps(model, batch)
            loss = -(found.total / found.length).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


CARD = "The story model of prefloop, fine-tuned on reference continuations of its training prompts.\n"
