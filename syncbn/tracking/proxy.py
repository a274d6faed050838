"""The proxy that requests to an address go through, in words for messages."""

import os
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def proxy_hint(address: str) -> str:
    """What to set where a proxy of the environment stands between us and the URL `address`; "" where none does."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme not in getproxies() or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    names = (f"{parts.scheme}_proxy", f"{parts.scheme.upper()}_PROXY")
    name = next((name for name in names if os.environ.get(name)), names[1])
    return f" (asked through the proxy of {name}: add {host} to NO_PROXY to ask it directly)"
