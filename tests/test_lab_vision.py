"""Vision transformers in experiments: what they read, what their patches are called, and that their maps are theirs."""

import base64
import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from attnlab.bundled import MARKER, describe_model, is_fetched, model_folder
from attnlab.hook import Hook, LayerCall
from attnlab.models import LoadedModel, ModelError, load_model
from attnlab.pictures import SAMPLES_FOLDER, open_picture
from attnlab.probes.maps import capture_call, refine
from attnlab.run import run_here
from attnlab.spec import parse_spec
from attnlab.subjects.forward import ForwardSubject, read_input
from attnlab.subjects.vision import fitted, pixel_values, read_image
from attnlab.swap import Swap
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_kernels.operations.softmax.api import Unsupported
from attnlab_storage import results
from attnlab_storage.database import Store

SMALL: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40, "image_size": 24,
    "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    key: value for key, value in SMALL.items() if not key.endswith(("image_size", "patch_size"))
} | {"vocab_size": 97}


@pytest.fixture(scope="module")
def digits() -> LoadedModel:
    return load_model("vit-digits")


@pytest.fixture(scope="module")
def training() -> ModuleType:
    """The script that made the weights."""
    pytest.importorskip("sklearn", reason="the digits ship in scikit-learn, which is not installed")
    path = Path(__file__).parent.parent / "examples/train_vit_digits.py"
    found = importlib.util.spec_from_file_location("train_vit_digits", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def spec_of(model: str = "vit-digits", **given: Any) -> Any:
    return parse_spec({"name": "x", "model": model, "input": given, "vary": {"mechanism": "multi_head"}})


def assert_maps_are_the_models_own(loaded: LoadedModel, arguments: dict[str, Any]) -> None:
    """Every map as it would be stored is within 1e-5 of output_attentions, the answer within 2e-4."""
    model, calls = loaded.model, list[LayerCall]()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        own = model(**arguments, output_attentions=True)
        hook = Hook(model, Swap())
        with hook.installed():
            ours = hook.forward(lambda: model(**arguments), calls.append)
    assert (ours[0] - own[0]).abs().max() < 2e-4
    assert len(calls) == len(own.attentions) > 0
    for call, attentions in zip(calls, own.attentions, strict=True):
        query, key = call.query[0].numpy(), call.key[0].numpy()
        _, (_, lse, _) = refine(capture_call(call), query, key, torch.device("cpu"))
        for head in range(len(query)):
            made = SoftmaxMap(query[head], key[head], lse[head], call.scale, call.mask)
            assert np.abs(made.tile(slice(None), slice(None)) - attentions[0, head].numpy()).max() < 1e-5


def test_the_bundled_weights_read_held_out_digits(digits: LoadedModel, training: ModuleType) -> None:
    images, labels = training.split_digits()["held_out"]
    with torch.inference_mode():
        found = digits.model(training.pixel_values(images)).logits.argmax(-1).numpy()
    accuracy = float((found == labels).mean())
    assert accuracy >= 0.95
    stored = json.loads((model_folder("vit-digits") / MARKER).read_text(encoding="utf-8"))
    assert stored["held_out_accuracy"] == pytest.approx(accuracy, abs=1.5 / len(labels))
    assert stored["split"]["held_out"] == len(labels) == 360


def test_the_parts_are_a_partition_of_the_digits(training: ModuleType) -> None:
    parts = training.split_digits()
    assert [len(part[1]) for part in parts.values()] == [1257, 180, 360]
    together = np.concatenate([part[0].reshape(len(part[0]), -1) for part in parts.values()])
    everything = (training.load_digits().images * (255 / 16)).round().astype(np.uint8).reshape(1797, -1)
    assert np.array_equal(np.unique(together, axis=0), np.unique(everything, axis=0))


def test_a_sample_reads_as_it_did_in_training(digits: LoadedModel, training: ModuleType) -> None:
    images, labels = training.split_digits()["held_out"]
    for digit in range(10):
        given = read_image(digits, spec_of(image=f"digit-{digit}"))
        first = images[int(np.flatnonzero(labels == digit)[0])]
        assert torch.equal(given.arguments["pixel_values"], training.pixel_values(first[None]))


def test_the_model_needs_no_fetching_and_is_small() -> None:
    assert is_fetched("vit-digits")
    assert (model_folder("vit-digits") / "model.safetensors").stat().st_size < 1_000_000
    found, told = describe_model("vit-digits"), describe_model(str(model_folder("vit-digits")))
    assert found is not None
    assert told is not None
    assert (found.layers, found.heads, found.head_dim, found.context, found.reads) == (4, 4, 16, 17, "image")
    assert (told.layers, told.heads, told.head_dim, told.context, told.reads) == (4, 4, 16, 17, "image")


@pytest.mark.parametrize(("image", "size"), [("digit-3", None), ("digit-8", 8), ("astronaut", 22)])
def test_maps_of_a_vision_transformer_are_its_own(digits: LoadedModel, image: str, size: int | None) -> None:
    assert_maps_are_the_models_own(digits, read_image(digits, spec_of(image=image, size=size)).arguments)


def test_patches_are_named_by_row_and_column(digits: LoadedModel) -> None:
    names = read_image(digits, spec_of(image="astronaut", size=6)).streams["patches"].tokens
    assert names == ["[CLS]", "0,0", "0,1", "0,2", "1,0", "1,1", "1,2", "2,0", "2,1", "2,2"]


def test_a_size_that_is_no_whole_number_of_patches_is_refused(digits: LoadedModel) -> None:
    with pytest.raises(
        ModelError, match=r"input.size: must be a multiple of 2, the patches of vit-digits, got 7"
    ):
        read_image(digits, spec_of(image="digit-1", size=7))


def test_a_changed_patch_moves_its_own_column(digits: LoadedModel, tmp_path: Path) -> None:
    """Row and column of a name are those of the picture: only the key of the patch that changed is another."""
    picture = open_picture("digit-3").copy()
    picture.paste(255 - picture.getpixel((6, 2)), (6, 2, 8, 4))  # pyright: ignore[reportOperatorIssue]
    picture.save(tmp_path / "other.png")
    changed = parse_spec(
        {
            "name": "x",
            "model": "vit-digits",
            "input": {"image": "other.png"},
            "vary": {"mechanism": "multi_head"},
        },
        folder=tmp_path,
    )
    first, other = read_image(digits, spec_of(image="digit-3")), read_image(digits, changed)
    keys = []
    for given in (first, other):
        calls: list[LayerCall] = []
        hook = Hook(digits.model, Swap())
        with torch.inference_mode(), hook.installed():
            hook.forward(lambda given=given: digits.model(**given.arguments), calls.append)
        keys.append(calls[0].key[0].transpose(0, 1).flatten(1))
    moved = (keys[0] - keys[1]).abs().amax(1).nonzero().flatten().tolist()
    assert [first.streams["patches"].tokens[place] for place in moved] == ["1,3"]


@pytest.mark.parametrize("size", [None, 40])
def test_registers_have_names_and_any_folder_runs(tmp_path: Path, size: int | None) -> None:
    torch.manual_seed(3)
    config = Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    given = read_image(loaded, spec_of(str(tmp_path), image="astronaut", size=size))
    side = (size or 24) // 8
    names = given.streams["patches"].tokens
    assert names[:5] == ["[CLS]", "[REG0]", "[REG1]", "[REG2]", "0,0"]
    assert names[-1] == f"{side - 1},{side - 1}"
    assert len(names) == 4 + side * side
    assert_maps_are_the_models_own(loaded, given.arguments)


def test_the_picture_is_read_as_the_model_was_trained(tmp_path: Path) -> None:
    """The middle of a photo, with the means of its folder, as transformers' own processor makes it."""
    from transformers import CLIPImageProcessorPil

    made = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    made.save_pretrained(tmp_path)
    reading = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    photo = open_picture("astronaut").crop((10, 40, 200, 170))
    theirs = made(photo, return_tensors="pt").pixel_values
    ours = pixel_values(fitted(photo, 32, reading, "RGB"), reading)
    assert ours.shape == theirs.shape
    # the library scales before it crops, which moves the grid by less than a pixel
    assert (ours - theirs).abs().mean() < 0.1


def test_a_run_keeps_the_picture_its_grid_and_its_axes(sqlite_store: Store) -> None:
    values = {
        "name": "v", "model": "vit-digits", "input": {"image": "digit-3"}, "record": ["maps", "accuracy", "statistics"],
        "vary": {"mechanism": ["multi_head", {"sliding_window": {"window_size": 4}}], "batch_size": [1, 2]},
    }  # fmt: skip
    run_here(sqlite_store, parse_spec(values))
    runs = results.runs_of(sqlite_store, experiment_id=1)
    assert [run.state for run in runs] == ["succeeded"] * 4, [run.reason for run in runs]
    assert [(run.summary or {})["swap"] for run in runs] == ["exact"] * 2 + ["approximate"] * 2
    given = results.run_input(sqlite_store, runs[0].id)
    assert given is not None
    detail = given.detail or {}
    assert detail["answer"]["label"] == "3"
    assert detail["streams"]["patches"]["title"] == "patch (row, column)"
    kept = Image.open(io.BytesIO(base64.b64decode(detail["picture"].partition(",")[2])))
    assert np.array_equal(np.asarray(kept), np.asarray(open_picture("digit-3")))
    for trace in results.traces(sqlite_store, runs[0].id):
        told = trace.detail or {}
        assert (told["role"], told["queries"], told["keys"]) == ("self", "patches", "patches")
        assert told["patches"] == {"rows": 4, "columns": 4, "prefix": 1, "patch_size": 2}
    lost = {
        row.name: row.value for row in results.measurements(sqlite_store, runs[2].id) if row.layer is None
    }
    assert lost["check_error"] < 2e-4 < lost["logit_error"]
    assert lost["kl"] > 0


def test_a_model_without_a_head_gives_states(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**SMALL)).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert (loaded.reads, loaded.writes, loaded.causal) == ("image", False, False)
    given = read_image(loaded, spec_of(str(tmp_path), image="astronaut"))
    assert "answer" not in given.detail
    assert_maps_are_the_models_own(loaded, given.arguments)


def test_what_only_the_worker_can_know_it_refuses(tmp_path: Path, digits: LoadedModel) -> None:
    """Of a hub id that is not here the web page knows nothing, so the run ends with the reason."""
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path)
    point = spec_of(image="digit-3").points()[0]
    with pytest.raises(ModelError, match="reads text, and the spec gives it image"):
        read_input(load_model(str(tmp_path)), spec_of(image="digit-3"), point)
    with pytest.raises(ModelError, match="vit-digits reads image, and the spec gives it text"):
        read_input(digits, spec_of("someone/something", text="words"), point)
    with pytest.raises(Unsupported, match="phase: decode needs a language model"):
        ForwardSubject(digits, spec_of(image="digit-3"), replace(point, phase="decode"))


def test_samples_lie_in_the_package() -> None:
    assert sorted(path.name for path in SAMPLES_FOLDER.glob("digit-*.png")) == [
        f"digit-{n}.png" for n in range(10)
    ]
