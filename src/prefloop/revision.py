"""The prompt that shows a model its draft and asks for a better one: the same in training and in sampling."""

from dataclasses import dataclass

from prefloop.errors import ConfigError
from prefloop.rows import VERBATIM, Message

INSTRUCTION = "Write a better answer to the request above: correct what is wrong in yours, and keep what is good."
TEMPLATE = "{prompt}{draft}\n\n{prompt}"


@dataclass(frozen=True)
class RevisionPrompt:
    """How a draft is put before the model, as SRPO's revision policy π†(· | draft, x) reads it (arXiv 2406.01660).

    A chat prompt gets the draft as the assistant's turn and `instruction` as the user's next one. A plain-text prompt,
    for a model that only continues text, becomes `template`, with `{prompt}` and `{draft}` filled in. The paper's own
    wording was not found: both texts are ours.

    Raises:
        ConfigError: the instruction is empty, or the template lacks a placeholder.

    """

    instruction: str = INSTRUCTION
    template: str = TEMPLATE

    def __post_init__(self) -> None:
        if not self.instruction.strip():
            raise ConfigError("instruction: empty; say what the model is to do with its draft")
        for placeholder in ("{prompt}", "{draft}"):
            if placeholder not in self.template:
                raise ConfigError(f"template: has no {placeholder}, so the model would not see it; put it in")

    def messages(self, prompt: tuple[Message, ...], draft: str) -> tuple[Message, ...]:
        """Return the messages that ask for a revision of `draft`, an answer to `prompt`."""
        if len(prompt) == 1 and prompt[0].role == VERBATIM:
            parts = {"{prompt}": prompt[0].content, "{draft}": draft}
            return (Message(VERBATIM, _filled(self.template, parts)),)
        return (*prompt, Message("assistant", draft), Message("user", self.instruction))


def _filled(template: str, parts: dict[str, str]) -> str:
    """Fill in the placeholders in one pass: braces in a text that is put in are that text's own."""
    result, rest = "", template
    while rest:
        placeholder = min((p for p in parts if p in rest), key=rest.index, default=None)
        if placeholder is None:
            return result + rest
        before, _, rest = rest.partition(placeholder)
        result += before + parts[placeholder]
    return result
