"""Speech and other encoder-decoders: what they write, and that each map lies between the right two sequences."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, MarianConfig, MarianMTModel, WhisperConfig
from transformers import WhisperForConditionalGeneration as Whisper

from attnlab.bundled import BUNDLED, describe_model, is_fetched
from attnlab.convert_whisper import read_variables
from attnlab.hook import Hook, LayerCall
from attnlab.models import LoadedModel, ModelError, load_model
from attnlab.probes.maps import capture_call, refine
from attnlab.run import run_here
from attnlab.sounds import SAMPLES, TRANSCRIPTS, sound_samples
from attnlab.spec import parse_spec
from attnlab.subjects.forward import ForwardSubject, read_input
from attnlab.subjects.given import Given, Roles
from attnlab.swap import Swap
from attnlab_kernels.effective_map import SoftmaxMap
from attnlab_storage import results
from attnlab_storage.database import Store

NAME = "whisper-tiny-en"
SMALL: dict[str, Any] = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 6, "decoder_attention_heads": 6,
    "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "vocab_size": 97, "max_position_embeddings": 64, "pad_token_id": 1,
    "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
PAIRS = {"bart": (BartConfig, BartForConditionalGeneration), "marian": (MarianConfig, MarianMTModel)}


@pytest.fixture(scope="module")
def whisper() -> LoadedModel:
    if not is_fetched(NAME):
        pytest.skip(f"{NAME} is not fetched: attnlab models fetch {NAME}")
    return load_model(NAME)


@pytest.fixture(scope="module")
def heard(whisper: LoadedModel) -> Given:
    return given_of(whisper, audio="dashwood")


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedModel:
    """A small random translator or summariser."""
    torch.manual_seed(4)
    config, model = PAIRS[request.param]
    made = model(config(**SMALL)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    made.save_pretrained(tmp_path)
    return load_model(str(tmp_path))


def given_of(loaded: LoadedModel, lengths: list[int] | None = None, **given: Any) -> Given:
    vary: dict[str, Any] = {"mechanism": "multi_head"} | ({"sequence_length": lengths} if lengths else {})
    spec = parse_spec({"name": "x", "model": loaded.name, "input": given, "vary": vary})
    return read_input(loaded, spec, spec.points()[0])


def run_both(loaded: LoadedModel, given: Given) -> tuple[Any, Any, list[LayerCall]]:
    model, calls = loaded.model, list[LayerCall]()
    model.set_attn_implementation("eager")
    hook = Hook(model, Swap())
    with torch.inference_mode():
        own = model(**given.arguments, output_attentions=True)
        with hook.installed():
            ours = hook.forward(lambda: model(**given.arguments), calls.append)
    return own, ours, calls


def assert_maps_are_the_models_own(loaded: LoadedModel, given: Given) -> None:
    """Each map as it would be stored, beside the attentions that the model gives for that role and layer."""
    own, ours, calls = run_both(loaded, given)
    assert (ours.logits - own.logits).abs().max() < 2e-4
    roles = Roles(loaded.model, given)
    theirs = {
        "encoder": list(own.encoder_attentions), "self": list(own.decoder_attentions),
        "cross": list(own.cross_attentions),
    }  # fmt: skip
    for call in calls:
        role, queries, keys = roles.of(call.name, call.cross)
        attentions = theirs[role].pop(0)[0].numpy()
        assert attentions.shape[1:] == (len(given.streams[queries].tokens), len(given.streams[keys].tokens))
        query, key = call.query[0].numpy(), call.key[0].numpy()
        _, (_, lse, _) = refine(capture_call(call), query, key, torch.device("cpu"))
        for head in range(len(query)):
            made = SoftmaxMap(query[head], key[head], lse[head], call.scale, call.mask)
            off = np.abs(made.tile(slice(None), slice(None)) - attentions[head])
            assert off.max() < 1e-5, (call.name, head)
    assert not any(theirs.values())


@pytest.mark.model
def test_whisper_writes_what_was_said(heard: Given) -> None:
    assert heard.text == TRANSCRIPTS["dashwood"]
    text, audio = heard.streams["text"], heard.streams["audio"]
    assert text.tokens[:4] == ["<|startoftranscript|>", "<|notimestamps|>", " And", " Mr"]
    assert text.tokens[-1] == "."
    assert (audio.title, audio.tokens[0], audio.tokens[50], len(audio.tokens)) == (
        "audio (seconds)",
        "0.00",
        "1.00",
        1500,
    )


@pytest.mark.model
def test_a_given_target_is_read_as_the_greedy_one(whisper: LoadedModel, heard: Given) -> None:
    given = given_of(whisper, audio="dashwood", target=" " + TRANSCRIPTS["dashwood"])
    assert torch.equal(given.arguments["decoder_input_ids"], heard.arguments["decoder_input_ids"])
    cut = given_of(whisper, audio="dashwood", max_tokens=5)
    assert cut.streams["text"].tokens == heard.streams["text"].tokens[:5]
    with pytest.raises(ModelError, match=r"input.target: must be at most 448 tokens for whisper-tiny-en"):
        given_of(whisper, audio="dashwood", target="word " * 600)


@pytest.mark.model
def test_every_map_of_whisper_is_its_own(whisper: LoadedModel, heard: Given) -> None:
    assert_maps_are_the_models_own(whisper, heard)


@pytest.mark.model
def test_alignment_heads_of_whisper_walk_through_the_sound(whisper: LoadedModel, heard: Given) -> None:
    """The heads that Whisper's authors use for word times look at later sound for later words."""
    _, _, calls = run_both(whisper, heard)
    cross = [call for call in calls if call.cross]
    maps = []
    told = json.loads((Path(whisper.source) / "generation_config.json").read_text(encoding="utf-8"))
    for layer, head in told["alignment_heads"]:
        scores = (
            cross[layer].query[0, head].double() @ cross[layer].key[0, head].double().T * cross[layer].scale
        )
        maps.append(scores.softmax(-1))
    spoken = torch.stack(maps).mean(0)[2:, : round(7.1 / 0.02)]
    seconds = (spoken / spoken.sum(-1, keepdim=True)) @ torch.arange(spoken.shape[1]).double() * 0.02
    ranks = seconds.argsort().argsort().double()
    order = torch.arange(len(ranks)).double()
    assert torch.corrcoef(torch.stack([ranks, order]))[0, 1] > 0.95


@pytest.mark.model
def test_a_run_of_whisper_keeps_three_kinds_of_map(whisper: LoadedModel, sqlite_store: Store) -> None:
    values = {
        "name": "w", "model": NAME, "input": {"audio": "dashwood", "max_tokens": 6}, "record": ["maps"],
        "layers": [0, 4, 5], "vary": {"mechanism": {"sliding_window": {"window_size": 100}}},
    }  # fmt: skip
    run_here(sqlite_store, parse_spec(values))
    (run,) = results.runs_of(sqlite_store, experiment_id=1)
    assert (run.state, (run.summary or {}).get("swap")) == ("succeeded", "approximate"), run.reason
    encoder, self_, cross = results.traces(sqlite_store, run.id)
    told = [(trace.detail or {}) for trace in (encoder, self_, cross)]
    assert [one["role"] for one in told] == ["encoder", "self", "cross"]
    assert [(one["queries"], one["keys"]) for one in told] == [
        ("audio", "audio"),
        ("text", "text"),
        ("text", "audio"),
    ]
    assert [(trace.num_queries, trace.num_keys) for trace in (encoder, self_, cross)] == [
        (1500, 1500),
        (6, 6),
        (6, 1500),
    ]
    # the query is scaled before it gets here: a second d^-1/2 would flatten every map
    assert {trace.scale for trace in (encoder, self_, cross)} == {1.0}
    # a window over the text says nothing of the sound
    assert cross.mask == {"kind": "full"}
    assert encoder.mask != {"kind": "full"}
    given = results.run_input(sqlite_store, run.id)
    assert given is not None
    assert (len(given.query_tokens), len(given.key_tokens)) == (6, 1500)
    assert (given.detail or {})["seconds"] == pytest.approx(7.1)


@pytest.mark.model
def test_the_facts_of_whisper_are_those_of_its_folder(whisper: LoadedModel) -> None:
    found, told = BUNDLED[NAME].facts, describe_model(whisper.source)
    assert told is not None
    for name in ("layers", "heads", "kv_heads", "head_dim", "hidden", "context", "causal", "reads", "writes"):
        assert getattr(found, name) == getattr(told, name), name
    spec = parse_spec(
        {"name": "x", "model": NAME, "input": {"audio": "dashwood"}, "vary": {"mechanism": "multi_head"}}
    )
    subject = ForwardSubject(whisper, spec, spec.points()[0])
    assert (subject.layers, subject.tokens) == (found.layers, found.context)


def test_maps_of_encoder_decoders_are_their_own(pair: LoadedModel) -> None:
    given = given_of(pair, [11], synthetic="random")
    assert pair.writes
    assert given.streams["source"].tokens[0].startswith("<")
    assert len(given.streams["source"].tokens) == 11
    assert_maps_are_the_models_own(pair, given)


def test_roles_are_counted_out(pair: LoadedModel) -> None:
    given = given_of(pair, [7], synthetic="random")
    roles = Roles(pair.model, given)
    found = [roles.of(attention.name, attention.cross)[0] for attention in given.attentions]
    assert found == ["encoder"] * 2 + ["self", "cross"] * 3
    told = describe_model(pair.name)
    assert told is not None
    assert (told.layers, told.writes) == (len(found), True)


def test_a_translators_run_measures_what_a_window_costs(pair: LoadedModel, sqlite_store: Store) -> None:
    values = {
        "name": "p", "model": pair.name, "input": {"synthetic": "random"}, "record": ["maps", "accuracy"],
        "vary": {"mechanism": ["multi_head", {"sliding_window": {"window_size": 3}}], "sequence_length": [13],
                 "batch_size": [2]},
    }  # fmt: skip
    run_here(sqlite_store, parse_spec(values))
    full, window = results.runs_of(sqlite_store, experiment_id=1)
    assert (full.state, window.state) == ("succeeded", "succeeded"), (full.reason, window.reason)
    found = [
        {row.name: row.value for row in results.measurements(sqlite_store, run.id) if row.layer is None}
        for run in (full, window)
    ]
    assert found[0]["logit_error"] < 2e-4 < found[1]["logit_error"]
    assert found[0]["perplexity"] > 1


def test_a_random_whisper_reads_a_file(tmp_path: Path) -> None:
    """Any folder will do, with its own number of positions; a file of another rate is resampled."""
    torch.manual_seed(5)
    sizes = {key: value for key, value in SMALL.items() if key != "max_position_embeddings"}
    config = WhisperConfig(
        **sizes, num_mel_bins=80, max_target_positions=32, suppress_tokens=None, begin_suppress_tokens=None
    )
    Whisper(config).save_pretrained(tmp_path / "model")
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.zeros(8000, "<i2").tobytes())
    loaded = load_model(str(tmp_path / "model"))
    values = {
        "name": "x",
        "model": loaded.name,
        "input": {"audio": "tone.wav"},
        "vary": {"mechanism": "multi_head"},
    }
    spec = parse_spec(values, folder=tmp_path)
    given = read_input(loaded, spec, spec.points()[0])
    assert given.detail["seconds"] == pytest.approx(0.5)
    assert 1 <= len(given.streams["text"].tokens) <= 32


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(bytes([5, 0, 0, 0]) + bytes(20))
    with pytest.raises(ValueError, match=r"model.bin: must be CTranslate2 format 6, got 5"):
        read_variables(path)


def test_the_bundled_sample_is_a_sound_of_this_package() -> None:
    assert BUNDLED[NAME].sample in SAMPLES
    assert all(path.is_file() for path in sound_samples().values())
