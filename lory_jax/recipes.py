"""The recipes that come with the package: `--config=local` is the file configs/local.py."""

import difflib
from pathlib import Path

from lory_jax.errors import ConfigError

_PACKAGE = Path(__file__).parent


def directory() -> Path:
    """The recipes' directory: inside an installed package, beside the package in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """The names of all packaged recipes."""
    return sorted(path.stem for path in directory().glob("*.py"))


def resolve(spec: str) -> str:
    """Returns `PATH.py[:argument]` for `NAME[:argument]` or `PATH.py[:argument]`.

    Raises:
      ConfigError: there is neither such a recipe nor such a file.
    """
    name, colon, argument = spec.partition(":")
    is_name = "/" not in name and not name.endswith(".py")
    try:
        path = directory() / f"{name}.py" if is_name else Path(name).expanduser()
    except RuntimeError:  # the ~ of an unknown user
        path = Path(name)
    if path.is_file():
        return f"{path}{colon}{argument}"
    near = difflib.get_close_matches(name if is_name else path.stem, names(), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(
        f"got {name!r}{hint}, must be a recipe of the package ({', '.join(names())}) "
        "or the path of a Python file"
    )
