"""A server that can be told of a policy: what it lists, what it says of its weights, and the policy's adapter at it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefloop.endpoint import Address, Trouble
from prefloop.models.causal_lm import folder_digest
from prefloop.rows import PolicyRef

STARTED = (None, "default")
"""Version of weights that nobody has exchanged since the server was started."""
NOT_KNOWN = (404, 405)
"""Status with which a server says that it has no such path."""
SHARED = "the server must see that folder under this very path (a shared file system), with the same architecture"
"""What a server needs to load a policy."""


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


def is_base(holds: Callable[[str], bool], version: str | None, policy: PolicyRef) -> bool:
    """Return whether a server has the weights to which the policy's adapter belongs."""
    if policy.base is None:
        return False
    return holds(policy.base) if version in STARTED else version == mark(folder_digest(Path(policy.base)))


def adapter_at(
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
            return (
                passing_of(found) or f"{found.why} (see the server's --enable-lora and --max-lora-rank{_LORA[under]})"
            )
    for card in cards:
        if card.parent is not None and card.id != name and card.id.startswith(mark("")):
            site.post(f"{under}/unload_lora_adapter", {"lora_name": card.id})  # of an earlier round; it may stay
    return None


_LORA = {"/v1": ", and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", "": ""}


def passing_of(found: Trouble) -> Trouble | None:
    """Return trouble of the connection or the load, which another attempt may not have."""
    return found if found.status in (None, 408, 429, 503) else None
