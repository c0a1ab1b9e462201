"""Rivals that need nothing but torch and transformers: `generate`, and the head with all its logits."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.meter import Meter, head_inputs
from benchmarks.records import Measurement, Options
from benchmarks.specs import HeadSpec, LoopSpec
from benchmarks.stories import round_prompts, story_model

GENERATED_PROMPTS = 64
"""Prompts of one call of `generate`: with 4 completions each the fastest of 16, 64 and 256 on a CPU core."""


def materialise_head(spec: HeadSpec, options: Options) -> Measurement:
    """Time the plain head forward and backward: all logits, log-softmax, gather."""
    hidden, head, targets = head_inputs(spec, options)
    meter = Meter(options)
    meter.start()
    head(hidden).float().log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    meter.stop()
    return meter.measurement(tokens=spec.tokens)


def load_stories(options: Options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the story model and its tokenizer, ready to generate."""
    folder = story_model(options)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], spec: LoopSpec
) -> list[list[list[int]]]:
    """Return the token ids of each prompt's completions, without padding; the beginning token ends one too."""
    stops = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    found: list[list[list[int]]] = []
    for first in range(0, len(prompts), GENERATED_PROMPTS):
        batch = tokenizer(prompts[first : first + GENERATED_PROMPTS], padding=True, return_tensors="pt")
        output = model.generate(
            input_ids=batch.input_ids.to(model.device),
            attention_mask=batch.attention_mask.to(model.device),
            do_sample=True,
            top_k=0,
            max_new_tokens=spec.new_tokens,
            num_return_sequences=spec.completions,
            eos_token_id=sorted(stops),
            pad_token_id=tokenizer.pad_token_id,
        )
        rows = [_until_stop(row, stops) for row in output[:, batch.input_ids.shape[1] :].tolist()]
        found += [rows[i : i + spec.completions] for i in range(0, len(rows), spec.completions)]
    return found


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    end = next((n for n, token in enumerate(ids, 1) if token in stops), len(ids))
    return ids[:end]


def sample(spec: LoopSpec, options: Options) -> Measurement:
    """Time sampling of one round's completions by `generate(num_return_sequences=K)`."""
    model, tokenizer = load_stories(options)
    prompts = [prompt.text for prompt in round_prompts(spec, 0, options)]
    generate(model, tokenizer, prompts[:4], LoopSpec(new_tokens=4))
    meter = Meter(options)
    meter.start()
    groups = generate(model, tokenizer, prompts, spec)
    meter.stop()
    completions = [ids for group in groups for ids in group]
    return meter.measurement(tokens=sum(map(len, completions)), completions=len(completions))
