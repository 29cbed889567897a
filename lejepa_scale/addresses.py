"""Addresses of shards as a user gives them: which are fetched from elsewhere, and what in them is secret. Everything that is
shown or written goes through `redacted`, here alone, so that no password or signature reaches a file, a log or an error."""

from __future__ import annotations

import logging
import re

HIDDEN = "***"
_WORDS = "token|secret|passwd|password|passphrase|pwd|credentials?|signature|jwt|auth|(?:api|access|private)[_-]?key"
_NAME = rf"(?:[\w.-]*[_.-])?(?:{_WORDS})(?:[_.-][\w.-]*)?"  # but not `tokens`
_SIGNED = "sig|key|session|policy|AWSAccessKeyId|GoogleAccessId|Key-Pair-Id"
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s'"]+)"""
_SECRETS = [
    (r"""(?<=://)[^/?#\s'"]*@""", f"{HIDDEN}@"),  # user and password, either of which may be a token
    (rf"""([?&;](?:{_NAME}|{_SIGNED})=)[^&;\s'"<>]*[^&;\s'"<>:,.)]""", rf"\1{HIDDEN}"),
    (rf"""((?<![\w?&;.-]){_NAME}=){_VALUE}""", rf"\1{HIDDEN}"),
    (rf"""((?<!\S)--?{_NAME}[ =])(?!-){_VALUE}""", rf"\1{HIDDEN}"),
    (
        r"""(\b(?:(?:proxy-)?authorization|(?:set-)?cookie|x-[\w-]*(?:token|key|secret))\s*:\s*)[^'"\r\n]*""",
        rf"\1{HIDDEN}",
    ),
    (r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", rf"\1 {HIDDEN}"),
]
_OF_COMMANDS = [
    (rf"((?:\s-u\s*|\s--(?:proxy-)?user[ =])){_VALUE}", rf"\1{HIDDEN}"),  # curl's
    (rf"""((?i:{_NAME})\s*:\s*)[^'"\r\n]*""", rf"\1{HIDDEN}"),  # further headers
]
_EVERYWHERE = [(re.compile(pattern, re.I), shown) for pattern, shown in _SECRETS]
_IN_COMMANDS = [*_EVERYWHERE, *((re.compile(pattern), shown) for pattern, shown in _OF_COMMANDS)]


def is_remote(shard: str) -> bool:
    """Fetched from elsewhere, by request or by command; else a path."""
    return shard.startswith("pipe:") or "://" in shard


def redacted(text: str) -> str:
    """The text without the secrets of addresses in it: users and passwords, and values of parameters, settings, options and
    headers whose names say that they are one."""
    return _hidden(text, _EVERYWHERE)


def _hidden(text: str, secrets: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, shown in secrets:
        text = pattern.sub(shown, text)
    return text


class WithoutSecrets(logging.Filter):
    """For the logger of a library that is given addresses."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True


class Address(str):
    """The path, URL or command of a shard, or a pattern of some. A string like any other to whoever reads from it; printed,
    formatted and written into a configuration it has no secrets. A part of it is a plain string again."""

    __slots__ = ()

    def __str__(self) -> str:
        raw = str.__str__(self)
        if not is_remote(raw):
            return raw
        return _hidden(raw, _IN_COMMANDS if "pipe:" in raw else _EVERYWHERE)

    def __repr__(self) -> str:
        return repr(str(self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)
