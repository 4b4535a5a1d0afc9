"""Text from data sets and configurations, made fit to be shown: it steers no terminal or browser and carries no credentials."""

from __future__ import annotations

import re
import unicodedata

_MARKED = ("Cc", "Cf", "Cs", "Zl", "Zp")
_SECRET = r"(?:key|secret|token|passw(?:or)?d|pwd|sig|signature|credentials?|auth)"
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_USER = re.compile(r"(?<=://)(?:[^/?#]*|[^/@:]*:[^@]*)@")
_OPTION = re.compile(rf"([?&;](?:[^=&;]*[-_])?{_SECRET}=)[^&;#]*", re.IGNORECASE)
_NAME = re.compile(rf"(?:^|.*[-_.]){_SECRET}", re.IGNORECASE)


def printable(text: object, keep: str = "") -> str:
    r"""Return text in which every control, format (bidirectional marks), surrogate and line-separating character is visible.

    Each becomes its code point, ``⟨U+202E⟩``; everything else stays.

    Args:
        text: What to show.
        keep: Characters to leave alone, for example ``"\n"`` where lines may break.
    """
    return "".join(c if c in keep or unicodedata.category(c) not in _MARKED else f"⟨U+{ord(c):04X}⟩" for c in str(text))


def without_secrets(text: str) -> str:
    """Return text whose URIs have ``***`` in place of credentials: before the host, and in options such as ``secret_key=``."""
    return _URI.sub(lambda uri: _OPTION.sub(r"\1***", _USER.sub("***@", uri[0])), text)


def names_a_secret(key: str) -> bool:
    """Whether a key's last word says that its value is a credential: ``hub_token`` does, ``max_new_tokens`` does not."""
    return _NAME.fullmatch(key) is not None
