"""Form and YAML are one document: either can be edited, neither loses what the other holds."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.documents import write_document
from attnlab.files import MAX_TEXT_BYTES
from attnlab.serving.settings import CACHES
from attnlab.spec_sections import DTYPES, IMPLEMENTATIONS, RECORDS
from attnlab_kernels.catalog import MECHANISMS
from attnlab_webui import drafts
from attnlab_webui.form import AUDIO, BARE_MODULE, FORM_PHASES, IMAGE, RANDOM, TEXT, Form, form_of, merge
from attnlab_webui.form_sections import FIELDS, FRONTIER, KINDS, RUN, SERVE, in_use

ALL = tuple(MECHANISMS)


def some(choices):
    """A non-empty part of the choices, in their order, as a set of ticks is."""
    return st.sets(st.sampled_from(choices), min_size=1).map(
        lambda chosen: tuple(choice for choice in choices if choice in chosen)
    )


numbers = st.lists(st.integers(1, 9999), min_size=1, max_size=3, unique=True).map(
    lambda values: ", ".join(map(str, values))
)
words = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), max_size=40)


@st.composite
def forms(draw):
    mechanisms = draw(some(ALL))
    bare = draw(st.booleans())
    kind = draw(st.sampled_from(KINDS))
    source = RANDOM if bare or kind == FRONTIER else draw(st.sampled_from([TEXT, RANDOM, IMAGE, AUDIO]))
    sections = draw(st.dictionaries(st.sampled_from(list(FIELDS)), st.sampled_from(["1", "48", "0.5"])))
    sections |= {
        path: draw(st.sampled_from(field.choices)) for path, field in FIELDS.items() if field.choices
    }
    sections |= {path: "true" for path, field in FIELDS.items() if field.is_flag and path in sections}
    windows = {"sliding_window": {"window_size": draw(numbers)}} if "sliding_window" in mechanisms else {}
    return Form(
        name=draw(words),
        kind=kind,
        caches=draw(some(CACHES)) if kind == SERVE else (),
        sections=in_use(sections, kind, is_bare=bare),
        model=BARE_MODULE if bare else draw(st.sampled_from(["smollm2-135m", "owner/name", "/a/folder"])),
        module_dim=str(draw(st.integers(1, 999))) if bare else "512",
        module_heads=str(draw(st.integers(1, 99))) if bare else "8",
        source=source,
        text="",
        image=draw(st.sampled_from(["digit-3", "upload-0123456789abcdef.png"])) if source == IMAGE else "",
        size=draw(st.sampled_from(["", "64"])) if source == IMAGE else "",
        audio="dashwood" if source == AUDIO else "",
        target="" if bare or kind == FRONTIER else draw(st.sampled_from(["", "And Mr."])),
        max_tokens="" if kind == FRONTIER else draw(st.sampled_from(["", "100"])),
        repeat=kind == RUN and draw(st.booleans()),
        mechanisms=mechanisms,
        parameters=windows,
        implementations=draw(some(IMPLEMENTATIONS)),
        sequence_lengths=draw(st.one_of(st.just(""), numbers)) if kind == RUN else "",
        dtypes=draw(some(DTYPES)),
        batch_sizes="1" if kind == SERVE else draw(numbers),
        phase="prefill" if kind == SERVE else draw(st.sampled_from(FORM_PHASES)),
        record={SERVE: RECORDS, FRONTIER: ("memory",)}.get(kind) or draw(some(RECORDS)),
        layers=draw(st.sampled_from(["all", "0", "0, 3, 5"])),
        repeats="20" if kind == SERVE else str(draw(st.integers(1, 1000))),
        seed=str(draw(st.integers(0, 99))),
        gpus=str(draw(st.integers(0, 8))),
    )


@settings(deadline=None)
@given(forms())
def test_what_the_form_wrote_it_reads_back(form):
    document = drafts.read_draft(write_document(merge(form, {}))).document
    assert document is not None
    assert form_of(document) == form


@settings(deadline=None)
@given(forms(), forms())
def test_an_edit_changes_the_document_to_the_form(before, after):
    assert form_of(merge(after, merge(before, {}))) == after


@settings(deadline=None)
@given(forms())
def test_an_untouched_form_changes_nothing(form):
    document = merge(form, {})
    assert merge(form_of(document), document) == document


def test_keys_that_the_form_does_not_know_stay():
    document = {"name": "n", "comment": "mine", "module": {"dim": 64, "num_heads": 4, "num_kv_heads": 2}}
    document["resources"] = {"gpus": 1, "later": 3}
    merged = merge(replace(form_of(document), name="other", gpus="2", module_dim="128"), document)
    assert merged["comment"] == "mine"
    assert merged["module"] == {"dim": 128, "num_heads": 4, "num_kv_heads": 2}
    assert merged["resources"] == {"gpus": 2, "later": 3}
    assert list(merged) == list(document)


def test_mechanisms_the_form_cannot_show_stay_until_they_are_edited():
    grid = [
        {"sliding_window": {"window_size": 3, "num_kv_heads": 1}},
        {"sliding_window": {"window_size": 5}},
        "telepathy",
    ]
    document = {"name": "n", "vary": {"mechanism": grid}}
    assert merge(replace(form_of(document), repeats="3"), document)["vary"]["mechanism"] == grid
    edited = merge(replace(form_of(document), mechanisms=("multi_head",)), document)
    assert edited["vary"]["mechanism"] == ["multi_head"]


def test_commas_in_a_parameter_make_one_entry_a_value():
    form = Form(mechanisms=("sliding_window",), parameters={"sliding_window": {"window_size": "64, 256,"}})
    entries = merge(form, {})["vary"]["mechanism"]
    assert entries == [{"sliding_window": {"window_size": 64}}, {"sliding_window": {"window_size": 256}}]


def test_parameters_of_a_mechanism_that_is_not_ticked_do_not_count():
    form = Form(mechanisms=("multi_head",), parameters={"sliding_window": {"window_size": "64"}})
    assert form_of(merge(form, {})).mechanisms == ("multi_head",)
    assert "sliding_window" not in str(merge(form, {}))


def test_layers_may_be_ranges():
    assert merge(Form(layers="0, 4-6"), {})["layers"] == [0, 4, 5, 6]


def test_what_is_no_number_reaches_the_spec_as_it_was_typed():
    merged = merge(Form(sequence_lengths="12, twelve"), {})
    assert merged["vary"]["sequence_length"] == [12, "twelve"]


def test_choosing_a_bare_module_and_going_back_keeps_the_text():
    document = {"name": "n", "model": "minilm-l6", "input": {"text": "Banks."}}
    before = form_of(document)
    bare = replace(before, model=BARE_MODULE)
    with_module = merge(bare, document, before)
    assert with_module["input"] == {"synthetic": "random"}
    back = merge(replace(bare, model="minilm-l6", source=TEXT), with_module, bare)
    assert back["input"] == {"text": "Banks."}
    assert "module" not in back


def test_edits_on_both_sides_at_once_are_both_kept():
    shown = Form(name="old", model="minilm-l6", text="Banks.")
    typed_in_yaml = {"name": "from yaml", "model": "minilm-l6", "input": {"text": "Banks."}}
    merged = merge(replace(shown, repeats="7"), typed_in_yaml, shown)
    assert merged["name"] == "from yaml"
    assert merged["repeats"] == 7


def test_broken_yaml_says_where_and_is_left_alone():
    text = "name: n\nvary: [1,\n"
    draft = drafts.write_form(Form(name="other"), text, Form())
    assert draft.text == text
    assert draft.document is None
    assert "at line 3" in str(draft.problems[0])


def test_yaml_that_is_no_mapping_is_left_alone():
    assert drafts.write_form(Form(name="other"), "- a\n- b", Form()).text == "- a\n- b"


def test_empty_yaml_is_filled_from_the_form():
    draft = drafts.write_form(Form(name="n", text="Banks."), "", Form())
    assert "name: n" in draft.text


def test_a_document_without_mechanisms_shows_none_ticked():
    assert form_of({"name": "n"}).mechanisms == ()


def test_a_draft_from_the_form_alone_is_whole():
    form = Form(name="n", model="minilm-l6", text="Banks.")
    assert drafts.from_form(form).problems == ()


def test_every_problem_of_the_spec_is_found():
    draft = drafts.read_draft("name: n\nmodel: minilm-l6\nvary: {mechanism: [telepathy], dtype: [float8]}")
    arguments = {problem.argument for problem in draft.problems}
    assert draft.spec is None
    assert {"vary.mechanism[0]", "vary.dtype[0]"} <= arguments


@pytest.mark.parametrize(
    "text", ["a: &x [*x]", "a: 1\na: 2", "\t- x", "a: !!python/object:os.system x", "{" * 2000]
)
def test_hostile_yaml_is_a_problem_and_not_a_crash(text):
    draft = drafts.read_draft(text)
    assert draft.spec is None
    assert draft.problems


def test_the_starter_is_valid():
    draft = drafts.read_draft(drafts.starter())
    assert draft.problems == ()


@pytest.mark.parametrize("mechanism", ALL)
def test_a_mechanism_in_the_address_starts_an_experiment_with_it(mechanism):
    draft = drafts.read_draft(drafts.starter(mechanism))
    assert draft.spec is not None
    assert mechanism in {chosen.name for chosen in draft.spec.vary.mechanism}


@pytest.mark.parametrize("mechanism", ["telepathy", "<script>", ""])
def test_a_mechanism_that_there_is_not_starts_the_usual_experiment(mechanism):
    assert drafts.starter(mechanism) == drafts.starter()


def test_a_clone_runs_the_same():
    spec = drafts.read_draft(drafts.starter()).spec
    assert spec is not None
    copy = drafts.read_draft(drafts.clone(spec.to_dict())).spec
    assert copy is not None
    assert copy.hash() == spec.hash()
    assert copy.name != spec.name


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"x" * (MAX_TEXT_BYTES + 1), "at most 1,000,000 bytes"),
        (b"abc\xff", "byte 3"),
        (b"a\x00b", "NUL"),
    ],
    ids=["zero bytes", "blank", "too large", "binary", "NUL"],
)
def test_an_upload_that_is_no_text_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        drafts.read_upload("name.txt", data)


def test_an_upload_is_read_without_its_byte_order_mark():
    assert drafts.read_upload("name.txt", "\ufeffBänke".encode()) == "Bänke"


def test_token_line_says_when_it_is_an_estimate():
    exact_or_not = drafts.token_line(Form(model="owner/name", text="a" * 420))
    assert exact_or_not.startswith("about 100 tokens")
    assert drafts.token_line(Form(model=BARE_MODULE, text="text")) == ""


@pytest.mark.model
def test_token_line_counts_with_the_models_own_tokenizer():
    assert drafts.token_line(Form(model="minilm-l6", text="The river bank.")) == "6 tokens"


def test_model_line_says_how_to_fetch_what_is_missing(home, monkeypatch):
    monkeypatch.setenv("ATTNLAB_MODELS", str(home / "none"))
    line = drafts.model_line("minilm-l6")
    assert not line.ready
    assert "attnlab models fetch minilm-l6" in line.how
    assert line.facts is not None
    assert line.facts.heads == 12


def test_a_document_of_the_wrong_types_is_a_list_of_problems():
    assert drafts.read_draft(write_document({"name": 7, "vary": "x"})).problems


def test_decoding_steps_are_a_section_of_their_own_and_leave_with_their_phase() -> None:
    decoding = Form(phase="decode", steps="32", generate=True)
    document = merge(decoding, {})
    assert document["decode"] == {"steps": 32, "generate": True}
    assert form_of(document).steps == "32"
    assert "decode" not in merge(replace(form_of(document), phase="prefill"), document)
