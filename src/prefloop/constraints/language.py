"""The language of a text, by the `langdetect` package: the authors' choice, made repeatable here."""

import importlib
from functools import cache
from typing import Any

from prefloop.errors import ConfigError


def detected(text: str) -> str | None:
    """Return the ISO 639-1 code of a text's language, or `None` where it has no features of any.

    The detector draws random numbers; the authors leave its seed open, so short texts can change their language
    between runs. Here each text starts from seed 0. Its codes for Chinese are `zh-cn` and `zh-tw`.

    Raises:
        ConfigError: the package is not installed.

    """
    library, factory = _detector()
    detector = factory.create()
    detector.append(text)
    try:
        found: str = detector.detect()
    except library.LangDetectException:
        return None
    return found


def known_languages() -> frozenset[str]:
    """Return the codes that a text's language can have; `zh` stands for both of Chinese.

    Raises:
        ConfigError: the package is not installed.

    """
    _, factory = _detector()
    return frozenset((*factory.get_lang_list(), "zh"))


@cache
def _detector() -> tuple[Any, Any]:
    try:
        library = importlib.import_module("langdetect")
    except ImportError as error:
        raise ConfigError(
            "constraints: instructions on the language of a text need the `langdetect` package: "
            "pip install 'prefloop[ifeval]'"
        ) from error
    # A factory of our own: the package's shared one takes its seed from a class attribute, for everybody.
    factory = library.DetectorFactory()
    factory.load_profile(library.PROFILES_DIRECTORY)
    factory.seed = 0
    return library, factory
