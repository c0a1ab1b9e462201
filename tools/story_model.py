"""The tokenizer and the small Llama of the shipped story model, and their training."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
CONTEXT = 512
IGNORED = -100
# The whole conversation is one story: nothing marks who wrote which part of it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class TrainSettings:
    """Shape and schedule of the story model.

    hidden, layers, heads, mlp: widths of the Llama. tokens: training tokens, padding
    excluded. batch_rows: rows of 512 tokens a step. lr: peak, in AdamW's units for every
    weight (Muon matches AdamW's update size). decay: last part of the run, in which the
    rate falls to zero. save_seconds: time between checkpoints.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 320
    tokens: int = 10_000_000
    batch_rows: int = 16
    lr: float = 0.01
    warmup_steps: int = 50
    decay: float = 0.5
    seed: int = 7
    save_seconds: float = 60.0


def train_tokenizer(stories: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts one BOS in front and never adds EOS."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(stories, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack_stories(stories: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> Tensor:
    """Rows `[row, 512]` of whole `BOS story EOS` runs, right-padded, in random order.

    Every row starts at a story's start, as generation does. First fit in order of
    falling length leaves few gaps; stories longer than a row are dropped.
    """
    encoded = tokenizer(stories, add_special_tokens=False)["input_ids"]
    runs = [[BOS_ID, *ids, EOS_ID] for ids in encoded if len(ids) <= CONTEXT - 2]
    by_space: list[list[list[list[int]]]] = [[] for _ in range(CONTEXT + 1)]
    for run in sorted(runs, key=len, reverse=True):
        space = next((n for n in range(len(run), CONTEXT) if by_space[n]), CONTEXT)
        row = by_space[space].pop() if space < CONTEXT else []
        by_space[space - len(run)].append([*row, run])
    rng = random.Random(seed)
    rows = [row for group in by_space for row in group]
    rng.shuffle(rows)
    packed = torch.full((len(rows), CONTEXT), PAD_ID, dtype=torch.int16)
    for index, row in enumerate(rows):
        rng.shuffle(row)
        ids = [token for run in row for token in run]
        packed[index, : len(ids)] = torch.tensor(ids, dtype=torch.int16)
    return packed


def build_model(settings: TrainSettings, vocab_size: int) -> LlamaForCausalLM:
    """A freshly initialized Llama of the given shape, on the CPU in float32."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
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


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the tied embedding and the gains."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int, settings: TrainSettings) -> float:
    """Learning-rate factor of a step: warm-up, constant, then linear to zero."""
    down = (steps - step) / (settings.decay * steps)
    return min(1.0, (step + 1) / settings.warmup_steps, down)


def batch_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean next-token loss, in nats, of packed `rows` `[row, 512]`; padding left out."""
    ids = rows.long()
    labels = ids[:, 1:].masked_fill(ids[:, 1:] == PAD_ID, IGNORED)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


@dataclass
class _Progress:
    step: int
    tokens: int
    seconds: float


def _save(folder: Path, model: LlamaForCausalLM, optimizers: list, progress: _Progress) -> None:
    save_file({n: p.detach() for n, p in model.named_parameters()}, folder / "weights.part")
    torch.save([o.state_dict() for o in optimizers], folder / "optimizers.part")
    for name in ("weights", "optimizers"):
        (folder / f"{name}.part").replace(folder / f"{name}.ckpt")
    (folder / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")


def _resume(folder: Path, model: LlamaForCausalLM, optimizers: list) -> _Progress:
    if not (folder / "progress.json").exists():
        return _Progress(0, 0, 0.0)
    model.load_state_dict(load_file(folder / "weights.ckpt"), strict=False)
    states = torch.load(folder / "optimizers.ckpt", weights_only=True)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    return _Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))


def _batches(packed: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches, each pass over `packed` in an order of its own."""
    for epoch in range(1_000_000):
        order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(seed + epoch))
        for start in range(0, len(packed) - size + 1, size):
            yield packed[order[start : start + size]]


def train_model(
    packed: Tensor, held: Tensor, vocab_size: int, settings: TrainSettings, folder: Path
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Train on `packed`, resuming from `folder`; returns the model and its figures.

    The log line every 50 steps gives the mean training loss and, with each checkpoint,
    the loss on `held`, both in nats per own token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(settings, vocab_size)
    optimizers = make_optimizers(model, settings.lr)
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    done = _resume(folder, model, optimizers)
    per_step = int((packed != PAD_ID).float().mean() * settings.batch_rows * CONTEXT)
    steps = settings.tokens // per_step
    recent, clock, saved = [], time.monotonic(), time.monotonic()
    for step, rows in enumerate(_batches(packed, settings.batch_rows, settings.seed)):
        if step >= steps:
            break
        if step < done.step:
            continue
        groups = [group for o in optimizers for group in o.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate(step, steps, settings)
        loss = batch_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        now = time.monotonic()
        done = _Progress(step + 1, done.tokens + per_step, done.seconds + now - clock)
        clock = now
        if done.step % 50 == 0:
            mean = sum(recent[-50:]) / len(recent[-50:])
            speed = done.tokens / done.seconds
            print(f"step {done.step}/{steps} loss {mean:.4f} {speed:.0f} tok/s", flush=True)
        if now - saved > settings.save_seconds or done.step == steps:
            _save(folder, model, optimizers, done)
            print(f"step {done.step} held-out loss {held_loss(model, held):.4f}", flush=True)
            saved = clock = time.monotonic()
    figures = {"held_out_nats": held_loss(model, held), **asdict(done)}
    return model, figures


@torch.inference_mode()
def held_loss(model: LlamaForCausalLM, held: Tensor) -> float:
    """Mean of the batch losses over `held`, 16 rows a batch."""
    return float(torch.stack([batch_loss(model, rows) for rows in held.split(16)]).mean())
