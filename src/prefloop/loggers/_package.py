"""The package behind a logger: refused before any work where it is missing."""

import importlib
import importlib.util
from typing import Any

from prefloop.errors import ConfigError


def require(name: str, extra: str) -> None:
    """Refuse a logger whose package is not installed.

    Raises:
        ConfigError: names the extra that brings it.

    """
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"loggers: {extra}: the package {name} is not installed: pip install 'prefloop[{extra}]', or leave it out"
        )


def package(name: str) -> Any:
    """Return the package, imported when the first number is sent."""
    return importlib.import_module(name)
