"""The team installation: what is published, who waits for whom, where secrets come from."""

import fnmatch
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from ray.scripts.scripts import cli as ray_commands
from typer.testing import CliRunner

from attnlab_storage.control import dispatcher_beat
from attnlab_webui import cli
from attnlab_workers import dispatcher

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILES = sorted(ROOT.glob("*/Dockerfile"))
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


def text_of(name: str) -> str:
    return (ROOT / SERVICES[name]["build"]["dockerfile"]).read_text()


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined: name, rest."""
    text = dockerfile.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def environment_of(dockerfile: Path) -> dict[str, str]:
    found = {}
    for name, rest in instructions(dockerfile):
        if name == "ENV":
            found |= dict(part.split("=", 1) for part in shlex.split(rest))
    return found


def commands() -> list[list[str]]:
    """Every command that a container starts: of compose.yaml, its health checks and the Dockerfiles."""
    found = [service["command"] for service in SERVICES.values() if "command" in service]
    checks = [service["healthcheck"]["test"] for service in SERVICES.values() if "healthcheck" in service]
    found += [check[1:] for check in checks if check[0] == "CMD"]
    found += [json.loads(rest) for file in DOCKERFILES for name, rest in instructions(file) if name == "CMD"]
    each = []
    for command in found:
        if command[:2] == ["sh", "-c"]:
            parts = command[2].split("&&")
            each += [shlex.split(part.strip().removeprefix("exec ")) for part in parts]
        else:
            each.append(command)
    return [command for command in each if command[0] in ("attnlab", "ray")]


def parsed(group: Any, arguments: list[str]) -> click.Context:
    """The context of the innermost command, with its options read and nothing run."""
    context = group.make_context(group.name, list(arguments), resilient_parsing=False)
    while isinstance(context.command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        assert command is not None
        context = command.make_context(name, rest, parent=context)
    return context


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_is_one_that_its_own_parser_reads(command):
    if command[0] == "ray":
        parsed(ray_commands, command[1:])
    elif command[1] == "dispatch":
        dispatcher._parser().parse_args(command[2:])
    else:
        parsed(typer.main.get_command(cli.app), command[1:])


def test_a_driver_of_ray_has_a_node_of_its_own():
    """Ray looks for the node that a driver joins among the processes of its own container."""
    steps = SERVICES["dispatcher"]["command"][2].split("&&")
    assert [shlex.split(step)[:2] for step in steps] == [["ray", "start"], ["exec", "attnlab"]]
    assert "--num-cpus=0" in steps[0]
    assert "--num-gpus=0" in steps[0]
    assert "--address=auto" in steps[1]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_a_dockerfile_copies_what_is_there_and_installs_extras_that_exist(path):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = path.read_text()
    for name, rest in instructions(path):
        if name == "COPY":
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            assert sources
            assert all((ROOT / source).exists() for source in sources)
    for named in re.findall(r"'\.\[([^\]]+)\]'", text):
        assert set(named.split(",")) <= set(extras)
    for requirement in re.findall(r"'(torch[^']+)'", text):
        assert requirement in extras["worker"]


def test_nothing_that_the_build_needs_is_kept_out_of_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"]
    needed += project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    for path in needed:
        assert (ROOT / path).exists()
        assert not any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
        assert path.split("/")[0] not in ignored


def test_every_variable_is_one_that_the_settings_read():
    source = (ROOT / "storage/attnlab_storage/settings.py").read_text()
    named = {name for file in DOCKERFILES for name in environment_of(file)}
    named |= {name for service in SERVICES.values() for name in service.get("environment", {})}
    ours = {name for name in named if name.startswith("ATTNLAB_")}
    assert {"ATTNLAB_DATABASE_URL", "ATTNLAB_TOKEN", "ATTNLAB_MODELS"} <= ours
    assert all(f'"{name}"' in source for name in ours)


def test_what_is_written_to_belongs_to_who_writes():
    """An empty volume takes its owner from the folder of the image; a folder that is not there is root's."""
    models = environment_of(ROOT / "workers/Dockerfile")["ATTNLAB_MODELS"]
    assert SERVICES["models"]["volumes"] == [f"models:{models}"]
    before = text_of("models").split("USER attnlab")[0]
    assert re.search(rf"mkdir -p {models} && chown attnlab {models}", before)


def test_the_web_pages_health_check_passes_without_a_token(serve, sqlite_store, monkeypatch):
    monkeypatch.setenv("ATTNLAB_TOKEN", "only for people")
    address = serve(sqlite_store)
    (shell, python, option, code) = SERVICES["web"]["healthcheck"]["test"]
    assert (shell, python, option) == ("CMD", "python", "-c")
    here = code.replace("http://127.0.0.1:7860", address)
    assert here != code
    assert subprocess.run([sys.executable, "-c", here], timeout=60, check=False).returncode == 0
    gone = code.replace("http://127.0.0.1:7860", "http://127.0.0.1:9")
    assert subprocess.run(
        [sys.executable, "-c", gone], timeout=60, capture_output=True, check=False
    ).returncode


def test_the_dispatchers_health_check_asks_its_heartbeat(sqlite_store, sqlite_url, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATABASE_URL", sqlite_url)
    command = SERVICES["dispatcher"]["healthcheck"]["test"][2:]
    runner = CliRunner()
    assert runner.invoke(cli.app, command).exit_code == 1
    dispatcher_beat(sqlite_store, "one", {})
    assert runner.invoke(cli.app, command).exit_code == 0
