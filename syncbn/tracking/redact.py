"""Redaction of passwords and tokens in config values and URLs.

Secrets are redacted by the name of a key and by the shape of a URL, in the one function through which everything
written about a run goes: journal, MLflow params and tags, messages.
"""

import re
from typing import Any

HIDDEN = "***"

_SECRET_KEY = re.compile(
    r"token|password|passwd|secret|credential|(?:^|[._-])key$|api[._-]?key", re.IGNORECASE
)
_USER_INFO = re.compile(
    r"""((?<=['"])\w+://(?!/)(?=[^'"]*@))[^'"]*@|(\w+://)(?!/)\S+@"""
    r"""|(?<![\w/@])[^\s:/@'"]+:(?!//)[^\s'"]*@(?=[\w.-]+:\d)"""
)
"""A name and a password before a host, up to the last `@`: passwords hold `@` and `/` that should be encoded, within
quotes blanks too, and an address `host:port` has no scheme."""
_QUERY_SECRET = re.compile(
    r"([?&][^=&\s]*(?:token|password|secret|key)[^=&\s]*=)[^&\s]+", re.IGNORECASE
)


def redact(value: Any, key: str = "") -> Any:
    """`value` (a tree of dicts, lists and scalars) without secrets.

    A value whose key names a token, password, secret, credential or key becomes `***`; so does
    the user-info of any URL in a string, and the value of such a name in its query.
    """
    if isinstance(value, dict):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if value is None or value == "":
        return value
    if _SECRET_KEY.search(key):
        return HIDDEN
    return redact_text(value) if isinstance(value, str) else value


def _without_user(found: re.Match[str]) -> str:
    return f"{found[1] or found[2] or ''}{HIDDEN}@"


def redact_text(text: str) -> str:
    """`text` with what is secret in the URLs in it replaced by `***`."""
    return _QUERY_SECRET.sub(rf"\1{HIDDEN}", _USER_INFO.sub(_without_user, text))
