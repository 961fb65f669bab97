"""Settings: sources, precedence, and errors of one line that name the setting, the limit and the value."""

import os
from pathlib import Path

import pytest

from service.settings import Settings, SettingsError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("IMPRINT_")]:
        monkeypatch.delenv(name)


def test_nothing_needs_to_be_set() -> None:
    settings = Settings.load()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.redis_url is None
    assert settings.data_dir.is_absolute()
    assert settings.cache_dir != settings.data_dir


def test_options_override_the_environment_and_the_environment_overrides_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMPRINT_PORT", "9000")
    monkeypatch.setenv("IMPRINT_HOST", "0.0.0.0")
    settings = Settings.load(port=9001, host=None)
    assert (settings.host, settings.port) == ("0.0.0.0", 9001)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPRINT_REDIS_URL", "")
    monkeypatch.setenv("IMPRINT_PORT", "")
    settings = Settings.load()
    assert (settings.redis_url, settings.port) == (None, 8000)


def test_folders_may_start_with_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("IMPRINT_DATA_DIR", "~/sessions")
    assert Settings.load().data_dir == tmp_path / "sessions"


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("PORT", "65536", "65535"),
        ("PORT", "http", "integer"),
        ("DEVICE", "tpu", "'cuda'"),
        ("THREADS", "-1", "0"),
        ("MAX_BATCH", "0", "1"),
        ("MAX_QUEUE", "0", "1"),
        ("MAX_BODY_BYTES", "10", "1024"),
        ("KV_TOKENS", "-5", "0"),
        ("HOT_ROWS", "0", "1"),
        ("HOT_SESSIONS", "1.5", "integer"),
        ("PROOF_RATE", "1.01", "1"),
        ("PROOF_RATE", "nan", "1"),
        ("DRAIN_TIMEOUT_S", "inf", "3600"),
        ("LOG_LEVEL", "loud", "'debug'"),
        ("REDIS_URL", "http://localhost", "redis, rediss, unix"),
    ],
)
def test_a_fault_names_the_variable_the_limit_and_the_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, limit: str
) -> None:
    monkeypatch.setenv(f"IMPRINT_{name}", value)
    with pytest.raises(SettingsError) as fault:
        Settings.load()
    message = str(fault.value)
    assert message.startswith(f"IMPRINT_{name}: ")
    assert limit in message
    assert value.removesuffix("://localhost") in message
    assert "\n" not in message


def test_a_fault_of_an_option_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"^port: .*65535, got '70000'$"):
        Settings.load(port=70000)


def test_all_faults_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPRINT_PORT", "-1")
    monkeypatch.setenv("IMPRINT_DEVICE", "tpu")
    with pytest.raises(SettingsError, match=r"IMPRINT_PORT.*IMPRINT_DEVICE"):
        Settings.load()


def test_an_unknown_variable_is_refused_with_the_likely_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPRINT_MAX_BACH", "4")
    with pytest.raises(SettingsError, match=r"^unknown environment variable IMPRINT_MAX_BACH; .*IMPRINT_MAX_BATCH"):
        Settings.load()


def test_the_clients_variables_are_not_unknown_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPRINT_URL", "http://127.0.0.1:8000")
    Settings.load()


@pytest.mark.parametrize("url", ["redis://me:hunter2@host/0", "amqp://me:hunter2@host/0"])
def test_a_password_is_never_shown(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("IMPRINT_REDIS_URL", url)
    try:
        shown = repr(Settings.load())
    except SettingsError as fault:
        shown = str(fault)
    assert "hunter2" not in shown
