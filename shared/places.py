"""Where a cache is: a directory, or a URL with the directory of this machine that mirrors it.

A mirror is a directory of the store whose name is the URL itself, percent-encoded, so either follows from the other
without a look at disk or network: `s3://bucket/demo` is mirrored in `~/.cache/decant/caches/s3%3A%2F%2Fbucket%2Fdemo`.
Everything that takes a cache's path takes a mirror's. A URL with a password or a query is refused before it is kept
anywhere: credentials belong where the libraries look for them. Cost: text alone.

>>> mirrored = place_of("s3://bucket/demo")
>>> origin_of(mirrored / "sequences"), origin_of(Path("runs/demo/cache"))
('s3://bucket/demo/sequences', None)
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

SCHEMES = ("s3", "gs", "hf", "https", "http")
"""Schemes of URLs that a cache is read from."""
STORE_VARIABLE = "DECANT_STORE"
"""Directory of mirrors and fetched parts; without it `decant` below XDG_CACHE_HOME or ~/.cache."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_CUT = re.compile(rf"({'|'.join(SCHEMES)}):/(?!/)")
_USER_INFO = re.compile(r"(?<=://)[^/\s]*@")
_ENCODED = quote("://", safe="")
"""In the name of every mirror."""
_MOST_ENCODED = 240
"""Bytes of a mirror's name; file systems take 255."""


def without_passwords(text: str) -> str:
    """Return a text without the users and passwords of its addresses, which no message repeats.

    >>> without_passwords("'https://ann:secret@host/demo' is a URL")
    "'https://host/demo' is a URL"
    """
    return _USER_INFO.sub("", text)


def store_dir() -> Path:
    """Return the directory of this machine's mirrors and fetched parts."""
    own = os.environ.get(STORE_VARIABLE)
    if own:
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "decant"


def is_url(text: str | Path) -> bool:
    """Tell a URL from a path: `s3://bucket/demo` and `ftp://host` are URLs, `runs/demo` and `C:/demo` are not."""
    return isinstance(text, str) and _URL.match(text) is not None


def place_of(text: str | Path) -> Path:
    """Return a cache's directory: the path itself, or the mirror of a URL.

    Raises:
        ValueError: a URL of another scheme, with one slash, without a place, with a password or a query, or one that is
            too long.
    """
    if not is_url(text):
        if isinstance(text, str) and (cut := _CUT.match(text)):
            raise ValueError(f"{text[:60]} has one slash of a URL's two; write {cut[1]}://{text[cut.end() :][:60]}")
        return Path(text)
    parts = urlsplit(str(text))
    if parts.scheme not in SCHEMES:
        listed = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(f"{parts.scheme}:// is not among {listed}; copy the cache to one of them, or to a directory")
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2] if parts.scheme != 'hf' else parts.netloc}{parts.path}"
    if (parts.scheme != "hf" and "@" in parts.netloc) or parts.query or parts.fragment:
        raise ValueError(
            f"{shown} comes with a password, a query or a fragment; leave them out, and give credentials where the "
            "library of that scheme looks for them (docs/caches.md)"
        )
    if not parts.netloc:
        raise ValueError(f"{shown} names no place; expected {parts.scheme}://PLACE/PATH")
    name = quote(shown.rstrip("/"), safe="")
    if len(name) > _MOST_ENCODED:
        raise ValueError(f"{shown[:60]}... is too long; a URL has at most {_MOST_ENCODED} bytes once it is encoded")
    return store_dir() / "caches" / name


def resolved(path: str | Path) -> Path:
    """Return the absolute path that links lead to; of links in a circle, which `Path.resolve` raises on, the last."""
    return Path(os.path.realpath(path))


def origin_of(path: Path) -> str | None:
    """Return the URL that a mirror, or a file or folder in it, stands for; None of any other path."""
    if _ENCODED not in str(path):  # asked at every row that is read
        return None
    root = store_dir() / "caches"
    if not path.is_relative_to(root) or path == root:
        return None
    name, *rest = path.relative_to(root).parts
    return "/".join([unquote(name), *rest])


def named(path: Path) -> str:
    """Return how a cache's place is called: its URL, or its path."""
    return origin_of(path) or str(path)


def with_urls(text: str) -> str:
    """Return a text for people with mirrors called by their URLs."""
    root = f"{store_dir() / 'caches'}{os.sep}"
    if root not in text:
        return text
    return re.sub(re.escape(root) + r"([A-Za-z0-9_.~%-]+)", lambda found: unquote(found[1]), text)
