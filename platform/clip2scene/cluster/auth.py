"""Secrets: kept in files that only their owner can read, and passed to Ray in the environment, never as an argument."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from clip2scene.errors import ConfigError
from clip2scene.paths import from_home
from clip2scene.storage import writing

AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Ray's own environment variables."""
OPEN_TO_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_SECRET_BYTES = 32


def secret_file(path: Path) -> str:
    """The secret in a file of mode 600; if the file is missing, it is made with a random secret.

    Raises:
        ConfigError: the file is empty, cannot be read, or can be read by others.
        StorageError: it cannot be written.
    """
    if not path.exists():
        write_private(path, secrets.token_hex(_SECRET_BYTES))
    return read_private(path)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, at any moment.

    Raises:
        StorageError: it cannot be written.
    """
    with writing(path) as aside:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)


def read_private(path: Path) -> str:
    """The text of a file that only its owner can read, without surrounding white space.

    Raises:
        ConfigError: it is empty, cannot be read, or can be read by others.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"{path}: cannot read the secret ({reason})") from error
    if mode & OPEN_TO_OTHERS:
        raise ConfigError(f"{path}: mode {mode:o} lets others read a secret; allowed: 600 (chmod 600 {path})")
    if not text:
        raise ConfigError(f"{path}: holds no secret; delete it, or put the token there")
    return text


def use_token() -> None:
    """Make Ray's clients in this process send the token that the environment or Ray's own file names.

    Ray sends it only if ``RAY_AUTH_MODE`` is set. Call this before importing ray, which reads the mode once.

    Raises:
        ConfigError: ``RAY_AUTH_TOKEN_PATH`` names a file that cannot be read, or that others can read.
    """
    named = os.environ.get(AUTH_TOKEN_PATH)
    if os.environ.get(AUTH_TOKEN):
        os.environ.setdefault(AUTH_MODE, "token")
    elif named:
        read_private(from_home(named))
        os.environ.setdefault(AUTH_MODE, "token")
    elif (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault(AUTH_MODE, "token")


def token_wanted(place: str) -> str:
    """The sentence for a Ray that refuses a missing or wrong token."""
    return (
        f"{place} requires a token; set {AUTH_TOKEN_PATH} to the file that holds it (`clip2scene up` prints the line "
        "that does)"
    )


def token_for_this_process() -> None:
    """Give an embedded Ray a random token in the environment, unless the user has chosen a token or a mode.

    Ray would otherwise write one to ``~/.ray/auth_token``, with a mode that lets others read it.
    """
    if not any(os.environ.get(name) for name in (AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH)):
        os.environ[AUTH_TOKEN] = secrets.token_hex(_SECRET_BYTES)
