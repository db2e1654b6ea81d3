"""The team installation: what is published, who waits for whom, where secrets come from."""

import fnmatch
import json
import re
import shlex
import shutil
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
from sqlalchemy import make_url
from typer.testing import CliRunner

from attnlab import environment
from attnlab_storage.control import dispatcher_beat
from attnlab_webui import cli
from attnlab_workers import dispatcher

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
FILES = ("compose.yaml", "compose.cpu.yaml")
DOCKERFILES = sorted(ROOT.glob("*/Dockerfile"))
LONG_RUNNING = ["postgres", "ray-head", "ray-worker", "dispatcher", "web"]


def test_the_services_of_the_design_are_there():
    assert set(SERVICES) == {*LONG_RUNNING, "migrate", "models"}


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_every_long_running_service_has_a_health_check(name):
    assert SERVICES[name]["healthcheck"]["test"]


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_a_health_check_does_not_disturb_what_is_timed(name):
    """`ray health-check` and `attnlab` take a second of a processor and more; a connection takes 30 ms."""
    check = SERVICES[name]["healthcheck"]
    seconds = {
        key: int(check[key].removesuffix("s")) for key in ("interval", "start_interval", "start_period")
    }
    least = {"attnlab": 60, "ray": 60}.get(check["test"][1], 10)
    assert seconds["interval"] >= least
    assert seconds["start_interval"] <= 5 < 60 <= seconds["start_period"]


def test_the_commit_that_is_given_at_the_build_reaches_the_environment_of_the_runs(monkeypatch, tmp_path):
    assert SERVICES["ray-worker"]["build"]["args"] == {"ATTNLAB_COMMIT": "${ATTNLAB_COMMIT:-}"}
    recipe = (ROOT / "workers/Dockerfile").read_text().splitlines()
    assert recipe.index("ARG ATTNLAB_COMMIT=") < recipe.index("ENV ATTNLAB_COMMIT=$ATTNLAB_COMMIT")
    monkeypatch.setenv("ATTNLAB_COMMIT", "c0ffee")
    monkeypatch.setenv("PATH", str(tmp_path))  # an image has no git
    assert environment._commit.__wrapped__() == "c0ffee"
    monkeypatch.setenv("ATTNLAB_COMMIT", "")
    assert environment._commit.__wrapped__() is None


def test_what_serves_has_a_limit_of_memory_and_a_run_has_none():
    limited = {name for name, service in SERVICES.items() if "mem_limit" in service}
    # PostgreSQL's memory is mostly the file cache, which the kernel gives back
    assert limited == set(LONG_RUNNING) - {"postgres", "ray-worker"}


def test_a_worker_is_healthy_once_its_node_listens():
    command, check = SERVICES["ray-worker"]["command"], SERVICES["ray-worker"]["healthcheck"]["test"]
    (port,) = [option.split("=")[1] for option in command if option.startswith("--node-manager-port")]
    assert f"(socket.gethostname(), {port})" in check[-1]
    head = SERVICES["ray-head"]
    assert "--port=6379" in head["command"]
    assert f"('{head['hostname']}', 6379)" in head["healthcheck"]["test"][-1]


def test_a_worker_that_is_told_to_stop_says_goodbye_before_it_is_killed():
    """Ray drains a node for 30 s and Docker kills after 10: the cluster would give the dead node another run."""
    environment = environment_of(ROOT / "workers/Dockerfile")
    assert float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < 10
    assert "stop_grace_period" not in SERVICES["ray-worker"]


@pytest.mark.parametrize("name", ["ray-head", "ray-worker", "dispatcher"])
def test_rays_object_store_fits_into_shared_memory(name):
    """Nothing but small documents goes through it; where it does not fit Ray puts it on the disk."""
    (store,) = set(re.findall(r"--object-store-memory=(\d+)", " ".join(SERVICES[name]["command"])))
    assert int(store) < int(SERVICES[name]["shm_size"].removesuffix("mb")) * 2**20


def test_every_variable_that_is_asked_for_is_explained():
    asked = set(re.findall(r"\$\{([A-Z_]+)", "".join((ROOT / name).read_text() for name in FILES)))
    guide = (ROOT / "docs/team.md").read_text()
    assert {"POSTGRES_PASSWORD", "ATTNLAB_GPUS", "ATTNLAB_PORT"} <= asked
    assert not {name for name in asked if f"| `{name}` |" not in guide}


def test_only_the_web_page_is_published_and_only_on_loopback():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert list(published) == ["web"]
    assert all(port.startswith("127.0.0.1:") for port in published["web"])


def test_ray_lives_on_a_network_without_a_way_out():
    assert COMPOSE["networks"]["internal"] == {"internal": True}
    for name in ("ray-head", "ray-worker", "dispatcher", "postgres"):
        assert SERVICES[name]["networks"] == ["internal"]


def test_one_worker_has_every_gpu():
    """Docker gives `count: 1` the first GPU, in every container: workers side by side would share it."""
    deploy = SERVICES["ray-worker"]["deploy"]
    (device,) = deploy["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert device["count"] == "${ATTNLAB_GPUS:-all}"
    assert "replicas" not in deploy
    assert not any(option.startswith("--num-") for option in SERVICES["ray-worker"]["command"])


class Overlay(yaml.SafeLoader):
    """Reads `!reset` as the tag and what follows."""


Overlay.add_constructor("!reset", lambda _, node: ("reset", node.value))


def test_without_a_gpu_only_the_reservation_goes():
    overlay = yaml.load((ROOT / "compose.cpu.yaml").read_text(), Overlay)
    assert overlay == {
        "services": {"ray-worker": {"deploy": {"resources": {"reservations": {"devices": ("reset", [])}}}}}
    }


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_in_a_container_gains_rights(name):
    service = SERVICES[name]
    assert service["security_opt"] == ["no-new-privileges:true"]
    # the image of PostgreSQL starts as root and becomes its own user
    assert "build" not in service or service["cap_drop"] == ["ALL"]
    assert not {"privileged", "cap_add", "pid", "network_mode", "user"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_comes_back_and_what_runs_once_does_not(name):
    assert SERVICES[name]["restart"] == ("unless-stopped" if name in LONG_RUNNING else "no")


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_says_does_not_fill_the_disk(name):
    assert {"max-size", "max-file"} <= set(SERVICES[name]["logging"]["options"])


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "build" in service])
def test_a_password_may_hold_any_sign(name):
    """In an address `@`, `/` and `%` would have to be escaped; libpq takes the password as it is."""
    environment = SERVICES[name]["environment"]
    url = make_url(environment["ATTNLAB_DATABASE_URL"])
    database = SERVICES["postgres"]["environment"]
    assert (url.username, url.database) == (database["POSTGRES_USER"], database["POSTGRES_DB"])
    assert url.password is None
    assert environment["PGPASSWORD"] == database["POSTGRES_PASSWORD"]


def test_the_database_is_ready_once_it_listens_to_others():
    """While PostgreSQL's image sets the database up, a server answers on the socket and then goes away."""
    check = SERVICES["postgres"]["healthcheck"]["test"]
    assert check[:2] == ["CMD", "pg_isready"]
    assert "--host=127.0.0.1" in check


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


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined: name, rest."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined if line.strip()]


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


def test_torch_is_the_one_that_the_worker_asks_for():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"'(torch[^']+)'", (ROOT / "workers/Dockerfile").read_text())
    assert named in extras["worker"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_a_change_of_the_sources_installs_no_library_again(path):
    """Layers are kept up to the first one that differs: the libraries come before the sources, all of them."""
    steps = [(name, rest) for name, rest in instructions(path) if name in ("COPY", "RUN")]
    # a list of its own: what else changes in pyproject.toml is no reason either
    copies = ["pyproject.toml ./", "--from=requirements requirements.txt ./", ". ./"]
    assert [rest for name, rest in steps if name == "COPY"] == copies
    sources = steps.index(("COPY", ". ./"))
    assert any("--requirement requirements.txt" in rest for _, rest in steps[:sources])
    after = [rest for _, rest in steps[sources + 1 :] if "pip" in rest]
    assert after == ["pip install --no-cache-dir --no-deps ."]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_an_image_installs_what_the_project_asks_for(path, tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    if path.parent.name == "workers":
        wanted += project["optional-dependencies"]["worker"]
    (step,) = [rest for name, rest in instructions(path) if name == "RUN" and "tomllib" in rest]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    lists = step.split("&&")[0].replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    subprocess.run(["sh", "-ec", lists], cwd=tmp_path, check=True)
    assert (tmp_path / "requirements.txt").read_text().splitlines() == wanted


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_an_image_runs_as_a_person_and_not_as_root(path):
    steps = instructions(path)
    assert [rest for name, rest in steps if name == "USER"] == ["attnlab"]
    assert not any("pip" in rest for _, rest in steps[steps.index(("USER", "attnlab")) :])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_what_is_written_to_belongs_to_who_writes(path):
    """An empty volume takes its owner from the folder of the image; a folder that is not there is root's."""
    models = environment_of(path)["ATTNLAB_MODELS"]
    mounted = [volume.split(":")[1] for volume in SERVICES["models"]["volumes"] + SERVICES["web"]["volumes"]]
    assert set(mounted) == {models}
    before = path.read_text().split("USER attnlab")[0]
    assert re.search(rf"mkdir -p {models} && chown attnlab {models}", before)


def kept_out(path: str) -> bool:
    """Whether .dockerignore keeps a file from the build: the last pattern that matches it or a folder above says so."""
    above = [path, *(str(folder) for folder in Path(path).parents)][:-1]
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if pattern.startswith("**/"):
            hit = any(fnmatch.fnmatch(Path(one).name, pattern[3:]) for one in above)
        else:
            hit = any(fnmatch.fnmatch(one, pattern) for one in above if "/" not in one)
        if hit:
            out = not line.startswith("!")
    return out


def test_a_build_gets_what_it_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    files = [project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"]
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        found = [path for path in (ROOT / package).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        assert found
        files += [str(path.relative_to(ROOT)) for path in found]
    assert not [path for path in files if kept_out(path)]


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        ".env.production",
        ".git/config",
        ".attnlab/attnlab.db",
        "dump.sql",
        "lab/attnlab/__pycache__/a.pyc",
    ],
)
def test_a_build_gets_nothing_that_could_be_secret_or_stale(path):
    assert kept_out(path)


def test_every_variable_is_one_that_the_settings_read():
    source = (ROOT / "storage/attnlab_storage/settings.py").read_text()
    named = {name for file in DOCKERFILES for name in environment_of(file)}
    named |= {name for service in SERVICES.values() for name in service.get("environment", {})}
    ours = {name for name in named if name.startswith("ATTNLAB_")}
    assert {"ATTNLAB_DATABASE_URL", "ATTNLAB_TOKEN", "ATTNLAB_MODELS"} <= ours
    assert all(f'"{name}"' in source for name in ours)


def test_the_page_sees_which_models_are_there():
    folder = environment_of(ROOT / "webui/Dockerfile")["ATTNLAB_MODELS"]
    assert SERVICES["web"]["volumes"] == [f"models:{folder}:ro"]


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
