"""API keys, the tenant of each key, and the limits of each tenant.

A key has 256 random bits, so its SHA-256 reveals nothing about it and needs no salt. Keys are listed one per line; in
`IMPRINT_API_KEYS`, commas may separate them as well. A limit after a key overrides the setting for the key's tenant;
with `recall=0` the tenant's sessions keep and read no episodes:

    # the analysts
    acme:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    acme:60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752 sessions=500 tokens_per_minute=100000
    bo:fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9 recall=0
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from service.errors import Unauthorized
from service.settings import Settings

DEFAULT = "default"  # the tenant of every request to a server without keys
RECALL = "recall"  # 0 after a key: the tenant's sessions keep and read no episodes
OPERATOR = "metrics"  # a key of this tenant opens /metrics, which covers all tenants, and nothing else

MAX_FILE_BYTES = 16 * 2**20

_ENTRY = re.compile(
    r"(?P<tenant>[A-Za-z0-9][A-Za-z0-9._-]{0,63}):(?P<digest>[0-9a-f]{64})(?P<limits>(\s+\w+=[0-9]{1,15})*)"
)

log = logging.getLogger(__name__)


class ApiKeysError(Exception):
    """The configured API keys are not valid. The message is one line that holds no part of a key."""


@dataclass(frozen=True)
class TenantLimits:
    """The limits of one tenant; 0 = no limit.

    Attributes:
        sessions: number of sessions.
        bytes: bytes of memory rows in all sessions; at the limit the sessions no longer learn.
        tokens_per_minute: learned tokens per minute. A turn may exceed the limit; later turns are then refused.
        requests: number of requests in flight, on each server.
    """

    sessions: int = 0
    bytes: int = 0
    tokens_per_minute: int = 0
    requests: int = 0


@dataclass(frozen=True)
class Tenant:
    """The owner of a request: the namespace of every session that the request reads or writes.

    recall: whether the tenant's sessions may keep and read episodes.
    """

    name: str
    limits: TenantLimits = TenantLimits()
    recall: bool = True


def new_key(tenant: str) -> tuple[str, str]:
    """Return a new key, and the line with its hash for the server's file. Raises ApiKeysError for an invalid name."""
    key = f"imp_{secrets.token_urlsafe(32)}"
    line = f"{tenant}:{_digest(key.encode())}"
    if not _ENTRY.fullmatch(line):
        raise ApiKeysError(
            f"a tenant's name has 1 to 64 letters, digits or . _ - and starts with a letter or a digit, got {tenant!r}"
        )
    return key, line


class ApiKeys:
    """The API keys of this server. The file of keys is read again when it changes; a faulty file changes nothing.

    Attributes:
        required: whether a request needs a key.

    Raises:
        ApiKeysError: a configured key is not valid, or the configured sources hold no key.
    """

    def __init__(self, settings: Settings) -> None:
        self._limits = TenantLimits(
            settings.tenant_sessions,
            settings.tenant_bytes,
            settings.tenant_tokens_per_minute,
            settings.tenant_requests,
        )
        self._file = settings.api_keys_file
        self._lines = [("IMPRINT_API_KEYS", line) for line in re.split(r"[,\n]", settings.api_keys or "")]
        self._file_signature = _file_signature(self._file)
        self._tenants = self._read()
        self.required = settings.api_keys is not None or self._file is not None
        if self.required and not self._tenants:
            raise ApiKeysError("IMPRINT_API_KEYS and its file hold no key; `imprint keys new TENANT` makes one")

    @property
    def tenants(self) -> set[str]:
        """The names of the tenants that have a key, and the default tenant."""
        return {tenant.name for tenant in self._tenants.values()} | {DEFAULT}

    def tenant(self, authorization: str | None) -> Tenant:
        """Return the tenant of the key in the header `Authorization`; the default tenant if no keys are configured.

        Raises:
            Unauthorized: the header has no key, or an unknown one.
        """
        if not self.required:
            return Tenant(DEFAULT, self._limits)
        self._refresh()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("An API key is required, as 'Authorization: Bearer KEY'.")
        request_digest = _digest(key.strip().encode())
        match: Tenant | None = None
        for digest, tenant in self._tenants.items():  # no early exit: the time taken must reveal nothing
            if hmac.compare_digest(digest, request_digest):
                match = tenant
        if match is None:
            raise Unauthorized("The API key is not known here.")
        return match

    def _refresh(self) -> None:
        if (signature := _file_signature(self._file)) == self._file_signature:
            return
        self._file_signature = signature
        try:
            self._tenants = self._read()
        except ApiKeysError as error:
            log.error("the API keys stay as they were: %s", error)
        else:
            log.info("%d API keys of %d tenants read", len(self._tenants), len(self.tenants))

    def _read(self) -> Mapping[str, Tenant]:
        """Return the tenants by the digests of their keys. Raises ApiKeysError."""
        owners: dict[str, str] = {}
        limits: dict[str, dict[str, int]] = {}
        for where, line in [*self._lines, *self._file_lines()]:
            if not (entry := line.partition("#")[0].strip()):
                continue
            parsed = _ENTRY.fullmatch(entry)
            if parsed is None:
                raise ApiKeysError(
                    f"{where}: a key is given as TENANT:SHA256 [LIMIT=NUMBER ...], see `imprint keys new`"
                )
            name = parsed["tenant"]
            if owners.setdefault(parsed["digest"], name) != name:
                raise ApiKeysError(f"{where}: this key belongs to another tenant already")
            for limit, value in _limits(where, parsed["limits"]):
                if limits.setdefault(name, {}).setdefault(limit, value) != value:
                    raise ApiKeysError(
                        f"{where}: {limit} of {name} was {limits[name][limit]} before, and is {value} here"
                    )
        return {digest: self._tenant_of(name, limits.get(name, {})) for digest, name in owners.items()}

    def _tenant_of(self, name: str, given: Mapping[str, int]) -> Tenant:
        limits = {limit: value for limit, value in given.items() if limit != RECALL}
        return Tenant(name, replace(self._limits, **limits), given.get(RECALL) != 0)

    def _file_lines(self) -> Iterator[tuple[str, str]]:
        if self._file is None:
            return
        try:
            if self._file.stat().st_size > MAX_FILE_BYTES:
                raise ApiKeysError(f"IMPRINT_API_KEYS_FILE: {self._file} is larger than {MAX_FILE_BYTES} bytes")
            lines = self._file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ApiKeysError(f"IMPRINT_API_KEYS_FILE: cannot read {self._file}: {reason}") from None
        yield from ((f"{self._file}, line {number}", line) for number, line in enumerate(lines, 1))


def _limits(where: str, pairs: str) -> Iterator[tuple[str, int]]:
    known = [*(field.name for field in fields(TenantLimits)), RECALL]
    for pair in pairs.split():
        name, _, value = pair.partition("=")
        if name not in known:
            raise ApiKeysError(f"{where}: a limit is one of {', '.join(known)}, got {name}")
        if name == RECALL and int(value) > 1:
            raise ApiKeysError(f"{where}: {RECALL} is 0 or 1, got {int(value)}")
        yield name, int(value)


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def _file_signature(file: Path | None) -> tuple[int, int, int] | None:
    """Return a value that changes when the file does."""
    try:
        stat = None if file is None else file.stat()
    except OSError:
        return None
    return None if stat is None else (stat.st_mtime_ns, stat.st_size, stat.st_ino)
