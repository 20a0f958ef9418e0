"""The three ways to fail.

* the caller's bug: Python's own ``ValueError`` and ``RuntimeError``;
* bad data from a peer, a file or a user: ``RefusedError``;
* a world that cannot be reached now: ``UnavailableError``.

Rules: every message says what came, what is allowed and what to do.  ``SlyError`` is what the shell turns into one line
and exit code 2; nothing else is caught there.
"""

from __future__ import annotations

MAX_SHOWN_CHARS = 120
MAX_WORDS_CHARS = 512


def shown(value: object) -> str:
    """A short, printable, one-line form of a value that came from outside."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"


def _words(got: object) -> str:
    """Words as they are, unless they would break the line or fill the log; anything else as ``shown``."""
    return got if isinstance(got, str) and len(got) <= MAX_WORDS_CHARS and got.isprintable() else shown(got)


class SlyError(Exception):
    """Root of the errors that are meant for people."""


class RefusedError(SlyError):
    """Data that came from outside breaks a rule; it was not used, and nothing changed.

    ``subject`` names the thing, ``got`` says what came, ``allowed`` what would be accepted, ``remedy`` what to do.
    """

    def __init__(self, subject: str, got: object = None, allowed: str = "", remedy: str = "") -> None:
        self.subject, self.got, self.allowed, self.remedy = subject, got, allowed, remedy
        parts = [f"got {_words(got)}"] if got is not None else []
        parts += [f"allowed: {allowed}"] if allowed else []
        parts += [remedy] if remedy else []
        super().__init__(f"{subject}: {'; '.join(parts)}" if parts else subject)


class ConfigError(RefusedError):
    """A configuration file or a command line that cannot be used."""


class UnavailableError(SlyError):
    """Something outside cannot be reached or has died; the same call may work later.

    ``subject`` names the thing, ``reason`` says why, ``remedy`` what to do.
    """

    def __init__(self, subject: str, reason: str, remedy: str = "") -> None:
        self.subject, self.reason, self.remedy = subject, reason, remedy
        super().__init__(f"{subject}: {reason}" + (f"; {remedy}" if remedy else ""))
