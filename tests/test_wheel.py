"""The wheel is complete: installed into a fresh environment, it serves from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.live import wait_until
from tests.service.valkeys import free_ports

ROOT = Path(__file__).resolve().parent.parent
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")

Imprint = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True)
    (file,) = folder.glob("imprint-*.whl")
    return file


@pytest.fixture(scope="module")
def imprint(wheel: Path) -> Imprint:
    """Return a function that starts `imprint` of a fresh environment in an empty folder.

    The fresh environment shares the dependencies of this one.
    """
    folder = wheel.parent
    environment = folder / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    subprocess.run([*PIP, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file is not searched for further .pth files, such as the one of an editable install.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
    # Kernels that this checkout has compiled are those of the wheel: to compile them again takes a minute.
    for kernel in sorted(ROOT.glob("model/**/__pycache__/*.nb[ci]")):
        copy = packages / kernel.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(kernel, copy)
    empty = folder / "empty"
    empty.mkdir()

    def start(*arguments: str, **settings: object) -> subprocess.Popen[str]:
        variables = {f"IMPRINT_{name.upper()}": str(value) for name, value in settings.items()}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("IMPRINT_", "PYTHON"))}
        command = [str(environment / "bin" / "imprint"), *arguments]
        return subprocess.Popen(command, cwd=empty, env=inherited | variables, text=True, stdout=-1, stderr=-1)

    return start


def test_it_holds_every_file_of_the_packages(wheel: Path) -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    files = [path for name in packages["packages"] for path in (ROOT / name).rglob("*") if path.is_file()]
    expected = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert any(name.endswith(".safetensors") for name in expected)
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_its_doctor_finds_no_fault(imprint: Imprint, tiny_base: Path) -> None:
    (port,) = free_ports(1)
    stdout, stderr = imprint("doctor", "--json", model=tiny_base, port=port).communicate()
    report = json.loads(stdout)
    assert report["healthy"], report
    assert not stderr


def test_it_serves(imprint: Imprint, tiny_base: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    server = imprint("serve", model=tiny_base, port=port, data_dir=tmp_path / "data", threads=1)

    def ready() -> bool:
        assert server.poll() is None, server.communicate()
        try:
            return httpx.get(f"{url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(ready)
        learned = httpx.post(f"{url}/v1/sessions/ada/observe", json={"text": "A fox."}, timeout=60)
        assert learned.json()["version"] == 1, learned.text  # the wheel has the store's scripts
        page = httpx.get(url)
        assert page.status_code == 200 and "text/html" in page.headers["content-type"]
    finally:
        server.terminate()
        server.communicate()
    assert server.returncode == 0
