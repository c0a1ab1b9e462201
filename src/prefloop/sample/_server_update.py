"""How a server is made to serve the round's policy, and what it says of the weights that it has.

vLLM and SGLang load the policy's folder, or its LoRA adapter, when they are told to over HTTP; a user's own command can
do it for another server. Whatever happens, the server is asked for the policy only once it has said that it serves it.
"""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from prefloop.endpoint import Trouble, offer
from prefloop.errors import SamplerError
from prefloop.rows import PolicyRef
from prefloop.sample._server_hold import Serving
from prefloop.sample._server_sglang import sglang, sglang_info
from prefloop.sample._server_site import Card, Site
from prefloop.sample._server_vllm import vllm

NAMELESS = ("sglang", "llamacpp")
"""Servers, as their model list says `owned_by`, that answer for any model name with the one model they have."""
COMMAND_WITHIN = 3600.0
"""Seconds that a user's command may take."""


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
    info = sglang_info(site)
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
