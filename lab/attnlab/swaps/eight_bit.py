"""FlashAttention-3 in a model's place: exact in 16 bits, and in eight-bit floats what the rounding costs."""

from __future__ import annotations

from dataclasses import dataclass

from attnlab_kernels.mechanisms.flash_attention_3 import FlashAttention3Core
from attnlab_kernels.operations.softmax.api import AttendCall, observing
from attnlab_kernels.output import AttentionOutput

from .softmax import Attended, Kind, ModelCall, Shape, Swap, softmax_attended


@dataclass(eq=False)
class FlashAttention3Swap(Swap):
    """The Hopper kernel where it runs, else the same function; with ``use_fp8`` the block-scaled simulation."""

    use_fp8: bool = False
    fp8_block_size: int = 128

    def attend(self, call: ModelCall) -> Attended:
        if self.use_fp8 or call.extras.keys() - {"bias"}:
            call.plain("flash_attention_3")
        core = FlashAttention3Core(self.use_fp8, self.fp8_block_size)

        def run() -> AttentionOutput:
            return core.attend(
                call.query,
                call.key,
                call.value,
                mask=call.mask,
                scale=call.scale,
                implementation=self.implementation,
                **call.extras,
            )

        calls: list[AttendCall] = []
        with observing(calls.append):
            made = run()
        # in eight bits the map is that of the rounded queries and keys
        (seen,) = calls
        return softmax_attended(call, seen.k, seen.v, call.mask, made, query=seen.q, again=run)

    def kind(self, shape: Shape) -> Kind:
        return "approximate" if self.use_fp8 else "exact"
