"""What a map costs while the model runs: time, memory and bytes stored, against the plain SDPA forward in one process.

    python benchmarks/capture.py [--model smollm2-135m] [--tokens 2048] [--dtype float32] [--repeats 3]

Plain and captured forwards take turns, so that both meet the same machine. The captured one ends when everything is
in the database (SQLite in a temporary folder). Memory is the process's high water mark, reset before each part.
"""

import argparse
import pydoc_data.topics
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from attnlab.hook import LayerCall
from attnlab.models import shared_model
from attnlab.probes.maps import LayerCapture, capture_call
from attnlab.probes.memory import CLEAR_REFS, give_back_free_heap, heap_kept, resident
from attnlab.recorder import Recorder, core_is_free
from attnlab.run import execute
from attnlab.spec import ExperimentSpec, RunPoint, parse_spec
from attnlab.subjects.model import ModelSubject
from attnlab_storage import queue, tensors
from attnlab_storage.database import Store, migrate, open_store


class Took(NamedTuple):
    """What a step cost: seconds on the wall, seconds of processor (all threads), bytes above the model."""

    seconds: float
    processor: float
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'capture.db'}"
        migrate(url)
        with open_store(url) as store:
            measure(store, options)


def measure(store: Store, options: argparse.Namespace) -> None:
    spec = parse_spec(
        {
            "name": "capture",
            "model": options.model,
            "input": {"text": " ".join(pydoc_data.topics.topics.values())[:60_000]},
            "vary": {"mechanism": "multi_head", "sequence_length": options.tokens, "dtype": options.dtype},
            "record": ["maps"],
        }
    )
    loaded = shared_model(options.model, options.dtype, "cpu")
    model = loaded.model
    ids = torch.tensor([loaded.encode(spec.input.text or "", options.tokens).ids])

    def plain() -> None:
        model.set_attn_implementation("sdpa")
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        loaded.logits(hidden[:, -1:])  # the captured forward ends so too

    with torch.inference_mode():
        # every weight comes into memory, the head's too
        loaded.logits(model.base_model(ids[:, :8], use_cache=False).last_hidden_state)
        base = resident("VmRSS")
        plain()
        runs: dict[str, list[Took]] = {"plain": [], "captured": [], "settled": []}
        for _ in range(options.repeats):
            runs["plain"].append(took(plain, base))
            claim = claim_one(store, spec)
            subject = ModelSubject(loaded, spec, RunPoint(**claim.point))
            recorder = Recorder(store, claim)
            with subject.ready():
                runs["captured"].append(took(partial(capture_all, recorder, subject), base))
            runs["settled"].append(took(recorder.settle, base))  # as a run does it, after the forward
            queue.finish(store, claim, "succeeded")
    claim = claim_one(store, spec)
    whole = took(partial(execute, store, claim), base)
    report(options, runs, whole)
    print(f"  stored: {tensors.stored_bytes(store, claim.run_id) / 1e6:.1f} MB")


def capture_all(recorder: Recorder, subject: ModelSubject) -> None:
    """One forward whose every layer is in the database when it ends, as a run does it."""
    kept: list[LayerCapture] = []
    beside = core_is_free(subject.device)
    with heap_kept(), recorder.writer(subject.layers, beside=beside) as writer:

        def capture(call: LayerCall) -> None:
            made = capture_call(call)
            kept.append(made.released())
            writer.put(made)

        subject.step(capture)


def report(options: argparse.Namespace, runs: dict[str, list[Took]], whole: Took) -> None:
    print(f"{options.model}, {options.tokens} tokens, {options.dtype}, {torch.get_num_threads()} threads")
    for name, parts in runs.items():
        seconds = [round(part.seconds, 2) for part in parts]
        peak = max(part.peak for part in parts) / 1e6
        print(
            f"  {name:9} median {statistics.median(seconds):.2f} s of {seconds}, {peak:.0f} MB above the model"
        )
    for name in ("seconds", "processor"):
        pairs = zip(runs["captured"], runs["plain"], strict=True)
        ratios = [getattr(mine, name) / getattr(theirs, name) for mine, theirs in pairs]
        print(
            f"  captured / plain, {name}: median {statistics.median(ratios):.3f} of {[round(r, 3) for r in ratios]}"
        )
    print(
        f"  the whole run, with check and refining: {whole.seconds:.1f} s, {whole.peak / 1e6:.0f} MB above the model"
    )


def claim_one(store: Store, spec: ExperimentSpec) -> queue.Claim:
    points = [point.to_dict() for point in spec.points()]
    submitted = queue.submit(store, name=spec.name, spec=spec.to_dict(), spec_hash=spec.hash(), points=points)
    claim = queue.claim(store, "benchmark", run_id=submitted.run_ids[0])
    assert claim is not None
    return claim


def took(step: Callable[[], object], base: int) -> Took:
    """Run a step once; base is what the process held with the model alone."""
    give_back_free_heap()
    CLEAR_REFS.write_text("5")
    began, spent = time.perf_counter(), time.process_time()
    step()
    return Took(time.perf_counter() - began, time.process_time() - spent, resident("VmHWM") - base)


if __name__ == "__main__":
    main()
