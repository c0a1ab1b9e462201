"""How a vLLM server is told of a policy."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from prefloop.endpoint import Trouble
from prefloop.errors import SamplerError
from prefloop.rows import PolicyRef
from prefloop.sample._server_hold import Serving
from prefloop.sample._server_site import SHARED, STARTED, Site, adapter_at, is_base, mark, passing_of

LOADING = "prefloop-loading"
"""Version while weights are exchanged, so that a server that was left in the middle is noticed."""
EMPTY_WITHIN = 10.0
"""Seconds in which a server's prefix cache must be empty after requests were stopped."""


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
    lora = adapter_at(site, policy, cards, is_base(base.is_folder, version, policy), "/v1")
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
            if passing := passing_of(found):
                return passing
            raise SamplerError(
                f"sampler.update: {site.url} did not load {folder} ({path.partition('?')[0]}: {found.why}); {SHARED}. "
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
    if not on_cpu:
        return None
    model = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if model.get_text_config().tie_word_embeddings:
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
