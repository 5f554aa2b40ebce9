"""Addresses of running vLLM servers (`teacher.engine: server`) and where their key comes from.

An address must not carry a password, because recipes are written into run directories.
"""

from __future__ import annotations

from urllib.parse import urlsplit

KEY_VARIABLE = "DECANT_SERVER_API_KEY"
"""Environment variable with the servers' API key."""


def address_problem(url: str) -> str | None:
    """Say what is wrong with a server's address, without repeating a password in it, or None."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "it is no address of a server; expected one such as http://127.0.0.1:8000/v1"
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        return f"an address must hold no user or password, because recipes are kept; put an API key into {KEY_VARIABLE}"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not url.isascii() or " " in url:
        return "it is no address of a server; expected one such as http://127.0.0.1:8000/v1"
    if parts.query or parts.fragment:
        return "an address must end with its path, such as http://127.0.0.1:8000/v1; leave out what follows '?' or '#'"
    return None
