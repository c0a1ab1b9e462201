"""The tokenizer and the small Llama of the shipped sums model, and their training."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from story_model import IGNORED, make_optimizers, rate
from sums_problems import careless_solution, questions

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
PAD_ID, BOS_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2, 3
WORDS = ("Step", "Answer", "Q")
# Every other character is a token of its own, so that a text may be cut anywhere without changing the tokens before
# the cut: a prefix that ends in `Step 2:` encodes as it does inside a whole solution.
CHARACTERS = "0123456789 \n+-=?:"
CONTEXT = 256
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'].rstrip('\\n') }}\n{% endfor %}"


@dataclass(frozen=True)
class SumsSettings:
    """Shape and schedule of the sums model.

    hidden, layers, heads, mlp: widths of the Llama. steps: optimizer steps. batch: problems a
    step, all with the same count of numbers. lr: peak, as in `story_model.TrainSettings`. decay: last part of the run,
    in which the rate falls to zero.
    """

    hidden: int = 96
    layers: int = 4
    heads: int = 4
    mlp: int = 256
    steps: int = 450
    batch: int = 64
    lr: float = 0.01
    warmup_steps: int = 50
    decay: float = 0.3
    seed: int = 11


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words and single characters that puts one BOS in front and never adds EOS."""
    pieces = [PAD, BOS, EOS, UNKNOWN, *CHARACTERS, *WORDS]
    core = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*WORDS, r"[\s\S]"])), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(settings: SumsSettings, vocabulary: int) -> LlamaForCausalLM:
    """A freshly initialized Llama of the given shape, on the CPU in float32."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        initializer_range=settings.hidden**-0.5 / 2,
    )
    return LlamaForCausalLM(config)


def batches(settings: SumsSettings, without: frozenset[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[Tensor]:
    """Endless batches of token ids and labels, `[2, problem, token]`; only the solution and EOS have labels."""
    stream, writer = questions(settings.seed, without), random.Random(settings.seed + 1)
    while True:
        # The stream goes round the counts of numbers, so that every third question has the same count.
        drawn = [next(stream) for _ in range(3 * settings.batch)]
        for turn in range(3):
            asked = drawn[turn::3]
            yield _rows(asked, [careless_solution(q, writer) + EOS for q in asked], tokenizer)


def _rows(asked: list[str], written: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    before = tokenizer(asked)["input_ids"]
    after = tokenizer(written, add_special_tokens=False)["input_ids"]
    width = max(len(b) + len(a) for b, a in zip(before, after, strict=True))
    rows = torch.full((2, len(asked), width), PAD_ID)
    rows[1] = IGNORED
    for index, (b, a) in enumerate(zip(before, after, strict=True)):
        rows[0, index, : len(b) + len(a)] = torch.tensor(b + a)
        rows[1, index, len(b) : len(b) + len(a)] = torch.tensor(a)
    return rows


def train_model(
    settings: SumsSettings, without: frozenset[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Train on fresh problems, none of `without`; returns the model and its figures, the loss in nats per token."""
    model = build_model(settings, len(tokenizer))
    optimizers = make_optimizers(model, settings.lr)
    groups = [group for o in optimizers for group in o.param_groups]
    peaks = [group["lr"] for group in groups]
    losses, tokens, start = [], 0, time.monotonic()
    for step, (ids, labels) in zip(range(settings.steps), batches(settings, without, tokenizer), strict=False):
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate(step, settings.steps, settings)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        tokens += int((ids != PAD_ID).sum())
        if (step + 1) % 50 == 0:
            mean = sum(losses[-50:]) / 50
            print(f"step {step + 1}/{settings.steps} loss {mean:.4f} {time.monotonic() - start:.0f} s", flush=True)
    seconds = time.monotonic() - start
    return model.eval(), {"last_loss": sum(losses[-50:]) / len(losses[-50:]), "tokens": tokens, "seconds": seconds}
