"""The documents keep up with the program: every command, page, variable and mechanism is where a reader looks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from attnlab_kernels.catalog import MECHANISMS, has_module

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def command_names() -> list[str]:
    from attnlab_webui.cli import app

    groups = [group.name for group in app.registered_groups if group.name]
    return sorted([command.name for command in app.registered_commands if command.name] + groups)


@pytest.mark.parametrize("name", command_names())
def test_every_command_is_in_the_readme(name):
    assert f"`attnlab {name}" in README


def test_every_page_is_in_the_readme():
    from attnlab_webui.app import PAGES

    for page in PAGES:
        assert page.title in README
        assert f"`/{page.path}" in README, page


def test_every_environment_variable_of_the_settings_is_documented():
    settings = (ROOT / "storage/attnlab_storage/settings.py").read_text()
    documented = README + (ROOT / "DESIGN.md").read_text()
    names = set(re.findall(r"ATTNLAB_[A-Z_]+", settings))
    assert names
    assert not {name for name in names if name not in documented}


def test_pictures_and_files_that_the_documents_name_exist():
    for document in ("README.md", "DESIGN.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), f"{document} names {target}"


def test_the_example_spec_of_the_readme_is_valid():
    from attnlab.spec import parse_spec

    block = README.split("$ cat window.yaml\n")[1].split("\n\n")[0]
    spec = parse_spec("\n".join(line.removeprefix("    ") for line in block.splitlines()))
    assert [point.mechanism for point in spec.points()] == ["multi_head", "sliding_window"]


def test_the_python_module_example_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (example,) = [block for block in blocks if "GroupedQueryAttention" in block]
    subprocess.run([sys.executable, "-c", example], check=True, timeout=120)


def test_the_catalog_and_the_changelog_agree_on_which_modules_there_are():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    for record in MECHANISMS.values():
        assert not has_module(record) or record.class_name in changelog


def test_make_targets_of_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text()
    for document in ("README.md", "CONTRIBUTING.md", "DESIGN.md"):
        for target in re.findall(r"`?make ([a-z-]+)", (ROOT / document).read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE) or target in ("it",), (document, target)


def test_workflow_files_are_yaml():
    for path in [ROOT / "compose.yaml", ROOT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(path.read_text())


def test_every_file_and_test_of_the_fifteen_practices_is_there():
    rows = [line.split("|") for line in (ROOT / "docs/practices.md").read_text().splitlines() if "::" in line]
    assert [int(row[1]) for row in rows] == list(range(1, 16))
    for row in rows:
        for path in re.findall(r"`([\w/]+\.py)`", row[3]):
            assert (ROOT / "lab/attnlab" / path).is_file(), path
        for file, name in re.findall(r"`(\w+\.py)::(\w+)`", row[4]):
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name
