"""Import what a user names as `./my_file.py:Name`: a judge, a pair rule, a scoring function. By path only."""

import importlib.util
import sys
import traceback
from pathlib import Path
from types import FunctionType, ModuleType

from prefloop.errors import ConfigError
from prefloop.rows import digest_of


def import_user(path_and_name: str, field: str) -> object:
    """Return the object `Name` of the Python file in `path_and_name`, written `./my_file.py:Name`.

    A relative path starts at the working directory. The file runs once for each content: naming it again gives the
    same objects, naming it after an edit gives the new ones. `sys.path` is not changed, so the file can import
    installed packages but not its neighbours.

    Args:
        path_and_name: path and name, with a colon between.
        field: the setting that holds it, for messages.

    Raises:
        ConfigError: not of that form, no such file, a syntax error or exception in it (with its line), or no such
            name in it.

    """
    path_text, colon, name = path_and_name.rpartition(":")
    if not colon or not path_text.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"{field}: {path_and_name!r} must be a Python file and a name in it: ./my_file.py:Name")
    module = _module(Path(path_text).expanduser(), field)
    if name not in vars(module):
        own = [
            n
            for n, value in vars(module).items()
            if isinstance(value, (type, FunctionType)) and value.__module__ == module.__name__
        ]
        raise ConfigError(f"{field}: {path_text} has no {name!r}; it defines {', '.join(own) or 'nothing'}")
    found: object = vars(module)[name]
    return found


def _module(path: Path, field: str) -> ModuleType:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{field}: {path} cannot be read ({error.strerror}); name an existing file, "
            f"relative to {Path.cwd()} or absolute"
        ) from error
    digest = digest_of(str(path.resolve()), source.decode("utf-8", "backslashreplace"))
    # Kept in sys.modules because dataclasses and pydantic look a class's annotations up there.
    module_name = f"prefloop_user_{path.stem}_{digest}"
    if module_name not in sys.modules:
        sys.modules[module_name] = _executed(module_name, path, source, field)
    return sys.modules[module_name]


def _executed(module_name: str, path: Path, source: bytes, field: str) -> ModuleType:
    # Compiled here rather than by the import system, whose bytecode cache misses an edit within the same second.
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        raise ConfigError(f"{field}: {path}:{error.lineno or 1}: not valid Python: {error.msg}") from error
    except ValueError as error:
        raise ConfigError(f"{field}: {path}: not valid Python: {error}") from error
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        exec(code, vars(module))
    except Exception as error:  # the user's own code can raise anything, and the message must name its line
        del sys.modules[module_name]
        raise ConfigError(f"{field}: {place_of(error, path)}: {type(error).__name__} on import: {error}") from error
    return module


def place_of(error: BaseException, path: Path | str) -> str:
    """Return `path:line` of the innermost frame of `error` in the file `path`, or `path` if it has none."""
    file = str(Path(path).expanduser())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}:{lines[-1]}" if lines else file
