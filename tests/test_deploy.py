"""The deployment files agree with the server and are valid: the real tools read them, without a cluster or engine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.build import PAGE, files
from service.client.operations import SESSION_HEADER
from service.http.middleware import PUBLIC_PATHS
from service.metrics import Metrics
from service.settings import Settings
from service.tenants import new_key

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
ENDINGS = ("", "_bucket", "_sum", "_count")  # suffixes of a histogram's series


def tool(name: str, *arguments: object) -> str:
    """Run a program of the environment and return its output; fail with its messages if it fails."""
    program = Path(sysconfig.get_path("scripts")) / name
    done = subprocess.run([program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


# --- Grafana ----------------------------------------------------------------------------------------------------------


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (DEPLOY / "grafana" / "dashboards").glob("*.json")}


def test_the_dashboards_are_what_their_source_makes() -> None:
    """Grafana's dashboards and the data of the server's own dashboard come from one description."""
    generated = files()
    assert {path.stem for path in generated if path != PAGE} == dashboards().keys()
    for path, text in generated.items():
        assert path.read_text() == text, "run: python -m deploy.grafana.build"


def test_the_servers_page_has_the_panels_that_grafana_has_and_every_alert() -> None:
    page = json.loads(PAGE.read_text())
    for dashboard in page["dashboards"]:
        panels = [panel for row in dashboard["rows"] for panel in row["panels"]]
        of_grafana = [panel for panel in dashboards()[dashboard["id"]]["panels"] if panel["type"] != "row"]
        for own, other in zip(panels, of_grafana, strict=True):
            assert (own["title"], own["description"]) == (other["title"], other["description"])
            queried = [re.findall(r"imprint_\w+", query) for query in own["queries"].values()]
            assert queried == [re.findall(r"imprint_\w+", target["expr"]) for target in other["targets"]]
    assert len(page["dashboards"]) == len(dashboards())
    assert [alert["name"] for alert in page["alerts"]] == [alert["alert"] for alert in alerts()]
    assert all(alert["query"] and alert["runbook"] for alert in page["alerts"])


@pytest.mark.parametrize("name", sorted(dashboards()))
def test_grafanas_models_know_every_field_of_a_dashboard(name: str) -> None:
    """Grafana's models drop unknown fields, so a dashboard without unknown fields comes back unchanged."""
    dashboard = dashboards()[name]
    assert json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard))) == dashboard


def test_panels_have_unique_ids_and_positions_and_a_description() -> None:
    for dashboard in dashboards().values():
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        cells = [
            (x, y)
            for panel in panels
            for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        ]
        assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
        assert all(panel["description"] and panel["targets"] for panel in panels if panel["type"] != "row")


def exposed() -> set[str]:
    """Return the names of all series that a server can expose."""
    return {metric.name + ending for metric in Metrics().described for ending in ENDINGS}


def test_dashboards_and_alerts_query_existing_metrics() -> None:
    texts = [path.read_text() for path in DEPLOY.rglob("*") if path.suffix in (".json", ".yml", ".yaml")]
    queried = {name for text in texts for name in re.findall(r"\bimprint_[a-z_]+\b", text)}
    assert queried and queried <= exposed()


# --- Prometheus -------------------------------------------------------------------------------------------------------


def alerts() -> list[dict[str, Any]]:
    return [rule for group in read("deploy/prometheus/alerts.yml")["groups"] for rule in group["rules"]]


def test_every_alert_has_a_severity_a_summary_and_a_runbook() -> None:
    for alert in alerts():
        assert alert["labels"]["severity"] in ("page", "ticket"), alert
        assert alert["annotations"].keys() == {"summary", "runbook"}, alert


def test_every_alert_fires_on_a_bad_day_and_none_on_a_good_one() -> None:
    bad, good = read("tests/deploy/alerts.yml")["tests"]
    firing = {sample["labels"] for sample in bad["promql_expr_test"][0]["exp_samples"]}
    assert firing == {f'{{alertname="{alert["alert"]}"}}' for alert in alerts()}
    assert good["promql_expr_test"][0] == {"expr": "ALERTS", "eval_time": "2h", "exp_samples": []}
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian's package prometheus) is not installed")
    for command in (("check", "rules", "deploy/prometheus/alerts.yml"), ("test", "rules", "tests/deploy/alerts.yml")):
        done = subprocess.run(["promtool", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_accepts_the_configurations(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian's package prometheus) is not installed")
    for name in ("prometheus.yml", "kubernetes.yml"):
        config = read(f"deploy/prometheus/{name}")
        for job in config["scrape_configs"]:
            job.pop("kubernetes_sd_configs", None)  # Debian's build has no Kubernetes service discovery
        (tmp_path / name).write_text(yaml.safe_dump(config))
        command = ["promtool", "check", "config", "--syntax-only", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# --- containers -------------------------------------------------------------------------------------------------------


def test_compose_accepts_the_files_and_starts_every_service() -> None:
    config = yaml.safe_load(tool("docker-compose", "-f", "docker-compose.yml", "config"))
    assert config["services"].keys() == {"server", "redis", "prometheus", "grafana"}
    for service in config["services"].values():
        assert service["healthcheck"]["test"]
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ()))
        mounts = [volume for volume in service["volumes"] if volume["type"] == "bind"]
        assert all(Path(mount["source"]).exists() and mount["read_only"] for mount in mounts)
    cuda = tool("docker-compose", "-f", "docker-compose.yml", "-f", "docker/compose.cuda.yml", "config")
    server = yaml.safe_load(cuda)["services"]["server"]
    assert (
        server["build"]["args"]["VARIANT"] == server["image"].split(":")[1] == server["environment"]["IMPRINT_DEVICE"]
    )


def test_no_container_of_compose_may_more_than_it_needs() -> None:
    services = yaml.safe_load(tool("docker-compose", "-f", "docker-compose.yml", "config"))["services"]
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["user"].split(":")[0]) > 0, name
        assert int(service["mem_limit"]) > 0 and service["pids_limit"] > 0, name
        assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"}, name
        written = [volume["target"] for volume in service["volumes"] if not volume.get("read_only")]
        assert written, f"{name} has no volume to write to"
        assert not [key for key in service.get("environment", {}) if re.search("PASSWORD|SECRET|TOKEN", key)], name
    # A store without a password is for the server alone, and has no way out.
    assert [name for name, service in services.items() if "store" in service["networks"]] == ["redis", "server"]
    assert services["redis"]["networks"].keys() == {"store"}
    assert read("docker-compose.yml")["networks"] == {"store": {"internal": True}}
    grafana = services["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == grafana["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert grafana["GF_AUTH_BASIC_ENABLED"] == "false" and grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_a_store_with_a_limit_fits_its_container(rendered: list[Any]) -> None:
    """Valkey refuses writes at `maxmemory`; without it the kernel would kill Valkey at the container's limit."""
    (container,) = find(rendered, "StatefulSet", "valkey")["spec"]["template"]["spec"]["containers"]
    assert "--maxmemory 3gb" in container["args"] and container["resources"]["limits"]["memory"] == "4Gi"
    store = read("docker-compose.yml")["services"]["redis"]
    assert store["command"][2:] == ["--maxmemory", "3gb"] and store["mem_limit"] == "4g"


def test_the_services_of_compose_can_reach_each_other() -> None:
    services = read("docker-compose.yml")["services"]

    def mount_source(service: str, inside: str) -> str:
        """Return the source of the mount at or above a path in a container."""
        mounts = {mount.split(":")[1]: mount.split(":")[0] for mount in services[service]["volumes"]}
        return str(next(source for target, source in mounts.items() if Path(inside).is_relative_to(target)))

    (job,) = read("deploy/prometheus/prometheus.yml")["scrape_configs"]
    key_file = job["authorization"]["credentials_file"]
    assert f"METRICS_KEY_FILE={key_file}" in (ROOT / "Dockerfile").read_text()
    assert mount_source("server", key_file) == mount_source("prometheus", key_file)
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    (source,) = read("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == read("deploy/prometheus/prometheus.yml")["global"]["scrape_interval"]
    (provider,) = read("deploy/grafana/provisioning/dashboards/imprint.yml")["providers"]
    assert mount_source("grafana", provider["options"]["path"]) == "./deploy/grafana/dashboards"


def test_the_dockerfile_follows_the_rules_of_its_linter() -> None:
    tool("hadolint", "Dockerfile")


# --- Kubernetes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the example's resources as kubectl would apply them."""
    folder = tmp_path_factory.mktemp("cluster") / "kubernetes"
    shutil.copytree(DEPLOY / "kubernetes", folder, ignore=shutil.ignore_patterns("keys"))
    (folder / "example" / "keys").write_text(new_key("acme")[1])
    if request.param == "cuda":
        with (folder / "example" / "kustomization.yaml").open("a") as file:
            file.write("components: [../cuda]\n")
    manifest = folder / "all.yaml"
    manifest.write_text(tool("kubectl", "kustomize", folder / "example"))
    tool("kubernetes-validate", "--strict", manifest)
    return list(yaml.safe_load_all(manifest.read_text()))


def find(resources: list[Any], kind: str, name: str = "imprint") -> Any:
    """Return the only resource of the kind whose name starts with `name`."""
    (resource,) = [each for each in resources if each["kind"] == kind and each["metadata"]["name"].startswith(name)]
    return resource


def test_the_pods_end_gracefully_and_agree_with_the_servers_settings(
    rendered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = find(rendered, "ConfigMap")["data"]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    pod = find(rendered, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    pre_stop_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= pre_stop_s + settings.drain_timeout_s + 15
    assert container["image"] == f"imprint:{settings.device}"
    assert container["ports"] == [{"name": "http", "containerPort": settings.port}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in PUBLIC_PATHS
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(settings.api_keys_file.parent if settings.api_keys_file else None) in mounts
    scaler = find(rendered, "HorizontalPodAutoscaler")["spec"]
    assert scaler["minReplicas"] > find(rendered, "PodDisruptionBudget")["spec"]["maxUnavailable"]
    (metric,) = scaler["metrics"]
    (rule,) = read("deploy/kubernetes/prometheus-adapter.yaml")["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert int(metric["pods"]["target"]["averageValue"]) <= settings.max_batch


def test_every_selector_finds_its_pods_and_no_pod_may_more_than_it_needs(rendered: list[Any]) -> None:
    pods = [find(rendered, "Deployment"), find(rendered, "StatefulSet", "valkey")]
    labels = [pod["spec"]["template"]["metadata"]["labels"] for pod in pods]
    for resource in rendered:
        spec = resource.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector"))
        if selector is not None:
            assert selector.get("matchLabels", selector) in labels, resource["metadata"]
    for pod in pods:
        spec = pod["spec"]["template"]["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] and security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert not [entry for entry in container.get("env", ()) if "PASSWORD" in entry["name"] and "value" in entry]
    policies = [resource["spec"] for resource in rendered if resource["kind"] == "NetworkPolicy"]
    for pod in labels:
        (policy,) = [each for each in policies if each["podSelector"]["matchLabels"] == pod]
        assert policy["policyTypes"] == ["Ingress", "Egress"] and policy["ingress"]


def test_the_examples_valkey_is_configured_like_dockers(rendered: list[Any]) -> None:
    (container,) = find(rendered, "StatefulSet", "valkey")["spec"]["template"]["spec"]["containers"]
    lines = (ROOT / "docker" / "redis.conf").read_text().splitlines()
    options = {line for line in lines if line and not line.startswith(("#", "bind"))}
    assert options < {argument.removeprefix("--") for argument in container["args"]}


# --- Ray --------------------------------------------------------------------------------------------------------------


def test_the_files_for_ray_agree_with_each_other_and_with_the_settings() -> None:
    config, service = read("deploy/ray/serve.yaml"), read("deploy/ray/rayservice.yaml")["spec"]
    assert yaml.safe_load(service["serveConfigV2"])["applications"] == config["applications"]
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    assert application["import_path"] == "service.ray:app"
    settings = Settings(**application["args"])
    assert settings.redis_url and settings.drain_timeout_s < deployment["graceful_shutdown_timeout_s"]
    cluster = service["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["enableServiceLinks"] is False, "a service's variables would be unknown settings"
        variables = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert variables["RAY_SERVE_SESSION_ID_HEADER_KEY"] == SESSION_HEADER
    (pinned,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ray"]
    assert f">={'.'.join(cluster['rayVersion'].split('.')[:2])}," in pinned
