"""The team installation: what is published, who waits for whom, where secrets come from."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
LONG_RUNNING = ["postgres", "ray-head", "ray-worker", "dispatcher", "web"]


def test_the_services_of_the_design_are_there():
    assert set(SERVICES) == {*LONG_RUNNING, "migrate", "models"}


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_every_long_running_service_has_a_health_check(name):
    assert SERVICES[name]["healthcheck"]["test"]


def test_only_the_web_page_is_published_and_only_on_loopback():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert list(published) == ["web"]
    assert all(port.startswith("127.0.0.1:") for port in published["web"])


def test_ray_lives_on_a_network_without_a_way_out():
    assert COMPOSE["networks"]["internal"] == {"internal": True}
    for name in ("ray-head", "ray-worker", "dispatcher", "postgres"):
        assert SERVICES[name]["networks"] == ["internal"]


def test_workers_reserve_a_gpu_and_scale():
    deploy = SERVICES["ray-worker"]["deploy"]
    (device,) = deploy["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "ATTNLAB_WORKERS" in deploy["replicas"]


def test_secrets_come_from_the_environment_and_are_required():
    text = (ROOT / "compose.yaml").read_text()
    for secret in ("POSTGRES_PASSWORD", "RAY_AUTH_TOKEN", "ATTNLAB_TOKEN"):
        assert f"${{{secret}:?" in text
        assert f"${{{secret}:-" not in text


def test_everything_waits_for_the_migration():
    for name in ("dispatcher", "web"):
        assert SERVICES[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "build" in service])
def test_every_built_service_names_a_dockerfile_that_exists(name):
    dockerfile = ROOT / SERVICES[name]["build"]["dockerfile"]
    assert dockerfile.is_file()
    assert "USER attnlab" in dockerfile.read_text()
