"""The rules between the fields of a spec: what the model's own facts allow. Torch-free."""

import itertools
import math
from collections.abc import Iterator

from attnlab_kernels.catalog_rules import RunSize, broken_parameters, broken_sizes

from .bundled import BUNDLED, ModelFacts, describe_model, is_hub_id
from .files import MAX_TEXT_BYTES, ONE_INPUT
from .problems import Problem, shown
from .serving.rules import serving_rules
from .spec import MAX_CELLS, MAX_RUNS, ExperimentSpec

KINDS = ("text", "file", "image", "audio", "synthetic")


def broken_rules(spec: ExperimentSpec) -> list[Problem]:
    """Return every rule between fields that the spec breaks."""
    return [
        *_subject(spec),
        *_frontier(spec),
        *_decode(spec),
        *_reference(spec),
        *_input(spec),
        *_parameters(spec),
        *_size(spec),
        *_against_model(spec),
        *serving_rules(spec),
    ]


def _subject(spec: ExperimentSpec) -> Iterator[Problem]:
    if (spec.model is None) == (spec.module is None):
        given = "neither" if spec.model is None else "both"
        yield Problem("model", "exactly one of model and module must be given", given)
    if spec.model is not None and describe_model(spec.model) is None and not is_hub_id(spec.model):
        rule = "must be a bundled name, a hub id (owner/name) or a local folder with a config.json"
        yield Problem("model", rule, shown(spec.model), tuple(BUNDLED))
    if spec.module is not None:
        dim, heads, kv_heads = spec.module.dim, spec.module.num_heads, spec.module.num_kv_heads
        if dim % heads:
            yield Problem("module.num_heads", f"must divide dim ({dim})", str(heads), _divisors(dim, heads))
        if kv_heads and heads % kv_heads:
            choices = _divisors(heads, kv_heads)
            yield Problem("module.num_kv_heads", f"must divide num_heads ({heads})", str(kv_heads), choices)
        yield from _kv_heads(spec, heads)
        if spec.vary.sequence_length is None and spec.frontier is None and spec.phase != "serving":
            yield Problem("vary.sequence_length", "must be given for a bare module")
        if spec.layers != "all" and tuple(spec.layers) != (0,):
            yield Problem("layers", "a bare module has one layer", shown(spec.layers), ("all", "[0]"))


def _frontier(spec: ExperimentSpec) -> Iterator[Problem]:
    """A search makes its own lengths, and measures nothing but whether they fit."""
    if spec.frontier is None:
        return
    if spec.vary.sequence_length is not None:
        rule = "must not be given with frontier, which tries lengths by itself"
        yield Problem("vary.sequence_length", rule, shown(list(spec.vary.sequence_length)))
    if spec.record != ("memory",):
        yield Problem("record", "must be memory with frontier", shown(list(spec.record)), ("[memory]",))
    if spec.model is not None and spec.input.synthetic is None:
        yield Problem(
            "input", "must be synthetic with frontier, whose lengths no text has", "", ("synthetic",)
        )
    facts = describe_model(spec.model) if spec.model is not None else None
    if facts is not None and facts.context is not None and spec.frontier.up_to > facts.context:
        rule = f"must be at most {facts.context} tokens, the context of {spec.model}"
        yield Problem("frontier.up_to", rule, str(spec.frontier.up_to))
    if spec.frontier.first > spec.frontier.up_to:
        rule = f"must be at most up_to ({spec.frontier.up_to})"
        yield Problem("frontier.first", rule, str(spec.frontier.first))


def _decode(spec: ExperimentSpec) -> Iterator[Problem]:
    """A step needs a token before it, and only a language model writes."""
    if spec.decode is None:
        return
    if spec.phase != "decode":
        yield Problem("decode", "is for phase decode", spec.phase, ("phase: decode",))
    if spec.decode.generate and spec.module is not None:
        yield Problem("decode.generate", "is for models: a bare module writes no tokens", "true")
    given = spec.vary.sequence_length or (spec.points()[0].sequence_length,)
    shortest = min((length for length in given if length), default=None)
    if shortest is not None and spec.decode.steps >= shortest:
        rule = f"must be fewer than the {shortest} tokens of the shortest run, the decoded ones among them"
        yield Problem("decode.steps", rule, str(spec.decode.steps))


def _reference(spec: ExperimentSpec) -> Iterator[Problem]:
    if spec.reference is None:
        return
    if "timing" not in spec.record or spec.frontier is not None or spec.phase == "serving":
        rule = "needs timing in record, without frontier, in phase prefill, decode or train"
        yield Problem("reference", rule, spec.reference)


def _input(spec: ExperimentSpec) -> Iterator[Problem]:
    given = [name for name in KINDS if getattr(spec.input, name) is not None]
    if spec.module is not None:
        if given not in ([], ["synthetic"]):
            yield Problem("input", "a bare module takes synthetic input only", given[0], ("synthetic",))
        if spec.phase != "serving":
            yield from _of_text(spec, "a bare module's hidden states have the length of the run")
        return
    if len(given) != 1:
        value = " and ".join(given) or "none"
        yield Problem("input", ONE_INPUT, value)
    yield from _sized(spec)
    text = spec.input.text
    if spec.input.needle is not None:
        if text is None:
            yield Problem("input.needle", "must have a haystack: input.text or input.file", "none")
        if spec.vary.sequence_length is None:
            rule = "needs vary.sequence_length: the haystack is cut, or with repeat said again, to fill it"
            yield Problem("input.needle", rule)
        if spec.phase != "prefill":
            yield Problem("phase", "must be prefill with input.needle, whose answer is given", spec.phase)
    if text is not None:
        size = len(text.encode())
        if size > MAX_TEXT_BYTES:
            yield Problem("input.text", f"must be at most {MAX_TEXT_BYTES} bytes", str(size))
        if not text.strip():
            yield Problem("input.text", "must not be empty")
        if spec.phase == "serving":
            return
        if spec.input.repeat and spec.vary.sequence_length is None:
            yield Problem("input.repeat", "needs vary.sequence_length, which says where to stop", "true")
        return
    if spec.input.synthetic and spec.phase != "serving":
        yield from _of_text(spec, "random tokens are drawn to the length of the run", ("repeat",))
    if spec.phase == "serving" or spec.frontier is not None:
        return
    if spec.input.synthetic and spec.vary.sequence_length is None and spec.input.max_tokens is None:
        yield Problem("vary.sequence_length", "must be given for synthetic input")


def _of_text(
    spec: ExperimentSpec, why: str, names: tuple[str, ...] = ("repeat", "max_tokens", "needle", "target")
) -> Iterator[Problem]:
    """What only a text can be asked, and would have no effect on random input."""
    for name in names:
        if given := getattr(spec.input, name):
            value = "true" if given is True else shown(given)
            yield Problem(f"input.{name}", f"is for text input: {why}", value, ("false",) * (given is True))


def _parameters(spec: ExperimentSpec) -> Iterator[Problem]:
    """Values that are each in range and do not go together, or not with the module's sizes."""
    for index, mechanism in enumerate(spec.vary.mechanism):
        name, parameters = mechanism.name, dict(mechanism.parameters)
        broken = broken_parameters(name, parameters)
        for size in () if broken else _module_sizes(spec):
            broken = broken_sizes(name, parameters, size)
            if broken:
                break
        for rule in broken:
            argument = f"vary.mechanism[{index}].{name}.{rule.name}"
            yield Problem(argument, rule.rule, shown(rule.value), rule.choices)


def _module_sizes(spec: ExperimentSpec) -> Iterator[RunSize]:
    module = spec.module
    if module is None or module.dim % module.num_heads:
        return
    for tokens, batch in itertools.product(spec.vary.sequence_length or (), spec.vary.batch_size):
        yield RunSize(module.dim, module.num_heads, tokens, batch, spec.phase)


def _sized(spec: ExperimentSpec) -> Iterator[Problem]:
    """What belongs to one kind of input only."""
    kind = "image" if spec.input.image is not None else "audio" if spec.input.audio is not None else None
    if spec.input.size is not None and kind != "image":
        yield Problem(
            "input.size", "is the side of a picture, and input.image is not given", str(spec.input.size)
        )
    if kind is None:
        return
    if spec.vary.sequence_length is not None:
        rule = f"must not be given for {kind} input, whose length follows from the {kind} and the model"
        yield Problem("vary.sequence_length", rule, shown(list(spec.vary.sequence_length)))
    if spec.input.repeat:
        yield Problem("input.repeat", "is for text", "true")
    if spec.input.max_tokens is not None and kind == "image":
        yield Problem("input.max_tokens", "is for text", str(spec.input.max_tokens))


def _size(spec: ExperimentSpec) -> Iterator[Problem]:
    vary = spec.vary
    longest = spec.frontier.up_to if spec.frontier else spec.input.max_tokens or 1
    lengths = vary.sequence_length or (longest,)
    if spec.input.image is not None:
        lengths = (spec.points()[0].sequence_length or 1,)
    axes = (vary.mechanism, vary.implementation, lengths, vary.dtype, vary.batch_size)
    runs = math.prod(len(axis) for axis in axes)
    if runs > MAX_RUNS:
        yield Problem("vary", f"the grid may hold at most {MAX_RUNS} runs", str(runs))
    cells = max(lengths) * max(vary.batch_size)
    if cells > MAX_CELLS:
        yield Problem("vary", f"batch_size x sequence_length may be at most {MAX_CELLS} tokens", str(cells))
    if spec.module is None and "float64" in vary.dtype:
        choices = ("float32", "float16", "bfloat16")
        yield Problem("vary.dtype", "float64 is for bare modules", "'float64'", choices)


def _against_model(spec: ExperimentSpec) -> Iterator[Problem]:
    facts = describe_model(spec.model) if spec.model is not None else None
    if facts is None:
        return
    if spec.phase == "serving":
        return
    yield from _layers(spec, facts)
    yield from _kv_heads(spec, facts.heads)
    yield from _kind(spec, facts)
    if facts.context is not None and facts.reads == "text":
        yield from _context(spec, facts.context)


def _kind(spec: ExperimentSpec, facts: ModelFacts) -> Iterator[Problem]:
    """The model has to read what is given; only a decoder that reads an encoder has a target."""
    given = [name for name in KINDS if getattr(spec.input, name) is not None]
    readable = ("text", "file", "synthetic") if facts.reads == "text" else (facts.reads,)
    if given and given[0] not in readable:
        rule = f"must be {' or '.join(readable)}: that is what {spec.model} reads"
        others = [name for name, model in BUNDLED.items() if model.facts.reads == given[0]]
        rule += f" ({given[0]} is for {', '.join(others)})" if others and facts.reads == "text" else ""
        yield Problem("input", rule, given[0], readable)
    if spec.input.target is not None and not facts.writes:
        rule = f"is for encoder-decoder models, and {spec.model} is none"
        yield Problem("input.target", rule, shown(spec.input.target))
    if spec.input.size is not None and spec.input.size < (facts.patch_size or 1):
        rule = f"must be at least {facts.patch_size}, one patch of {spec.model}"
        yield Problem("input.size", rule, str(spec.input.size))
    if facts.reads != "text" and spec.phase != "prefill":
        yield Problem(
            "phase", f"must be prefill: {spec.model} reads the whole {facts.reads} at once", spec.phase
        )


def _layers(spec: ExperimentSpec, facts: ModelFacts) -> Iterator[Problem]:
    if facts.layers is None or isinstance(spec.layers, str):
        return
    for layer in spec.layers:
        if layer >= facts.layers:
            rule = f"must be at most {facts.layers - 1}: {spec.model} has {facts.layers} layers"
            yield Problem("layers", rule, str(layer), ("all", f"0 to {facts.layers - 1}"))


def _kv_heads(spec: ExperimentSpec, heads: int | None) -> Iterator[Problem]:
    for index, mechanism in enumerate(spec.vary.mechanism):
        kv_heads = mechanism.parameters.get("num_kv_heads")
        if heads and kv_heads and heads % kv_heads:
            argument = f"vary.mechanism[{index}].{mechanism.name}.num_kv_heads"
            rule = f"must divide the {heads} heads of {spec.model_name}"
            yield Problem(argument, rule, str(kv_heads), _divisors(heads, kv_heads))


def _context(spec: ExperimentSpec, context: int) -> Iterator[Problem]:
    rule = f"must be at most {context} tokens, the context of {spec.model}"
    for length in spec.vary.sequence_length or ():
        if length > context:
            yield Problem("vary.sequence_length", rule, str(length))
    if spec.input.max_tokens is not None and spec.input.max_tokens > context:
        yield Problem("input.max_tokens", rule, str(spec.input.max_tokens))
    if spec.input.text is None:
        return
    tokens, exact = spec.text_tokens(), True
    if tokens is None:
        # every tokenizer of a known model splits at spaces first
        tokens, exact = len(spec.input.text.split()), False
    if (
        spec.vary.sequence_length is None
        and spec.input.max_tokens is None
        and tokens + spec.generated > context
    ):
        rule += "; cut it with input.max_tokens or vary.sequence_length"
        yield Problem("input.text", rule, f"{'' if exact else 'at least '}{tokens} tokens")
    longest = max(spec.vary.sequence_length or (0,))
    available = min(tokens, spec.input.max_tokens or tokens) + spec.generated
    # with a needle the text fills only what needle, question and answer leave: the run checks that
    whole = exact and not spec.input.repeat and spec.input.needle is None
    if whole and longest > available:
        rule = f"must be at most the text's {available} tokens, unless input.repeat is true"
        yield Problem("vary.sequence_length", rule, str(longest))


def _divisors(number: int, near: int) -> tuple[str, ...]:
    divisors = [value for value in range(1, number + 1) if number % value == 0]
    return tuple(str(value) for value in sorted(sorted(divisors, key=lambda value: abs(value - near))[:8]))
