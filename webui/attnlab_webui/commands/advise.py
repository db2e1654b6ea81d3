"""`advise`: the decision tree on a terminal, or from options; the recommendation in words or as JSON."""

import sys
from dataclasses import replace
from typing import Annotated, Any

import typer

from attnlab.advice.tree import Question
from attnlab.advise import (
    KNOWN_SHAPES,
    SCALES,
    Advice,
    Answers,
    advise,
    machine_scale,
    parse_tokens,
    walk,
)
from attnlab.documents import write_document
from attnlab_webui.commands.console import JsonOption, print_document, print_table, refuse, short_bytes

AUTO = "auto"


def advise_command(
    goal: Annotated[
        str | None, typer.Option(help="training, serving, vision, multimodal, research or edge.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Tokens of a sequence, such as 8192, 32k or 1m.")
    ] = None,
    scarce: Annotated[
        str | None, typer.Option(help="For serving: memory, latency, long_context or batch.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="For vision: local, classification, video, ...")] = None,
    aim: Annotated[str | None, typer.Option(help="For research: novel, efficiency or moe.")] = None,
    shape: Annotated[str, typer.Option(help=f"A known model: {', '.join(KNOWN_SHAPES)}.")] = "llama-3-8b",
    layers: Annotated[int | None, typer.Option(help="Layers of your own model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key and value heads, a divisor of the heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Width of a head.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the cache: float32, bfloat16, float16 or float8.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences held at once.")] = None,
    scale: Annotated[str, typer.Option(help="What the experiment shall fit: cpu, gpu or auto.")] = AUTO,
    json: JsonOption = False,
) -> None:
    """Which mechanism for what: a recommendation, its reason, its cache bytes, and the experiment that tests it.

    Asks its questions when called bare on a terminal.
    """
    if shape not in KNOWN_SHAPES:
        refuse(f"--shape must be a known model, got {shape!r}; choices: {', '.join(KNOWN_SHAPES)}")
    if scale not in (*SCALES, AUTO):
        refuse(f"--scale must be cpu, gpu or auto, got {scale!r}")
    tokens = None if context is None else parse_tokens(context)
    answers = Answers(goal=goal, context=tokens, scarce=scarce, task=task, aim=aim)
    if answers == Answers() and sys.stdin.isatty() and not json:
        answers = ask(answers)
    own: dict[str, Any] = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    own |= {"dtype": dtype, "batch": batch}
    given = {name: value for name, value in own.items() if value is not None}
    mine = replace(KNOWN_SHAPES[shape].shape, **given)
    found = advise(answers, mine, machine_scale() if scale == AUTO else scale)
    if json:
        print_document(found.to_dict())
    else:
        print_advice(found)


def ask(answers: Answers) -> Answers:
    """Ask every question on the way, one after another, until there is a recommendation."""
    while isinstance(question := walk(answers)[1], Question):
        typer.echo(f"\n{question.text}")
        if question.is_number:
            answers = replace(answers, context=parse_tokens(typer.prompt("tokens", default="8k")))
            continue
        for number, choice in enumerate(question.choices, 1):
            typer.echo(f"  {number}  {choice.label}: {choice.why}")
        picked = typer.prompt("number", type=int)
        if not 1 <= picked <= len(question.choices):
            refuse(f"the number must be from 1 to {len(question.choices)}; got {picked}")
        answers = replace(answers, **{question.key: question.choices[picked - 1].value})
    return answers


def print_advice(found: Advice) -> None:
    """The recommendation as text for a terminal."""
    leaf = found.leaf
    for step in found.steps:
        typer.echo(f"{step.question.text} {step.choice.label}: {step.choice.why}")
    typer.echo("")
    for part in leaf.parts:
        mark = "+" if part.instead_of is None else f"or, instead of {part.instead_of},"
        typer.echo(f"{mark} {part.title} ({part.mechanism}): {part.role}")
    typer.echo(f"\n{leaf.reason}")
    if leaf.correction:
        typer.echo(f"\nNot so: {leaf.correction}")
    for avoid in leaf.avoid:
        typer.echo(f"- not {avoid.title}: {avoid.why}")
    if found.lines:
        shape = found.shape
        typer.echo(
            f"\nKey-value cache, {shape.context:,} tokens, {shape.batch} at once, {shape.layers} layers of "
            f"{shape.heads} heads over {shape.kv_heads}, {shape.dtype}:"
        )
        rows = [
            (
                ("* " if line.recommended else "  ") + line.title,
                short_bytes(line.bytes_per_sequence),
                short_bytes(line.bytes_in_all),
                f"{line.share:.2%}",
                line.formula,
            )
            for line in found.lines
        ]
        print_table(("mechanism", "a sequence", "in all", "of multi-head", "formula"), rows, empty="")
    typer.echo("\nSources:")
    for source in found.sources:
        typer.echo(f"  {source.title} {source.url}")
    typer.echo(f"\n{leaf.trial.asks} This experiment ({found.scale}) answers it; `attnlab run -` takes it:\n")
    typer.echo(write_document(found.experiment))
