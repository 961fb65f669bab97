"""The time that Ray Serve adds to a request: `/livez` through Ray and of a server alone, in turns.

    build/ray/bin/python -m benchmarks.ray

(`make ray` makes that environment.) Both serve the base of the settings from one store. Nothing else should run beside.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import ray
from ray import serve

from benchmarks.peers import free_port
from service.client.operations import SESSION_HEADER
from service.ray import HEADER_VARIABLE, app
from service.settings import Settings
from service.wiring import new_embedded

ROUNDS, REQUESTS = 20, 50  # requests that follow each other, to the one and then to the other


def main() -> None:
    """Print the median of both, and what Ray adds in each round: the median and the middle half."""
    with tempfile.TemporaryDirectory() as folder:
        embedded = new_embedded(Settings.load(data_dir=Path(folder)))
        url = embedded.start()
        try:
            with _alone(url, folder) as alone, _on_ray(url, folder) as through_ray:
                rounds = [(_median_ms(alone), _median_ms(through_ray)) for _ in range(ROUNDS)]
        finally:
            embedded.stop()
    added = [with_ray - without for without, with_ray in rounds]
    low, middle, high = statistics.quantiles(added, n=4)
    for name, times in (("alone", [each[0] for each in rounds]), ("through Ray", [each[1] for each in rounds])):
        print(f"{name}: {statistics.median(times):.2f} ms")
    print(f"Ray adds {middle:.2f} ms ({low:.2f} to {high:.2f})")


def _median_ms(url: str) -> float:
    """Return the median time of requests over one connection, in milliseconds."""
    times = []
    with httpx.Client() as http:
        for _ in range(REQUESTS):
            start = time.perf_counter()
            http.get(f"{url}/livez").raise_for_status()
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


@contextmanager
def _alone(redis_url: str, folder: str) -> Iterator[str]:
    port = free_port()
    settings = {"IMPRINT_REDIS_URL": redis_url, "IMPRINT_PORT": str(port), "IMPRINT_DATA_DIR": folder}
    with subprocess.Popen([sys.executable, "-m", "service", "serve"], env=os.environ | settings) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url)
            yield url
        finally:
            process.terminate()


@contextmanager
def _on_ray(redis_url: str, folder: str) -> Iterator[str]:
    os.environ[HEADER_VARIABLE] = SESSION_HEADER
    port = free_port()
    ray.init(num_cpus=2, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app({"redis_url": redis_url, "data_dir": folder}), name="imprint", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def _wait_until_ready(url: str) -> None:
    while True:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


if __name__ == "__main__":
    main()
