"""How a server is made to serve the round's policy, and what it says of the weights that it has.

vLLM and SGLang load the policy's folder, or its LoRA adapter, when they are told to over HTTP; a user's own command can
do it for another server. Whatever happens, the server is asked for the policy only once it has said that it serves it.
"""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from prefloop.endpoint import Address, Trouble, offer
from prefloop.errors import ConfigError, SamplerError
from prefloop.models.causal_lm import folder_digest
from prefloop.rows import PolicyRef
from prefloop.sample._server_hold import Serving

NAMELESS = ("sglang", "llamacpp")
"""Servers, as their model list says `owned_by`, that answer for any model name with the one model they have."""
STARTED = (None, "default")
"""Version of weights that nobody has exchanged since the server was started."""
LOADING = "prefloop-loading"
"""Version while weights are exchanged, so that a server that was left in the middle is noticed."""
EMPTY_WITHIN = 10.0
"""Seconds in which a server's prefix cache must be empty after requests were stopped."""
COMMAND_WITHIN = 3600.0
"""Seconds that a user's command may take."""
NOT_KNOWN = (404, 405)
"""Status with which a server says that it has no such path."""
_SHARED = "the server must see that folder under this very path (a shared file system), with the same architecture"


def mark(digest: str) -> str:
    """Return what a policy is called at a server: as a version of its weights, or as an adapter."""
    return f"prefloop-{digest}"


@dataclass(frozen=True)
class Card:
    """A model of a server's list. `root` is where it was read from, `parent` what an adapter belongs to."""

    id: str
    root: str | None
    parent: str | None
    owner: str | None

    def is_folder(self, folder: str) -> bool:
        """Return whether this is the model of `folder`."""
        return any(name is not None and Path(name).resolve() == Path(folder).resolve() for name in (self.id, self.root))


@dataclass(frozen=True)
class Site:
    """An endpoint and the client that talks to it."""

    address: Address
    client: Any

    @property
    def url(self) -> str:
        """Its address."""
        return self.address.base_url

    def cards(self) -> list[Card] | Trouble:
        """Return the models that it lists."""
        found = self.address.listed(self.client)
        if isinstance(found, Trouble):
            return found
        rows = [[item.get(name) for name in ("root", "parent", "owned_by")] for item in found]
        texts = [[value if isinstance(value, str) else None for value in row] for row in rows]
        return [Card(str(item["id"]), *row) for item, row in zip(found, texts, strict=True)]

    def version_at(self, path: str) -> dict[str, Any] | Trouble | None:
        """Return what a path says of the weights; `None` if there is no such path."""
        found = self.address.get(self.client, path)
        if isinstance(found, Trouble):
            return None if found.status in NOT_KNOWN else found
        return found if isinstance(found, dict) else None

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return what comes back, or `Trouble`."""
        return self.address.post(self.client, path, body)


Tell = Callable[[Site, PolicyRef], Serving | Trouble]
"""Makes a server serve a policy. Trouble may pass; SamplerError says what will not."""


def tell_of(update: str | tuple[str, ...]) -> Tell:
    """Return how `sampler.update` wants servers to be told."""
    return partial(by_command, update) if isinstance(update, tuple) else KINDS[update]


def found_out(site: Site, policy: PolicyRef) -> Serving | Trouble:
    """auto: look what the server is; one that is neither vLLM nor SGLang is asked for the policy by its folder."""
    version = site.version_at("/version")
    if isinstance(version, Trouble):
        return version
    if version is not None and "version" in version:
        return vllm(site, policy)
    info = _sglang_info(site)
    if isinstance(info, Trouble):
        return info
    return sglang(site, policy) if info is not None and "model_path" in info else by_name(site, policy)


def by_name(site: Site, policy: PolicyRef) -> Serving | Trouble:
    """none: ask for the policy's folder; a server that knows another model only must be started anew by the user."""
    cards = site.cards()
    if isinstance(cards, Trouble):
        return cards
    folder = str(Path(policy.path).resolve())
    named = next((card.id for card in cards if Path(card.id).resolve() == Path(folder)), None)
    if named is None and cards and all(card.owner in NAMELESS for card in cards):
        raise SamplerError(
            f"sampler.model: {site.url} serves {', '.join(card.id for card in cards)}, and such a server answers for "
            f"any name; start it with {folder}, or let it be told of each round's policy: see sampler.update"
        )
    return Serving(named or folder)


def vllm(site: Site, policy: PolicyRef) -> Serving | Trouble:
    """Tell a vLLM server: by its adapter where it has one and the server takes it, else by its folder."""
    cards, info = site.cards(), site.version_at("/weight_info")
    if isinstance(cards, Trouble):
        return cards
    if isinstance(info, Trouble):
        return info
    version = None if info is None else str(info.get("weight_version"))
    base = next((card for card in cards if card.parent is None), None)
    if base is None:
        return Trouble("it lists no model", again=True, status=200)
    still = None if version is None else partial(_vllm_still, site, version)
    # A folder of a run may have been written anew since the server read it.
    if base.is_folder(policy.path) and (version is None or (version in STARTED and policy.round < 0)):
        return Serving(base.id, check=still)
    if version == mark(policy.digest):
        return Serving(base.id, check=still)
    lora = _adapter_at(site, policy, cards, _is_base(base.is_folder, version, policy), "/v1")
    if isinstance(lora, Trouble):
        return lora
    if lora is None:
        return Serving(mark(policy.digest), check=still)
    if version is None:
        raise SamplerError(
            f"sampler.update: {site.url} cannot be told of {policy.path}. By adapter: {lora}. By folder: the server "
            "has no /weight_info; start it with VLLM_SERVER_DEV_MODE=1 (vLLM 0.32 has it)"
        )
    return _vllm_reload(site, policy, base.id)


def _is_base(holds: Callable[[str], bool], version: str | None, policy: PolicyRef) -> bool:
    """Return whether a server has the weights to which the policy's adapter belongs."""
    if policy.base is None:
        return False
    return holds(policy.base) if version in STARTED else version == mark(folder_digest(Path(policy.base)))


def _adapter_at(
    site: Site, policy: PolicyRef, cards: Sequence[Card], has_base: bool, under: str
) -> str | Trouble | None:
    """Load the policy's adapter, under a name of its own. Return why that cannot be, or `None` if it is there.

    `under` is where the server's paths for adapters begin.
    """
    name, folder = mark(policy.digest), str(Path(policy.path).resolve() / "adapter")
    if policy.base is None:
        return "the policy has none (see round_exit: keep)"
    if not has_base:
        return f"the server does not hold the policy's base, {policy.base}"
    if all(card.id != name for card in cards):
        found = site.post(f"{under}/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        if isinstance(found, Trouble):
            return _passing(found) or f"{found.why} (see the server's --enable-lora and --max-lora-rank{_LORA[under]})"
    for card in cards:
        if card.parent is not None and card.id != name and card.id.startswith(mark("")):
            site.post(f"{under}/unload_lora_adapter", {"lora_name": card.id})  # of an earlier round; it may stay
    return None


_LORA = {"/v1": ", and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", "": ""}


def _passing(found: Trouble) -> Trouble | None:
    """Return trouble of the connection or the load, which another attempt may not have."""
    return found if found.status in (None, 408, 429, 503) else None


def _vllm_still(site: Site, version: str) -> bool | Trouble:
    info = site.version_at("/weight_info")
    return info if isinstance(info, Trouble) else info is not None and info.get("weight_version") == version


def _vllm_reload(site: Site, policy: PolicyRef, model: str) -> Serving | Trouble:
    folder, version = str(Path(policy.path).resolve()), mark(policy.digest)
    if trouble := _keeps_old_head(site, folder):
        return trouble
    steps: list[tuple[str, dict[str, Any]]] = [
        ("/update_weight_version", {"new_version": LOADING}),
        ("/pause?mode=abort", {}),  # whoever is answered now is answered by other weights
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
        ("/reset_prefix_cache", {}),  # else prompts would be continued from the old weights' keys and values
        ("/resume", {}),
        ("/update_weight_version", {"new_version": version}),
    ]
    for path, body in steps:
        found = _emptied(site) if path == "/reset_prefix_cache" else site.post(path, body)
        if isinstance(found, Trouble):
            if passing := _passing(found):
                return passing
            raise SamplerError(
                f"sampler.update: {site.url} did not load {folder} ({path.partition('?')[0]}: {found.why}); {_SHARED}. "
                "vLLM may have lost its weights by that: start it anew and give the same command"
            )
    return Serving(model, check=partial(_vllm_still, site, version))


def _keeps_old_head(site: Site, folder: str) -> Trouble | None:
    """Refuse a vLLM that would go on with its old output layer: 0.32 on a CPU has packed it, and does so only once.

    Measured: with tied embeddings and all weights trained, log-probs were off by 0.08 nats after an exchange.
    """
    info = site.version_at("/server_info?config_format=json")
    if isinstance(info, Trouble):
        return info
    config = (info or {}).get("vllm_config")
    device = config.get("device_config") if isinstance(config, dict) else None
    on_cpu = isinstance(device, dict) and device.get("device") == "cpu"
    if on_cpu and AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().tie_word_embeddings:
        raise SamplerError(
            f"sampler.update: {site.url} is vLLM on a CPU, and {folder} has tied word embeddings: an exchange of "
            "weights leaves its output layer as it was. Train an adapter (train.lora.rank, round_exit: keep) and start "
            "the server with --enable-lora, or set sampler.kind=vllm"
        )
    return None


def _emptied(site: Site) -> Any:
    end = time.monotonic() + EMPTY_WITHIN
    while True:
        found = site.post("/reset_prefix_cache", {})
        if isinstance(found, Trouble) or (isinstance(found, dict) and found.get("success")):
            return found
        if time.monotonic() > end:
            return Trouble("the prefix cache cannot be emptied", again=False, status=200)
        time.sleep(0.1)


def sglang(site: Site, policy: PolicyRef) -> Serving | Trouble:
    """Tell an SGLang server: by its adapter where it has one and the server takes it, else by its folder."""
    cards, info = site.cards(), _sglang_info(site)
    if isinstance(cards, Trouble):
        return cards
    if isinstance(info, Trouble):
        return info
    if info is None:
        raise ConfigError(f"sampler.update: {site.url} has no /model_info, so it is no SGLang server")
    version = _sglang_version(info)
    served = next((card.id for card in cards if card.parent is None), "default")
    still = partial(_sglang_still, site, version)
    holds = partial(_same_folder, info.get("model_path"))
    if version == mark(policy.digest) or (policy.round < 0 and version in STARTED and holds(policy.path)):
        return Serving(served, version=version, check=still)
    lora = _adapter_at(site, policy, cards, _is_base(holds, version, policy), "")
    if isinstance(lora, Trouble):
        return lora
    if lora is None:
        name = mark(policy.digest)
        listed = site.cards()
        if isinstance(listed, Trouble):
            return listed
        if any(card.id == name for card in listed):  # versions that do not list adapters take no name of one either
            still = partial(_sglang_still, site, version, name)
            return Serving(f"{served}:{name}", (("lora_path", name),), version, still)
    return _sglang_reload(site, policy)


def _sglang_info(site: Site) -> dict[str, Any] | Trouble | None:
    found = site.version_at("/model_info")
    return site.version_at("/get_model_info") if found is None else found


def _sglang_version(info: Mapping[str, Any]) -> str | None:
    said = info.get("weight_version")
    return said if isinstance(said, str) else None


def _same_folder(path: object, folder: str) -> bool:
    return isinstance(path, str) and Path(path).resolve() == Path(folder).resolve()


def _sglang_still(site: Site, version: str | None, adapter: str | None = None) -> bool | Trouble:
    info, cards = _sglang_info(site), site.cards() if adapter else []
    if isinstance(info, Trouble):
        return info
    if isinstance(cards, Trouble):
        return cards
    there = adapter is None or any(card.id == adapter for card in cards)
    return there and info is not None and _sglang_version(info) == version


def _sglang_reload(site: Site, policy: PolicyRef) -> Serving | Trouble:
    folder, version = str(Path(policy.path).resolve()), mark(policy.digest)
    body = {"model_path": folder, "weight_version": version, "abort_all_requests": True, "flush_cache": True}
    found = site.post("/update_weights_from_disk", body)
    if isinstance(found, Trouble):
        if passing := _passing(found):
            return passing
        raise SamplerError(f"sampler.update: {site.url} did not load {folder} ({found.why}); {_SHARED}")
    cards, info = site.cards(), _sglang_info(site)
    if isinstance(cards, Trouble):
        return cards
    if isinstance(info, Trouble):
        return info
    said = None if info is None else _sglang_version(info)
    if said != version:
        raise SamplerError(
            f"sampler.update: {site.url} says that it has loaded {folder}, but names its weights {said!r} and not "
            f"{version!r}; a version of SGLang is needed whose /model_info has weight_version"
        )
    served = next((card.id for card in cards if card.parent is None), "default")
    return Serving(served, version=version, check=partial(_sglang_still, site, version))


def by_command(command: Sequence[str], site: Site, policy: PolicyRef) -> Serving | Trouble:
    """Run the user's command where the server does not list the policy's folder, and look whether it does then."""
    cards = site.cards()
    if isinstance(cards, Trouble):
        return cards
    if (found := _listed(cards, policy)) is None:
        _run(command, site, policy)
        cards = site.cards()
        if isinstance(cards, Trouble):
            return cards
        if (found := _listed(cards, policy)) is None:
            raise SamplerError(
                f"sampler.update: after {command[0]} has run, {site.url} does not list {Path(policy.path).resolve()}"
                f"{offer([card.id for card in cards])}; the server must offer the policy under its absolute folder"
            )
    return Serving(found, check=partial(_still_listed, site, policy))


def _listed(cards: Sequence[Card], policy: PolicyRef) -> str | None:
    return next((card.id for card in cards if card.is_folder(policy.path)), None)


def _still_listed(site: Site, policy: PolicyRef) -> bool | Trouble:
    cards = site.cards()
    return cards if isinstance(cards, Trouble) else _listed(cards, policy) is not None


def _run(command: Sequence[str], site: Site, policy: PolicyRef) -> None:
    folder = Path(policy.path).resolve()
    named = {"{path}": str(folder), "{adapter}": str(folder / "adapter") if policy.base else "", "{url}": site.url}
    words = [_filled(word, named) for word in command]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_WITHIN, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SamplerError(f"sampler.update: {words[0]} could not be run ({error}); correct the command") from error
    if done.returncode:
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[-300:]
        raise SamplerError(
            f"sampler.update: {' '.join(words)} ended with code {done.returncode}: {said or 'it said nothing'}"
        )


def _filled(word: str, named: Mapping[str, str]) -> str:
    for name, value in named.items():
        word = word.replace(name, value)
    return word


KINDS: dict[str, Tell] = {"none": by_name, "auto": found_out, "vllm": vllm, "sglang": sglang}
"""What `sampler.update` may be beside a command."""
