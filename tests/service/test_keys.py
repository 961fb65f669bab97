"""API keys: making, reading, comparing and rotating them."""

from __future__ import annotations

import hmac
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.app import run
from service.errors import Unauthorized
from service.settings import Settings
from service.tenants import DEFAULT, ApiKeys, ApiKeysError, Tenant, TenantLimits, new_key


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_a_key_is_compared_with_every_hash_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [new_key(owner) for owner in ("a", "b", "c")]
    keys = ApiKeys(Settings(api_keys=",".join(line for _, line in pairs)))
    compared: list[str] = []
    compare = hmac.compare_digest

    def recording(stored: str, given: str) -> bool:
        compared.append(stored)
        return compare(stored, given)

    monkeypatch.setattr(hmac, "compare_digest", recording)
    for (key, _), owner in zip(pairs, "abc", strict=True):
        assert keys.tenant(bearer(key)).name == owner
    with pytest.raises(Unauthorized):
        keys.tenant(bearer("imp_wrong"))
    assert compared == [line.split(":")[1] for _, line in pairs] * 4
    assert not any(key in line for key, line in pairs)


def test_keys_rotate_while_the_server_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    (old, old_line), (new, new_line) = new_key("acme"), new_key("acme")
    file.write_text(old_line)
    keys = ApiKeys(Settings(api_keys_file=file))

    def is_accepted(key: str) -> bool:
        try:
            return keys.tenant(bearer(key)).name == "acme"
        except Unauthorized:
            return False

    assert (is_accepted(old), is_accepted(new)) == (True, False)
    file.write_text(f"{old_line}\n{new_line}\n")
    assert (is_accepted(old), is_accepted(new)) == (True, True)
    file.write_text(f"{new_line}\n")
    assert (is_accepted(old), is_accepted(new)) == (False, True)
    for fault in ("acme:nonsense\n", None):
        file.write_text(fault) if fault else file.unlink()
        assert (is_accepted(old), is_accepted(new)) == (False, True)
        assert "stay as they were" in caplog.text
        caplog.clear()
    file.write_text("# nobody\n")
    assert (is_accepted(old), is_accepted(new)) == (False, False)


HASH, OTHER = "ab" * 32, "cd" * 32


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("", "hold no key"),
        ("# acme", "hold no key"),
        ("acme", "TENANT:SHA256"),
        (f"acme/x:{HASH}", "TENANT:SHA256"),
        (f"acme:{HASH[:-1]}", "TENANT:SHA256"),
        (f"acme:{HASH} sessions=-1", "TENANT:SHA256"),
        (f"acme:{HASH} speed=1", "one of sessions, bytes, tokens_per_minute, requests, recall, got speed"),
        (f"acme:{HASH} recall=2", "recall is 0 or 1, got 2"),
        (f"acme:{HASH}\nbo:{HASH}", "line 2: this key belongs to another tenant"),
        (f"acme:{HASH} bytes=1\nacme:{OTHER} bytes=2", "line 2: bytes of acme was 1 before, and is 2 here"),
    ],
)
def test_faulty_keys_stop_the_start_with_one_line(tmp_path: Path, lines: str, reason: str) -> None:
    file = tmp_path / "keys"
    file.write_text(lines)
    with pytest.raises(ApiKeysError) as fault:
        ApiKeys(Settings(api_keys_file=file))
    assert reason in str(fault.value)
    assert "\n" not in str(fault.value) and HASH[:-1] not in str(fault.value)


def test_a_tenants_own_limits_override_the_settings() -> None:
    (key, line), (plain, other) = new_key("acme"), new_key("bo")
    keys = ApiKeys(
        Settings(api_keys=f"{line} bytes=5 sessions=0,{other} recall=0", tenant_sessions=3, tenant_requests=4)
    )
    assert keys.tenant(bearer(key)) == Tenant("acme", TenantLimits(sessions=0, bytes=5, requests=4))
    assert keys.tenant(bearer(plain)) == Tenant("bo", TenantLimits(sessions=3, requests=4), recall=False)


def test_without_keys_everybody_is_the_default_tenant() -> None:
    assert ApiKeys(Settings()).tenant(None) == ApiKeys(Settings()).tenant("Bearer none") == Tenant(DEFAULT)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_keys_no_other_machine_is_served(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Settings(host=host, port=0, data_dir=tmp_path / "data")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"imprint: {host} can be reached from other machines")
    assert "imprint keys new" in line and "IMPRINT_API_KEYS_FILE" in line
    assert not (tmp_path / "data").exists()


# --- the command line ---


def imprint(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("IMPRINT_")}
    command = [sys.executable, "-m", "service", *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=60)


def test_a_new_key_goes_to_the_terminal_and_its_hash_to_the_file() -> None:
    result = imprint("keys", "new", "acme")
    (key,) = re.findall(r"imp_\S+", result.stderr)
    assert "imp_" not in result.stdout
    assert ApiKeys(Settings(api_keys=result.stdout)).tenant(f"Bearer {key}").name == "acme"
    failure = imprint("keys", "new", "a/b")
    assert failure.returncode == 1 and "'a/b'" in failure.stderr and "Traceback" not in failure.stderr
