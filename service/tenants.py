"""Who calls: API keys, the tenant behind each, and what that tenant may use.

A key has 256 random bits, so its SHA-256 gives nothing away and needs no salt. Keys are listed one a line (in
`IMPRINT_API_KEYS` commas part them, too), with limits that go before the settings' own where they are given:

    # the analysts
    acme:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    acme:60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752 sessions=500 tokens_per_minute=100000
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

DEFAULT = "default"  # the tenant of a server without keys
OPERATOR = "metrics"  # its key opens /metrics, which tells of all tenants together, and nothing else

MAX_FILE_BYTES = 16 * 2**20

_ENTRY = re.compile(
    r"(?P<tenant>[A-Za-z0-9][A-Za-z0-9._-]{0,63}):(?P<digest>[0-9a-f]{64})(?P<limits>(\s+\w+=[0-9]{1,15})*)"
)

log = logging.getLogger(__name__)


class ApiKeysError(Exception):
    """The API keys cannot be used as they are given. The message is one line that holds no part of a key."""


@dataclass(frozen=True)
class TenantLimits:
    """What a tenant may use; 0 is no limit.

    Attributes:
        sessions: sessions that it may have.
        bytes: of rows in all of them, from which on nothing more is learned.
        tokens_per_minute: learned tokens; a turn may overdraw, and the next ones then wait.
        requests: requests in flight, on one server.
    """

    sessions: int = 0
    bytes: int = 0
    tokens_per_minute: int = 0
    requests: int = 0


@dataclass(frozen=True)
class Tenant:
    """Whose sessions a request is about: the namespace of all that it reads and writes."""

    name: str
    limits: TenantLimits = TenantLimits()


def new_key(tenant: str) -> tuple[str, str]:
    """A fresh key and the line that admits it. Raises KeysError for a name that cannot be a tenant's."""
    key = f"imp_{secrets.token_urlsafe(32)}"
    line = f"{tenant}:{_digest(key.encode())}"
    if not _ENTRY.fullmatch(line):
        raise ApiKeysError(
            f"a tenant's name has 1 to 64 letters, digits or . _ - and starts with a letter or a digit, got {tenant!r}"
        )
    return key, line


class ApiKeys:
    """The keys of this server. The file is read again whenever it changes; a faulty one changes nothing.

    Raises:
        KeysError: keys are configured, but faulty or none.
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
        """The names of those whose requests are served."""
        return {tenant.name for tenant in self._tenants.values()} | {DEFAULT}

    def tenant(self, authorization: str | None) -> Tenant:
        """Whose key the header `Authorization` carries; everybody is the default tenant where no keys are configured.

        Raises:
            Unauthorized: there is no key, or it is not known.
        """
        if not self.required:
            return Tenant(DEFAULT, self._limits)
        self._refresh()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("An API key is required, as 'Authorization: Bearer KEY'.")
        given = _digest(key.strip().encode())
        found: Tenant | None = None
        for digest, tenant in self._tenants.items():  # all of them: the time taken tells nothing
            if hmac.compare_digest(digest, given):
                found = tenant
        if found is None:
            raise Unauthorized("The API key is not known here.")
        return found

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
        """Tenants by the digests of their keys."""
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
        return {digest: Tenant(name, replace(self._limits, **limits.get(name, {}))) for digest, name in owners.items()}

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


def _limits(where: str, given: str) -> Iterator[tuple[str, int]]:
    known = [field.name for field in fields(TenantLimits)]
    for pair in given.split():
        name, _, value = pair.partition("=")
        if name not in known:
            raise ApiKeysError(f"{where}: a limit is one of {', '.join(known)}, got {name}")
        yield name, int(value)


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def _file_signature(file: Path | None) -> tuple[int, int, int] | None:
    """What changes when a file does."""
    try:
        found = None if file is None else file.stat()
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)
