"""prefloop: iterative, self-improving preference optimization with honest statistics.

    from prefloop import Recipe, run
    summary = run(recipe, Path("runs/mine"))

Names are imported when they are first used, so that `import prefloop` does not wait for torch.
"""

import importlib
from typing import Any

_NAMES = {
    "run": "prefloop.loop",
    "Recipe": "prefloop.recipe",
    "read_recipe": "prefloop.launch",
    "DPO": "prefloop.losses.dpo",
    "CompletionLogps": "prefloop.tensors",
    "PairLogps": "prefloop.tensors",
    "LossOutput": "prefloop.tensors",
    "TokenGroup": "prefloop.models.logps",
    "completion_logps": "prefloop.models.logps",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"prefloop has no {name!r}; public names: {', '.join(sorted(_NAMES))}")
    return getattr(importlib.import_module(_NAMES[name]), name)
