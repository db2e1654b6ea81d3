"""The laws of the house: who may import whom, what stays light, how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "attnlab_kernels": ROOT / "kernels/attnlab_kernels",
    "attnlab_storage": ROOT / "storage/attnlab_storage",
    "attnlab": ROOT / "lab/attnlab",
    "attnlab_workers": ROOT / "workers/attnlab_workers",
    "attnlab_webui": ROOT / "webui/attnlab_webui",
}
MAY_IMPORT = {
    "attnlab_kernels": set(),
    "attnlab_storage": set(),
    "attnlab": {"attnlab_kernels", "attnlab_storage"},
    "attnlab_workers": {"attnlab", "attnlab_kernels", "attnlab_storage"},
    "attnlab_webui": {"attnlab", "attnlab_kernels", "attnlab_storage"},
}
SOURCES = sorted(path for folder in FLOORS.values() for path in folder.rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def run_fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("floor", FLOORS)
def test_no_floor_imports_upward(floor):
    allowed = MAY_IMPORT[floor] | {floor}
    for path in FLOORS[floor].rglob("*.py"):
        above = imported_packages(path) & set(FLOORS) - allowed
        assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)}"


def test_web_sources_never_name_torch_or_ray():
    for path in FLOORS["attnlab_webui"].rglob("*.py"):
        assert not imported_packages(path) & {"torch", "ray", "triton", "transformers"}, path


def test_web_process_loads_neither_torch_nor_ray():
    code = (
        "import sys, attnlab_webui.app, attnlab_webui.api, attnlab_webui.cli\n"
        "print([name for name in ('torch', 'ray', 'triton', 'transformers') if name in sys.modules])"
    )
    assert run_fresh(code) == "[]"


def test_command_line_loads_no_pages():
    """A health check starts it every minute beside runs that are timed."""
    code = (
        "import sys, attnlab_webui.cli\n"
        "print([name for name in ('gradio', 'pandas', 'uvicorn', 'torch', 'ray') if name in sys.modules])"
    )
    assert run_fresh(code) == "[]"


def test_kernels_load_with_triton_blocked():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, attnlab_kernels\n"
        "from attnlab_kernels import MultiHeadAttention\n"
        "layer = MultiHeadAttention(hidden_size=32, num_heads=4)\n"
        "print(tuple(layer(torch.randn(2, 5, 32))[0].shape))"
    )
    assert run_fresh(code) == "(2, 5, 32)"


def test_kernel_package_loads_no_torch():
    code = (
        "import sys, attnlab_kernels, attnlab_kernels.masks, attnlab_kernels.effective_map, "
        "attnlab_kernels.catalog\n"
        "print([name for name in ('torch', 'triton') if name in sys.modules])"
    )
    assert run_fresh(code) == "[]"


def test_floor_folders_are_not_packages():
    for folder in ("lab", "workers", "kernels", "webui", "storage", "tests"):
        assert not (ROOT / folder / "__init__.py").exists(), folder


def test_no_subfolder_shadows_a_library():
    taken = {"triton", "torch", "ray", "gradio", "kernels", "transformers"}
    for folder in FLOORS.values():
        assert not taken & {path.name for path in folder.rglob("*") if path.is_dir()}


def test_no_drawers():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [path for path in SOURCES if path.stem in drawers]


def test_no_file_is_longer_than_500_lines():
    paths = [*SOURCES, *(ROOT / "tests").glob("*.py"), *(ROOT / "webui").rglob("*.js")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert not {name: length for name, length in lengths.items() if length > 500}


def test_median_file_is_short():
    lengths = sorted(len(path.read_text().splitlines()) for path in SOURCES)
    assert lengths[len(lengths) // 2] <= 200


def test_nothing_unpickles():
    for path in SOURCES:
        assert not imported_packages(path) & {"pickle", "cloudpickle", "dill", "joblib"}, path
        assert "allow_pickle=True" not in path.read_text(), path
        assert "trust_remote_code=True" not in path.read_text(), path
