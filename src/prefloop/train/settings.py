"""How the policy is updated: the settings that trainers read. Torch-free, so that recipes can be read without it."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class LoraSettings(BaseModel):
    """Train a low-rank adapter instead of all weights (arXiv 2106.09685)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update of each matrix."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers to adapt, or `all-linear` (the LM head is never adapted)."""


class TrainSettings(BaseModel):
    """How the policy is updated on a round's pairs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    learning_rate: Annotated[float, Field(gt=0)] = 5e-7
    """Peak learning rate of AdamW."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the round's pairs."""
    pairs_per_step: Annotated[int, Field(ge=1)] = 64
    """Pairs of one optimizer step, over all microbatches."""
    tokens_per_microbatch: Annotated[int, Field(ge=1)] = 8192
    """Token budget of one forward and backward pass. Changes memory, never the result beyond rounding."""
    keep_prompts_together: bool = True
    """Pairs of one prompt follow each other and share its computation; false: every pair is shuffled on its own."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: kept, or brought to 0 at the last step."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of steps over which the learning rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator constant."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay on matrices; vectors are not decayed."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients of a larger norm are scaled down to it. None: never."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Matrix products in bfloat16 (weights stay float32) or float32. auto: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    """auto: the first GPU if there is one; or cpu, cuda, cuda:1."""
    layout: Literal["auto", "padded", "packed", "shared"] = "auto"
    """How pairs lie in a microbatch. auto: the fastest that the architecture takes. Same result in each."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    sharding: Literal["auto", "replicate", "full", "hybrid"] = "auto"
    """With several ranks: replicate keeps all weights on each; full gives each some rows of weights and moments
    (FSDP2); hybrid does so within a machine and replicates across machines. auto: full on GPUs, replicate on CPUs.
    Same result in each; a LoRA adapter is always replicated. One process has nothing to share."""
    compile: bool = False
    """torch.compile of the decoder layers; attention along shared prompts and the LM head stay as they are. On a CPU
    it gains a few percent and costs up to a minute in each round, so it is for long rounds. Needs a C++ compiler."""
    max_tokens: Annotated[int, Field(ge=2)] = 2048
    """Pairs whose prompt plus longer completion exceeds this are dropped, and counted in the report."""
    reference_cache: str | None = None
    """Folder that keeps the reference's log-probs for other runs and rounds with the same reference and pairs. None:
    they are kept in the run's folder only."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 100
    """Steps between training states on disk, from which a stopped run goes on."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """Updates of a round that may be left out because loss or gradient is not finite; each is told and counted in the
    report, and one more ends the run. 0: the first one ends it. Above 0, a GPU is waited for at every step."""
    waive_state: tuple[Literal["weights", "moments", "carried"], ...] = ()
    """Parts that a training state may lack when a stopped round goes on: its weights, the optimizer's moments, or what
    a trainer carries beside them. They then begin afresh, and the result is not that of an uninterrupted run; facts of
    5-policy count them. Empty: a missing part is an error."""
    log_every: Annotated[int, Field(ge=1)] = 1
    """Steps between rows of the training curve."""
    lora: LoraSettings | None = None
    """Train a LoRA adapter. None: all weights."""
    remedy: Literal["none", "auto"] = "none"
    """auto: once a round's diagnosis names degradation (chosen completions fall, and nothing shows that this is
    harmless), the rounds after it train with a loss that holds them up; see `prefloop.evaluate.remedies`."""
