"""TRL's side: `DPOTrainer` set up as it does best, alone and in a loop with transformers' `generate`."""

import tempfile
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.kernels import ChunkedLogProbFunction
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from benchmarks.meter import Meter, build_model, head_inputs
from benchmarks.plain import generate, load_stories
from benchmarks.records import Measurement, Options
from benchmarks.specs import HeadSpec, LoopSpec, TrainSpec, token_pairs, useful_flops, useful_tokens
from benchmarks.stories import round_prompts

BETA = 0.1
TRL_HEAD_CHUNK = 32_768
"""Vocabulary entries of one tile of TRL's head: the constant that its trainers use."""


class TokenTrainer(DPOTrainer):
    """TRL's trainer on rows that hold token ids already: the same ids that prefloop gets."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class StepClock(TrainerCallback):
    """Times the trainer's loop: from the end of its first step, which warms up, to that of its last."""

    def __init__(self, meter: Meter) -> None:
        """Use `meter`."""
        self.meter = meter

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the end of a step."""
        if state.global_step == 1:
            self.meter.start()
        else:
            self.meter.stop()


def trl_config(folder: str, options: Options, batch: int, learning_rate: float) -> DPOConfig:
    """Return TRL's fastest settings: stored reference, no checkpointing, no logs, no saves, fused AdamW."""
    return DPOConfig(
        output_dir=folder,
        beta=BETA,
        learning_rate=learning_rate,
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        max_length=None,
        bf16=options.device == "cuda",
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=options.device == "cuda",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def train_pairs(spec: TrainSpec, options: Options, accumulated: int = 1, precision: str = "") -> Measurement:
    """Time optimizer steps of `DPOTrainer` after a first one; the reference is scored before."""
    precision = precision or spec.precision
    pairs = token_pairs(spec)
    rows = [{"prompt_ids": list(p), "chosen_ids": list(c), "rejected_ids": list(r)} for p, c, r in pairs]
    lora = LoraConfig(
        r=spec.lora_rank, lora_alpha=2 * spec.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    meter = Meter(options)
    with tempfile.TemporaryDirectory() as folder:
        config = trl_config(folder, options, len(pairs) // accumulated, 1e-6)
        config.num_train_epochs = 1 + spec.steps
        config.gradient_accumulation_steps = accumulated
        config.bf16 = precision == "bf16"
        trainer = TokenTrainer(
            model=build_model(spec.model, options),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=blank_tokenizer(),
            peft_config=lora if spec.lora_rank else None,
            callbacks=[StepClock(meter)],
        )
        trainer.train()
    return meter.measurement(spec.steps * len(pairs), useful_tokens(spec), useful_flops(spec), precision)


def blank_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer that knows padding, beginning and end; the trainer reads no text."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def chunk_head(spec: HeadSpec, options: Options) -> Measurement:
    """Time TRL's own chunked head with the outputs that its DPO trainer asks for."""
    hidden, head, targets = head_inputs(spec, options)
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    meter = Meter(options)
    meter.start()
    scores = ChunkedLogProbFunction.apply(hidden, head.weight, None, targets, 1.0, TRL_HEAD_CHUNK, None, 1.0, outputs)
    scores[0].sum().backward()
    meter.stop()
    return meter.measurement(tokens=spec.tokens)


def run_loop(spec: LoopSpec, options: Options) -> Measurement:
    """Time the loop as a user would write it: generate, VADER, best against worst, `DPOTrainer`; no evaluation."""
    meter = Meter(options)
    _loop(LoopSpec(rounds=1, prompts=16, new_tokens=8), options, Meter(options))
    meter.start()
    found = _loop(spec, options, Meter(options))
    meter.stop()
    return meter.measurement(int(found.pop("pairs")), int(found.pop("tokens")), **found)


def _loop(spec: LoopSpec, options: Options, stage: Meter) -> dict[str, float]:
    """Run the rounds in memory and return counts and seconds by stage."""
    model, tokenizer = load_stories(options)
    totals = dict.fromkeys(("pairs", "tokens", "completions", "seconds sampling", "seconds training"), 0.0)
    for number in range(spec.rounds):
        prompts = [prompt.text for prompt in round_prompts(spec, number, options)]
        stage.start()
        groups = generate(model, tokenizer, prompts, spec)
        stage.stop()
        totals["seconds sampling"] += stage.wall
        totals["completions"] += sum(map(len, groups))
        totals["tokens"] += sum(len(ids) for group in groups for ids in group)
        texts = [tokenizer.batch_decode(group, skip_special_tokens=True) for group in groups]
        rows = best_against_worst(prompts, texts)
        stage.start()
        model = _train_round(model, tokenizer, rows, spec, options)
        stage.stop()
        totals["seconds training"] += stage.wall
        totals["pairs"] += len(rows)
    return totals


def _train_round(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    spec: LoopSpec,
    options: Options,
) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=model,
            args=trl_config(folder, options, spec.pairs_per_step, spec.learning_rate),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    return trainer.model.eval()


def best_against_worst(prompts: list[str], texts: list[list[str]]) -> list[dict[str, str]]:
    """Return one pair for each prompt whose completions differ in VADER's compound score."""
    analyzer = SentimentIntensityAnalyzer()
    rows = []
    for prompt, completions in zip(prompts, texts, strict=True):
        scores = [analyzer.polarity_scores(text)["compound"] for text in completions]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        if scores[best] > scores[worst]:
            rows.append({"prompt": prompt, "chosen": completions[best], "rejected": completions[worst]})
    return rows
