"""Real models: loaded without foreign code, and the laws that their maps obey."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from attnlab.bundled import BUNDLED, is_fetched
from attnlab.hook import Hook, LayerCall
from attnlab.models import LoadedModel, ModelError, load_model, shared_model
from attnlab.probes.maps import capture_call, element_mask, refine
from attnlab.swap import Swap
from attnlab_kernels.effective_map import SoftmaxMap

TEXTS = {
    "rxnmapper": BUNDLED["rxnmapper"].sample,
    "minilm-l6": "The bank raised its rates while we sat on the bank of the river, and nobody knew why.",
    "smollm2-135m": "The animal didn't cross the street because it was too tired. " * 6,
}
CONFIG: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40,
    "max_position_embeddings": 64,
}  # fmt: skip

WIDER: dict[str, Any] = CONFIG | {"hidden_size": 96}


@pytest.fixture(scope="module", params=["rxnmapper", "minilm-l6", "smollm2-135m"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    if not is_fetched(request.param):
        pytest.skip(f"{request.param} is not fetched: attnlab models fetch {request.param}")
    return load_model(request.param)


def inputs(loaded: LoadedModel, side: str) -> dict[str, torch.Tensor]:
    """The text, and with a side the text and its first half padded on that side."""
    ids = torch.tensor([loaded.encode(TEXTS[loaded.name]).ids])
    if side == "none":
        return {"input_ids": ids}
    length, half = ids.shape[1], ids.shape[1] // 2
    short = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    place = slice(length - half, length) if side == "left" else slice(0, half)
    short[0, place], mask[0, place] = ids[0, :half], 1
    return {
        "input_ids": torch.cat([ids, short]),
        "attention_mask": torch.cat([torch.ones_like(ids), mask]),
    }


def both(loaded: LoadedModel, side: str) -> tuple[Any, Any, list[LayerCall], torch.Tensor]:
    """The model's eager run with attentions, our run, its calls, and which tokens are real."""
    given, calls = inputs(loaded, side), []
    model = loaded.model
    model.set_attn_implementation("eager")
    hook = Hook(model, Swap())
    with torch.inference_mode():
        own = model(**given, output_attentions=True)
        with hook.installed():
            ours = hook.forward(lambda: model(**given), calls.append)
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    return own, ours, calls, real


def states(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.model
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_real_model_answers_and_attends_as_by_itself(loaded: LoadedModel, side: str) -> None:
    own, ours, calls, real = both(loaded, side)
    assert len(calls) == BUNDLED[loaded.name].layers
    assert (states(ours) - states(own))[real].abs().max() < 2e-4
    for call, attentions in zip(calls, own.attentions, strict=True):
        for batch in range(len(real)):
            mask = element_mask(call.mask, batch)
            group = call.query.shape[1] // call.key.shape[1]
            for head in range(0, call.query.shape[1], 4):
                made = SoftmaxMap(
                    call.query[batch, head].numpy(),
                    call.key[batch, head // group].numpy(),
                    call.lse[batch, head].numpy(),
                    call.scale,
                    mask,
                ).tile(slice(None), slice(None))
                off = np.abs(made - attentions[batch, head].numpy())[real[batch].numpy()]
                assert off.max() < 1e-5, (call.name, head)


@pytest.mark.model
def test_the_kept_map_is_float64_softmax_of_the_kept_q_and_k(loaded: LoadedModel) -> None:
    own, _, calls, _ = both(loaded, "none")
    for call, attentions in zip(calls, own.attentions, strict=True):
        query, key = call.query[0].numpy(), call.key[0].numpy()
        row, (_, lse, dtype) = refine(capture_call(call), query, key, torch.device("cpu"))
        assert dtype == "float64"
        assert row.row_sum_defect < 1e-6
        assert (row.detail or {})["lse_defect"] < 2e-5
        group = len(query) // len(key)
        allowed = call.mask.allowed(
            np.arange(query.shape[1]),
            np.arange(key.shape[1]),
            num_queries=query.shape[1],
            num_keys=key.shape[1],
        )
        for head in range(len(query)):
            made = SoftmaxMap(query[head], key[head // group], lse[head], call.scale, call.mask)
            map_ = made.tile(slice(None), slice(None))
            scores = query[head].astype(float) @ key[head // group].astype(float).T * call.scale
            scores[~allowed] = -np.inf
            exact = np.exp(scores - scores.max(1, keepdims=True))
            exact /= exact.sum(1, keepdims=True)
            assert np.abs(map_ - exact).max() < 1e-6
            assert np.abs(made.row_sums() - 1).max() < 5e-6
            assert np.abs(map_ - attentions[0, head].numpy()).max() < 1e-5


@pytest.mark.model
def test_a_head_of_rxnmapper_still_maps_atoms() -> None:
    """Layer 10 head 5 finds the reactant atom of each product atom, the package's own use of it."""
    if not is_fetched("rxnmapper"):
        pytest.skip("rxnmapper is not fetched: attnlab models fetch rxnmapper")
    loaded = load_model("rxnmapper")
    strings = loaded.encode(TEXTS["rxnmapper"]).strings
    _, _, calls, _ = both(loaded, "none")
    call = calls[10]
    made = SoftmaxMap(
        call.query[0, 5].numpy(), call.key[0, 5].numpy(), call.lse[0, 5].numpy(), call.scale, call.mask
    ).tile(slice(None), slice(None))
    made = made + made.T
    arrow = strings.index(">>")
    atoms = [place for place, string in enumerate(strings) if string in ("C", "O")]
    left, right = [place for place in atoms if place < arrow], [place for place in atoms if place > arrow]
    mapped = [
        max(left, key=lambda place: made[atom, place] * (strings[place] == strings[atom])) for atom in right
    ]
    # acetic acid is atoms 0 to 3, ethanol 4 to 6; the head takes the bridging oxygen from the acid
    assert [left.index(place) for place in mapped] == [0, 1, 2, 3, 5, 6]


def save(folder: Path, model: Any, **options: Any) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


def test_a_local_folder_loads_and_runs_on_random_tokens(tmp_path: Path) -> None:
    torch.manual_seed(1)
    name = save(tmp_path / "tiny", LlamaForCausalLM(LlamaConfig(**CONFIG, num_key_value_heads=2)))
    loaded = load_model(name)
    assert (loaded.causal, loaded.context, loaded.vocabulary) == (True, 64, 97)
    assert loaded.identity["architecture"] == "LlamaForCausalLM"
    assert loaded.identity["source"] == "folder"
    assert len(loaded.identity["fingerprint"]) == 64
    with pytest.raises(ModelError, match=r"has no tokenizer.json; use synthetic input"):
        loaded.encode("text")
    hidden = loaded.model.base_model(torch.arange(5)[None]).last_hidden_state
    assert torch.equal(loaded.logits(hidden), loaded.model(torch.arange(5)[None]).logits)


def test_an_encoder_has_states_and_no_logits(tmp_path: Path) -> None:
    loaded = load_model(save(tmp_path / "tiny", BertModel(BertConfig(**CONFIG))))
    hidden = torch.randn(1, 3, 48)
    assert not loaded.causal
    assert loaded.logits(hidden) is hidden


def test_weights_change_the_fingerprint(tmp_path: Path) -> None:
    first = load_model(save(tmp_path / "a", BertModel(BertConfig(**CONFIG))))
    other = load_model(save(tmp_path / "b", BertModel(BertConfig(**WIDER))))
    assert first.identity["fingerprint"] != other.identity["fingerprint"]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = BertModel(BertConfig(**CONFIG))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"safetensors"):
        load_model(str(tmp_path))


def test_code_from_a_model_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    (tmp_path / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}}',
        encoding="utf-8",
    )
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_hub_id_is_not_asked_for_when_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"'nobody/nothing-at-all' was not found \(HF_HUB_OFFLINE is set"):
        load_model("nobody/nothing-at-all")


def test_what_is_no_model_is_answered_with_the_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"no bundled name, hub id or local folder .* bundled: smollm2-135m"):
        load_model(str(tmp_path))
    monkeypatch.setenv("ATTNLAB_MODELS", str(tmp_path))
    with pytest.raises(ModelError, match=r"run `attnlab models fetch minilm-l6`"):
        load_model("minilm-l6")


def test_one_model_at_a_time_is_shared(tmp_path: Path) -> None:
    name = save(tmp_path / "tiny", BertModel(BertConfig(**CONFIG)))
    first = shared_model(name, "float32", "cpu")
    assert shared_model(name, "float32", "cpu") is first
    assert shared_model(name, "bfloat16", "cpu").model.dtype == torch.bfloat16
    assert shared_model(name, "float32", "cpu") is not first


@pytest.mark.model
def test_text_longer_than_the_context_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ModelError, match=rf"input.text: must be at most {loaded.context} tokens"):
        loaded.encode("C " * (loaded.context or 0) * 2)
    assert len(loaded.encode("C " * 99, 7).ids) == 7
