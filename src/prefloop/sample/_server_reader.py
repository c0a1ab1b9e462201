"""What the policy's own folder says of a server's completions: whether they can be the policy's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from prefloop.errors import DataError, SamplerError
from prefloop.models.causal_lm import decode_completion, encode_prompt, load_tokenizer, quiet
from prefloop.protocols import RoundContext
from prefloop.rows import Prompt
from prefloop.sample._server_wire import Drawn


@dataclass(frozen=True)
class Reader:
    """The policy's own tokenizer and longest context, which say whether the server serves the policy."""

    tokenizer: Any
    longest: int | None
    folder: str

    @classmethod
    def of(cls, context: RoundContext) -> "Reader":
        """Read the tokenizer and configuration of the round's policy.

        Raises:
            DataError: they cannot be read.

        """
        folder = Path(context.policy.path)
        with quiet():
            tokenizer = load_tokenizer(folder)
            try:
                config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{folder}: config.json cannot be read ({error}); give a policy's folder") from error
        # Some architectures, such as ALiBi's, have no longest length.
        return cls(tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None), str(folder))

    def limit(self, prompt: Prompt, most: int) -> int:
        """Return how many tokens a completion may have.

        Raises:
            SamplerError: none are left.

        """
        if self.longest is None:
            return most
        used = len(encode_prompt(self.tokenizer, prompt))
        if used >= self.longest:
            raise SamplerError(
                f"prompt {prompt.prompt_id} ({prompt.source}): {used} tokens, but the policy takes {self.longest} in "
                "all, so no room is left for a completion; shorten or drop this prompt"
            )
        return min(most, self.longest - used)

    def check(self, prompt: Prompt, drawn: Sequence[Drawn]) -> None:
        """Refuse token ids that are not the policy's: training on them would teach nonsense.

        Raises:
            SamplerError: the prompt's ids differ from ours, or a completion's do not spell its text.

        """
        ours = tuple(encode_prompt(self.tokenizer, prompt))
        for one in drawn:
            if one.prompt_ids is not None and one.prompt_ids != ours:
                raise SamplerError(
                    f"prompt {prompt.prompt_id} ({prompt.source}): the server's token ids of the prompt are not those "
                    f"of {self.folder}; it has another chat template or tokenizer, serve that folder as it is"
                )
            if one.token_ids is None:
                continue
            spelt = decode_completion(self.tokenizer, ours, one.token_ids)
            if one.text.strip().strip("\N{REPLACEMENT CHARACTER}") not in spelt:
                raise SamplerError(
                    f"prompt {prompt.prompt_id} ({prompt.source}): the server's token ids spell {spelt[:60]!r} with "
                    f"the tokenizer of {self.folder}, and its text is {one.text[:60]!r}; it serves another model"
                )
