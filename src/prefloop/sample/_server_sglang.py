"""How an SGLang server is told of a policy. Written from its sources; no such server was run."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prefloop.endpoint import Trouble
from prefloop.errors import ConfigError, SamplerError
from prefloop.rows import PolicyRef
from prefloop.sample._server_hold import Serving
from prefloop.sample._server_site import SHARED, STARTED, Site, adapter_at, is_base, mark, passing_of


def sglang(site: Site, policy: PolicyRef) -> Serving | Trouble:
    """Tell an SGLang server: by its adapter where it has one and the server takes it, else by its folder."""
    cards, info = site.cards(), sglang_info(site)
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
    lora = adapter_at(site, policy, cards, is_base(holds, version, policy), "")
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


def sglang_info(site: Site) -> dict[str, Any] | Trouble | None:
    found = site.version_at("/model_info")
    return site.version_at("/get_model_info") if found is None else found


def _sglang_version(info: Mapping[str, Any]) -> str | None:
    said = info.get("weight_version")
    return said if isinstance(said, str) else None


def _same_folder(path: object, folder: str) -> bool:
    return isinstance(path, str) and Path(path).resolve() == Path(folder).resolve()


def _sglang_still(site: Site, version: str | None, adapter: str | None = None) -> bool | Trouble:
    info, cards = sglang_info(site), site.cards() if adapter else []
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
        if passing := passing_of(found):
            return passing
        raise SamplerError(f"sampler.update: {site.url} did not load {folder} ({found.why}); {SHARED}")
    cards, info = site.cards(), sglang_info(site)
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
