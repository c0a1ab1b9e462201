"""Whether two models mean the same tokens by the same ids."""

from functools import lru_cache
from pathlib import Path

from prefloop.models.causal_lm import load_tokenizer


@lru_cache(maxsize=64)
def foreign_token(policy: str, policy_digest: str, other: str, other_digest: str) -> str | None:
    """Return in words the first difference between two tokenizers that changes what ids mean; `None`: there is none.

    The digests are there for the cache alone.

    Raises:
        DataError: a tokenizer cannot be read.

    """
    ours, theirs = load_tokenizer(Path(policy)), load_tokenizer(Path(other))
    known = ours.get_vocab()
    for token, number in sorted(theirs.get_vocab().items(), key=lambda item: item[1]):
        if known.get(token) != number:
            return f"token {token!r} is {number} there and {known.get(token, 'unknown')} here"
    if ours.eos_token_id != theirs.eos_token_id:
        return f"the end token is {theirs.eos_token!r} there and {ours.eos_token!r} here"
    return None
