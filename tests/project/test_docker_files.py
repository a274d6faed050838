"""The container files keep their promises: no privileges, nothing writable, no default password, loopback only."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
DOCKER = PROJECT / "docker"
VERSION = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]

sys.path.insert(0, str(DOCKER))
import health  # noqa: E402


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


SERVICES = ("mlflow", "mlflow-user", "ray-head", "ray-worker-1", "ray-worker-2")


# Compose


def test_the_services_are_the_ones_checked_here(compose):
    assert tuple(compose["services"]) == SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_has_privileges_or_a_writable_root(compose, name):
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert not {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc"} & set(service)
    assert service["pids_limit"] > 0


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_mounts_the_host_or_carries_a_secret_in_its_environment(compose, name):
    service = compose["services"][name]
    for volume in service.get("volumes", []):
        assert volume.split(":")[0] in compose["volumes"]
    for key in service.get("environment", {}):
        assert not re.search("PASSWORD|TOKEN|SECRET|KEY", key)


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_alone(compose, name):
    for port in compose["services"][name].get("ports", []):
        assert port.startswith("127.0.0.1:")


def test_no_network_leads_out(compose):
    networks = compose["networks"]
    assert networks["inside"]["internal"] is True
    masquerade = "com.docker.network.bridge.enable_ip_masquerade"
    assert networks["loopback"]["driver_opts"][masquerade] == "false"
    for service in compose["services"].values():
        assert set(service["networks"]) <= set(networks)


@pytest.mark.parametrize("name", ["mlflow", "ray-head", "ray-worker-1", "ray-worker-2"])
def test_every_server_proves_that_it_works(compose, name):
    check = compose["services"][name]["healthcheck"]["test"]
    assert check[:3] == ["CMD", "python", "/app/docker/health.py"]
    assert check[3] == compose["services"][name]["command"][0]
    assert check[3] in health.CHECKS


def test_the_admin_password_stays_with_the_server(compose):
    holders = {
        name
        for name, service in compose["services"].items()
        if "mlflow_admin_password" in service["secrets"]
    }
    assert holders == {"mlflow", "mlflow-user"}
    for secret in compose["secrets"].values():
        assert secret["file"].startswith("secrets/")


# Kubernetes


def pods(document):
    """Every pod template of a RayCluster or RayJob."""
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    templates = [group["template"] for group in groups]
    return templates + [spec[key] for key in ("submitterPodTemplate",) if key in spec]


@pytest.mark.parametrize(("file", "kind"), [("raycluster", "RayCluster"), ("rayjob", "RayJob")])
def test_pods_are_shut_in(file, kind):
    document = yaml.safe_load((DOCKER / "kuberay" / f"{file}.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    for pod in pods(document):
        assert pod["spec"]["automountServiceAccountToken"] is False
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert container["image"] == f"syncbn:{VERSION}"
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
            for variable in container.get("env", []):
                assert "secretKeyRef" in variable["valueFrom"]


@pytest.mark.parametrize("file", ["raycluster", "rayjob"])
def test_clusters_ask_for_a_token_and_name_the_pinned_ray(file):
    spec = yaml.safe_load((DOCKER / "kuberay" / f"{file}.yaml").read_text())["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}\n" in (PROJECT / "constraints.txt").read_text()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["exec"]["command"][2] in health.CHECKS


def test_one_run_and_the_standing_cluster_are_the_same_cluster():
    standing, single = (
        yaml.safe_load((DOCKER / "kuberay" / f"{name}.yaml").read_text())["spec"]
        for name in ("raycluster", "rayjob")
    )
    assert single["rayClusterSpec"] == standing


# Image


def test_the_image_ends_as_a_user_with_a_health_check():
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    steps = [line.split(maxsplit=1) for line in lines if re.match("[A-Z]+ ", line)]
    names = [name for name, _ in steps]
    assert "RUN" not in names[names.index("USER") :]
    assert dict(steps)["USER"] == "${UID}:${UID}"
    assert "HEALTHCHECK" in names
    assert ["ARG", "UID=1000"] in steps


def test_the_image_names_no_index_and_takes_pinned_versions():
    text = (DOCKER / "Dockerfile").read_text()
    assert "--constraint constraints.txt" in text
    assert not re.search(r"index-url|find-links|https?://|:latest|PASSWORD|TOKEN=", text)


def test_only_named_files_enter_the_image():
    lines = (PROJECT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert rules.index("docker/secrets") > rules.index("!docker")
    for rule in rules:
        assert (PROJECT / rule.lstrip("!")).exists() or not rule.startswith("!")


def test_secrets_are_not_in_git_and_not_sent_with_a_job():
    assert "/docker/secrets/" in (PROJECT / ".gitignore").read_text().splitlines()
