"""A session as a file: safetensors with a manifest in the metadata. Every part is checked, no part is executed."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from model.episodes import MEANINGS
from model.memory import MemoryConfig
from model.memory.config import SESSION_SCALARS_SUFFIX
from service.engine.stored_rows import is_valid_site
from service.errors import BadRequest
from service.store.base import RowBatch, StoredSession
from service.turns.action_ids import MAX_TAGS, TAG_DIGITS

FORMAT = 1
NAME = "imprint"  # the manifest's key in the file's metadata
MAX_BRACKETS = 100  # in a manifest, so that it is neither deep nor large; an export has 2
COUNTS = ("version", "tokens_learned", "proof_tokens", "requests")
SUMS = ("loss_sum", "frozen_loss_sum", "created", "updated")
Arrays = dict[str, NDArray[Any]]
Json = dict[str, Any]


def pack_session(stored: StoredSession, key: str) -> bytes:
    """Return the file of a session, signed if there is a key. The session's options stay with the server."""
    arrays: Arrays = {}
    for site, batch in stored.sites.items():
        arrays[f"{site}.slots"], arrays[f"{site}.rows"] = batch.slots, np.ascontiguousarray(batch.data)
    manifest: Json = {"format": FORMAT} | asdict(stored.meta)
    del manifest["options"]
    manifest["sha256"] = _checksum(manifest, arrays).hex()
    if key:
        manifest["hmac-sha256"] = _signature(manifest["sha256"], key)
    return save(arrays, {NAME: json.dumps(manifest)})


def read_export(data: bytes, key: str) -> tuple[Json, Arrays]:
    """Return the manifest and the arrays of a file. Raises BadRequest for a damaged, unknown or unsigned file."""
    try:
        arrays: Arrays = load(data)
        size = int.from_bytes(data[:8], "little")
        text = json.loads(data[8 : 8 + size])["__metadata__"][NAME]
        if text.count("[") + text.count("{") > MAX_BRACKETS:
            raise ValueError
        manifest = json.loads(text)
    except (SafetensorError, AttributeError, ValueError, LookupError, TypeError) as error:
        raise _invalid_export(f"is no export of a session, or a damaged one ({type(error).__name__})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise _invalid_export(f"has format {str(found)[:20]}, this release reads {FORMAT}", "unknown_export_format")
    claimed_checksum, signature = manifest.pop("sha256", None), manifest.pop("hmac-sha256", None)
    if claimed_checksum != _checksum(manifest, arrays).hex():
        raise _invalid_export("is damaged: its content does not match its checksum", "checksum_mismatch")
    if key and not hmac.compare_digest(str(signature).encode(), _signature(claimed_checksum, key).encode()):
        raise _invalid_export("is not signed with this server's IMPRINT_EXPORT_KEY", "bad_signature")
    return _checked(manifest), arrays


def unpack_session(
    manifest: Json, arrays: Arrays, config: MemoryConfig, vocab_size: int
) -> tuple[Json, dict[str, RowBatch]]:
    """Return the manifest and the rows of an export. Raises BadRequest for rows that no memory writes."""
    sites = _sites(arrays, config, vocab_size)
    rows = {site: batch for site, batch in sites.items() if not site.endswith(SESSION_SCALARS_SUFFIX)}
    manifest["rows"] = sum(len(batch.slots) for site, batch in rows.items() if site != MEANINGS)
    manifest["bytes"] = sum(batch.data.nbytes for batch in rows.values())
    return manifest, sites


def _checksum(manifest: Mapping[str, Any], arrays: Arrays) -> bytes:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.digest()


def _signature(checksum: str, key: str) -> str:
    return hmac.new(key.encode(), checksum.encode(), hashlib.sha256).hexdigest()


def _checked(manifest: Json) -> Json:
    """Return the manifest if a session may have its values: a checksum does not prove that. Raises BadRequest."""
    for name in COUNTS:
        if type(manifest.get(name)) is not int or not 0 <= manifest[name] < 2**53:
            raise _invalid_export(f"has a {name} that is no count")
    for name in SUMS:
        if type(manifest.get(name)) is not float or not math.isfinite(manifest[name]):
            raise _invalid_export(f"has a {name} that is no number")
    # An earlier release did not count actions. There was at most one action a version, and the ids had no tag.
    version = manifest["version"]
    actions, tags = manifest.get("actions", version), manifest.get("action_tags", [[version, ""]])
    if type(actions) is not int or not 0 <= actions < 2**53:
        raise _invalid_export("has actions that are no count")
    if not isinstance(tags, list) or len(tags) > MAX_TAGS or not all(map(_is_action_tag, tags)):
        raise _invalid_export("has action_tags that are none")
    digests = manifest.get("digests")
    if not isinstance(digests, list) or len(digests) > 4096 or not all(map(_is_digest, digests)):
        raise _invalid_export("has digests that are none")
    if not isinstance(manifest.get("model"), str) or not isinstance(manifest.get("id"), str):
        raise _invalid_export("does not say of which model or session it is")
    action_tags = tuple((number, tag) for number, tag in tags)
    return manifest | {"digests": tuple(digests), "actions": actions, "action_tags": action_tags}


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 16 and set(value) <= set("0123456789abcdef")


def _is_action_tag(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    number, tag = value
    return type(number) is int and 0 <= number < 2**53 and isinstance(tag, str) and len(tag) <= TAG_DIGITS


def _sites(arrays: Arrays, config: MemoryConfig, vocab_size: int) -> dict[str, RowBatch]:
    sites: dict[str, RowBatch] = {}
    for name in {name.rpartition(".")[0] for name in arrays}:
        slots, rows = arrays.get(f"{name}.slots"), arrays.get(f"{name}.rows")
        if slots is None or rows is None:
            raise _invalid_export(f"has no sound site {name[:40]!r}")
        try:
            batch = RowBatch(slots, rows)
        except ValueError as error:
            raise _invalid_export(f"has a site {name[:40]!r} that is none: {error}") from None
        if not is_valid_site(name, batch, config, vocab_size):
            raise _invalid_export(f"has rows of site {name[:40]!r} that no memory writes")
        sites[name] = batch
    if len(arrays) != 2 * len(sites):
        raise _invalid_export("has arrays that belong to no site")
    return sites


def _invalid_export(what: str, code: str = "invalid_export") -> BadRequest:
    return BadRequest(f"The file {what}.", param="body", code=code)
