"""The ``serving`` section of a spec: who asks for what, and what the server has to answer with. Torch-free.

As YAML::

    phase: serving
    serving:
      workload:
        requests: 64
        arrivals: {process: poisson, rate: 4}          # a second; or all_at_once
        prompt_tokens: {distribution: lognormal, median: 128, sigma: 0.8, high: 512}
        output_tokens: 64                              # the same for all
      cache_bytes: 16777216                            # or num_blocks
      token_budget: 256
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt

MAX_REQUESTS = 4096
MAX_TOKENS = 1 << 20
"""of one prompt or answer"""
MAX_WORKLOAD_TOKENS = 1 << 22
"""of all requests together"""
MAX_RATE = 1e5
CACHES = ("contiguous", "paged")
MECHANISMS = ("multi_head", "grouped_query", "multi_head_latent")
"""what an engine can serve; where its cache lies, ``vary.cache`` says"""

Count = Annotated[StrictInt, Field(ge=1, le=MAX_TOKENS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arrivals(_Strict):
    """When requests come: all at time 0, or as a Poisson process."""

    process: Literal["all_at_once", "poisson"] = "all_at_once"
    rate: Annotated[float, Field(gt=0, le=MAX_RATE)] | None = None
    """requests a second, of poisson"""


class Lengths(_Strict):
    """How long prompts or answers are, in tokens; a number alone is ``fixed``."""

    distribution: Literal["fixed", "uniform", "lognormal"] = "fixed"
    tokens: Count | None = None
    """of fixed"""
    median: Annotated[float, Field(ge=1, le=MAX_TOKENS)] | None = None
    """of lognormal"""
    sigma: Annotated[float, Field(ge=0, le=4)] | None = None
    """of lognormal: the standard deviation of the logarithm"""
    low: Count | None = None
    """the least, default 1; of lognormal: shorter ones are brought to it"""
    high: Count | None = None
    """the most; of lognormal: longer ones are brought to it"""


def _number_is_fixed(value: Any) -> Any:
    return {"tokens": value} if type(value) is int else value


def _named_process(value: Any) -> Any:
    return {"process": value} if isinstance(value, str) else value


LengthChoice = Annotated[Lengths, BeforeValidator(_number_is_fixed)]


class Workload(_Strict):
    """The requests: drawn by the spec's seed, or those of a trace."""

    requests: Annotated[StrictInt, Field(ge=1, le=MAX_REQUESTS)] | None = None
    """how many; of a trace the first so many, default all"""
    arrivals: Annotated[Arrivals, BeforeValidator(_named_process)] = Arrivals()
    prompt_tokens: LengthChoice | None = None
    output_tokens: LengthChoice | None = None
    trace: tuple[tuple[float, int, int], ...] | None = None
    """arrival in seconds, prompt and output tokens of each request; a file name is read when the spec is parsed"""
    time_scale: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """arrivals of a trace are multiplied by it"""
    length_scale: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """lengths of a trace are multiplied by it (rounded up), to fit a small machine"""
    shared_prefix: Annotated[StrictInt, Field(ge=0, le=MAX_TOKENS)] = 0
    """tokens put before every prompt, the same for all, as a system prompt"""


class ServingSpec(_Strict):
    """A workload, and the engine that serves it."""

    workload: Workload
    cache_bytes: Annotated[StrictInt, Field(ge=1, le=1 << 45)] | None = None
    """memory of the cache, all layers; each mechanism makes of it as many blocks as it can"""
    num_blocks: Annotated[StrictInt, Field(ge=1, le=1 << 24)] | None = None
    """or the number of blocks, whatever their bytes"""
    block_size: Annotated[StrictInt, Field(ge=1, le=1024)] = 16
    max_length: Count | None = None
    """longest sequence; a contiguous cache sets so much aside for each. Default: the longest request"""
    token_budget: Annotated[StrictInt, Field(ge=1, le=65_536)] = 256
    """most tokens of a step"""
    chunk_size: Annotated[StrictInt, Field(ge=1, le=65_536)] = 128
    """most prompt tokens of one sequence in a step"""
    max_batch: Annotated[StrictInt, Field(ge=1, le=1024)] = 32
    """most sequences at a time"""
    prefix_sharing: StrictBool = False
    """prompts that begin alike share their full blocks (paged only)"""
    layers: Annotated[StrictInt, Field(ge=1, le=64)] = 1
    """attention layers of a bare module's stack"""
