"""Sampling at OpenAI-compatible endpoints: vLLM, SGLang, llama.cpp, `transformers serve`, or hosted."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from prefloop.endpoint import FATAL, Address, Trouble, offer
from prefloop.errors import ConfigError, SamplerError
from prefloop.protocols import RoundContext
from prefloop.rows import Completion, PolicyRef, Prompt, SampleGroup, digest_of
from prefloop.sample._server_asking import Asking
from prefloop.sample._server_hold import Hold, Serving
from prefloop.sample._server_lanes import Lane, Lanes
from prefloop.sample._server_reader import Reader
from prefloop.sample._server_site import Site
from prefloop.sample._server_update import KINDS, tell_of
from prefloop.sample._server_wire import LEVEL_REFUSED, Drawn, Wanted, request_of
from prefloop.sample.hf import stream_seed

POLICY = "policy"
"""What `model` is called to let the endpoint serve the round's own policy, by its folder."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Server:
    """Draw completions at one or several OpenAI-compatible endpoints.

    A plain-text prompt goes to /v1/completions, a conversation to /v1/chat/completions, where the server applies the
    chat template. With `model: policy` the endpoint is asked for the model by the policy's absolute folder:
    `transformers serve` loads that by itself, `vllm serve FOLDER` offers it under that name. Each round has another
    policy: `update` tells vLLM and SGLang of it; another server that holds one model has to be started anew.

    Token ids and log-probs are kept where the server says them for certain (vLLM: `return_token_ids`); else the
    trainer encodes the text. Ids of the prompt or the completion that are not the policy's own stop the run. Whether
    the log-probs are the policy's is measured before they are used: see `sampler_gap` in 4-batches.

    An endpoint that is down is tried again, and other ones take over meanwhile; what was answered is not asked again.
    A server need not draw the same for the same seed: then a part that is drawn again differs.

    Raises:
        ConfigError: a field is out of range, an address is none, or the key's variable or the `openai` package is
            missing.

    """

    base_url: str | tuple[str, ...]
    """Address of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1, or several that serve one model."""
    model: str = POLICY
    """`policy` (default): the policy that the round samples from, by its folder. Or a name under which the endpoints
    serve a fixed model, another one than the policy: its texts are used without ids, and held-out prompts refused."""
    update: str | tuple[str, ...] = "none"
    """How servers get each round's policy. `none` (default): they are asked for its folder. `vllm`, `sglang`: told over
    HTTP to load its LoRA adapter, or else its folder. `auto`: found out. Or a command, a list of words with {path},
    {adapter} and {url}, for a server that does not list the policy's folder; no shell sees it. See docs/servers.md."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the endpoints' key. Default: no key is sent."""
    completions: int = 4
    """K: completions for each prompt, ≥ 1."""
    max_new_tokens: int = 256
    """Most tokens of one completion, the end token included, ≥ 1."""
    temperature: float = 1.0
    """Divides the logits, ≥ 0; 0 takes the most probable token."""
    top_p: float = 1.0
    """Nucleus, in (0, 1]; 1: all tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion. Servers leave them out of the text."""
    per_request: int = 1
    """Completions asked for in one request, n, ≥ 1. 1 (default): every completion has a seed of its own, on any
    server. More save the prompt's computation where the server does not keep prefixes; then the seed is the first
    one's, and a server that returns fewer is asked for the rest."""
    check_model: bool = True
    """Refuse a model that the endpoint does not list; a folder is never looked up."""
    concurrency: int = 32
    """Requests under way at a time, at each endpoint, ≥ 1."""
    timeout: float = 600.0
    """Seconds to wait for the server's next bytes, > 0. A completion comes as a whole, so this bounds its time."""
    patience: float = 120.0
    """Seconds for which all endpoints may be down or busy, ≥ 0; then the run stops, to be resumed."""
    retries: int = 6
    """Attempts of one request after the first that was answered with an error such as HTTP 500, ≥ 0. 429 and 503 do not
    count: they are waited out, up to `patience`."""

    without_effect: ClassVar[tuple[str, ...]] = (
        *("base_url", "api_key_env", "check_model", "update"),
        *("concurrency", "timeout", "patience", "retries"),
    )
    """Settings that change no completion, so that a run may go on at another address."""

    def __post_init__(self) -> None:
        for name, holds, rule in self._rules():
            if not holds:
                raise ConfigError(f"sampler.{name} (sample/server.py): must be {rule}, got {getattr(self, name)!r}")
        self._addresses()

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        yield "base_url", bool(self.base_url), "an address, or a list of them"
        yield "model", bool(self.model.strip()), "policy, or the model's name at the endpoint"
        told = self.update[:1] != ("",) if isinstance(self.update, tuple) else self.update in KINDS
        yield "update", bool(self.update) and told, f"{', '.join(KINDS)}, or a command as a list of words"
        fixed = self.model != POLICY and self.update != "none"
        yield "update", not fixed, f"none with model={self.model}, which is the same in every round"
        for name in ("completions", "max_new_tokens", "per_request", "concurrency"):
            yield name, getattr(self, name) >= 1, "≥ 1"
        yield "temperature", 0 <= self.temperature < math.inf, "≥ 0 (0 is greedy)"
        yield "top_p", 0 < self.top_p <= 1, "in (0, 1]"
        yield "stop", all(self.stop), "strings that are not empty"
        yield "timeout", 0 < self.timeout < math.inf, "a number of seconds > 0"
        yield "patience", self.patience >= 0, "a number of seconds ≥ 0"
        yield "retries", self.retries >= 0, "≥ 0"

    def _addresses(self) -> list[Address]:
        urls = (self.base_url,) if isinstance(self.base_url, str) else self.base_url
        return [Address(url, self.api_key_env, self.timeout, "sampler") for url in urls]

    def __call__(self, prompts: Sequence[Prompt], context: RoundContext) -> list[SampleGroup]:
        """Return one group of `completions` for each prompt, in order.

        Raises:
            ConfigError: an endpoint does not serve the model; or a fixed model is to be measured as if it was the
                policy.
            DataError: a prompt cannot be encoded.
            SamplerError: the endpoints failed for good, or refuse a prompt, or serve another model than the policy.

        """
        if context.round < 0 and self.model != POLICY:
            raise ConfigError(
                f"eval_sampler: {self.model} is one model in every round, so held-out prompts would measure it and not "
                "the policy; set eval_sampler.kind=hf, or eval_sampler.model=policy"
            )
        if not prompts:
            return []
        reader = Reader.of(context) if self.model == POLICY else None
        asked = [self._asked(prompt, reader, context) for prompt in prompts]
        with ExitStack() as stack:
            lanes = Lanes(self._opened(stack, context), self.concurrency, self.patience, self.retries)
            asking = Asking(lanes, self._called, self._refusal, tells=self.update != "none")
            drawn = asking.draw([one for some in asked for one in some])
        found = iter(drawn)
        source = context.policy.digest if reader else self.model
        groups = []
        for prompt, some in zip(prompts, asked, strict=True):
            mine = [one for _ in some for one in next(found)]
            made = [_completion(prompt, index, one, source, context) for index, one in enumerate(mine)]
            if reader:
                reader.check(prompt, mine)
            groups.append(_group(prompt, made, source, context, self))
        self._warn_of_greed(groups)
        return groups

    def _asked(self, prompt: Prompt, reader: Reader | None, context: RoundContext) -> list[Wanted]:
        """Return the requests for one prompt."""
        if prompt.media:
            raise SamplerError(
                f"prompt {prompt.prompt_id} ({prompt.source}): this sampler sends text only, and here are images or "
                "videos; drop the prompt"
            )
        limit = reader.limit(prompt, self.max_new_tokens) if reader else self.max_new_tokens
        return [
            Wanted(
                messages=prompt.messages,
                count=min(self.per_request, self.completions - first),
                limit=limit,
                seed=server_seed(context, prompt, first),
            )
            for first in range(0, self.completions, self.per_request)
        ]

    def _opened(self, stack: ExitStack, context: RoundContext) -> list[Lane]:
        lanes = []
        for address in self._addresses():
            client = stack.enter_context(address.client())
            lanes.append(Lane(address, client, Hold(partial(self._told, Site(address, client), context.policy))))
        return lanes

    def _told(self, site: Site, policy: PolicyRef) -> Serving | Trouble:
        """Return how one endpoint is asked for the model, after it was told of the policy."""
        found = tell_of(self.update)(site, policy) if self.model == POLICY else self._fixed(site)
        if isinstance(found, Trouble):
            if found.status in (401, 403):
                raise SamplerError(site.address.key_refused(found))
            if not found.again and self.update == "none":
                # It has no list of models, and is believed to have this one.
                return Serving(str(Path(policy.path).resolve()) if self.model == POLICY else self.model)
            if not found.again:
                raise SamplerError(f"sampler.update: {site.url} does not say what it serves: {found.why}")
        return found

    def _fixed(self, site: Site) -> Serving | Trouble:
        found = site.address.offered(site.client)
        if isinstance(found, Trouble):
            return found
        if self.check_model and found and self.model not in found and not Path(self.model).is_dir():
            raise ConfigError(
                f"sampler.model: {site.url} has no {self.model!r}{offer(found)}; if it takes models that it does not "
                "list, set sampler.check_model=false"
            )
        return Serving(self.model)

    def _called(self, wanted: Wanted, lane: Lane, level: int, serving: Serving) -> Any:
        decoding: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        if self.stop:
            decoding["stop"] = list(self.stop)
        options = request_of(wanted, decoding, level, dict(serving.extra))
        place = lane.client.chat.completions if wanted.chat else lane.client.completions
        return lane.address.called(lambda: place.with_raw_response.create(model=serving.model, **options))

    def _refusal(self, wanted: Wanted, lane: Lane, found: Trouble) -> str:
        url, model = lane.address.base_url, lane.hold.serving.model if lane.hold.serving else self.model
        if found.status in (401, 403):
            return lane.address.key_refused(found)
        # transformers serve with a model of its own says 400 for any other.
        if found.status in FATAL or (found.status in LEVEL_REFUSED and model in found.why):
            offered = lane.address.offered(lane.client)
            more = "" if isinstance(offered, Trouble) else offer(offered)
            serve = f"; serve it, for example with vllm serve {model}" if self.model == POLICY else ""
            return f"sampler.model: {url} does not answer for {model!r} ({found.why}){more}{serve}"
        shown = wanted.messages[-1].content[:60]
        if found.again:
            return (
                f"sampler.base_url: {url} fails after {self.retries + 1} attempts for the prompt that ends in "
                f"{shown!r}: {found.why}; see to the server and give the same command: finished parts are kept"
            )
        return f"sampler.base_url: {url} refuses the prompt that begins {shown!r}: {found.why}"

    def _warn_of_greed(self, groups: Sequence[SampleGroup]) -> None:
        several = [group for group in groups if len(group.completions) > 1]
        if self.temperature and several and all(len({c.text for c in g.completions}) == 1 for g in several):
            _log.warning(
                "sampler: all completions of a prompt are equal, in each of %d prompts. A server may take the most "
                "probable token whatever the temperature (transformers serve does unless generation_config.json says "
                "do_sample), or give all requests one seed",
                len(several),
            )


def server_seed(context: RoundContext, prompt: Prompt, index: int) -> int:
    """Return the seed of a completion in [0, 2^31): servers take no larger one."""
    return stream_seed(context.seed, context.round, prompt.prompt_id, index) >> 32


def _completion(prompt: Prompt, index: int, drawn: Drawn, source: str, context: RoundContext) -> Completion:
    ours = source == context.policy.digest  # ids of another model mean nothing here
    return Completion(
        completion_id=digest_of(source, context.round, prompt.prompt_id, index),
        text=drawn.text,
        token_ids=drawn.token_ids if ours else None,
        sampler_logps=drawn.logps if ours else None,
        finish_reason=drawn.finish_reason,
        seed=drawn.seed,
        source=source,
    )


def _group(
    prompt: Prompt, made: Sequence[Completion], source: str, context: RoundContext, sampler: Server
) -> SampleGroup:
    return SampleGroup(prompt, tuple(made), source, context.round, sampler.temperature, sampler.top_p)
