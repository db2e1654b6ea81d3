"""Every implementation of softmax attention by name, in the order in which pages list them."""

from __future__ import annotations

from torch import Tensor

from attnlab_kernels.masks import Mask
from attnlab_kernels.operations.softmax import (
    banded,
    eager,
    external,
    flash_attn2,
    flash_attn3,
    flash_attn4,
    flashinfer,
    flex,
    hub,
    sdpa,
    triton_forward,
    triton_hopper,
    xformers,
)
from attnlab_kernels.operations.softmax.support import Implementation, Modifiers, Support


def _any_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Tensor | None,
    modifiers: Modifiers,
    need_grad: bool,
) -> Support:
    return Support(True, "the reference: keeps every score in memory")


IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        Implementation("eager", "PyTorch eager (reference)", eager.run, _any_call, "any device"),
        Implementation("sdpa_math", "SDPA math", sdpa.run_math, sdpa.supports_math, "any device"),
        Implementation(
            "sdpa_flash",
            "SDPA flash",
            sdpa.run_flash,
            sdpa.supports_flash,
            "a CPU, or an NVIDIA GPU from Ampere (sm80) with half types",
        ),
        Implementation(
            "sdpa_efficient",
            "SDPA memory-efficient",
            sdpa.run_efficient,
            sdpa.supports_efficient,
            "an NVIDIA GPU from Maxwell (sm50)",
        ),
        Implementation(
            "sdpa_cudnn",
            "SDPA cuDNN",
            sdpa.run_cudnn,
            sdpa.supports_cudnn,
            "an NVIDIA GPU from Ampere (sm80) with cuDNN 9 and half types",
        ),
        Implementation(
            "flex", "FlexAttention", flex.run, flex.supports, "any device; fused on an NVIDIA GPU"
        ),
        Implementation(
            "triton",
            "attnlab Triton",
            triton_forward.run,
            triton_forward.supports,
            "an NVIDIA GPU from Ampere (sm80), or a CPU under TRITON_INTERPRET=1",
        ),
        Implementation(
            "triton_hopper",
            "attnlab Triton for Hopper",
            triton_hopper.run,
            triton_hopper.supports,
            "an NVIDIA Hopper GPU (sm90) with half types, or a CPU under TRITON_INTERPRET=1",
        ),
        Implementation("banded", "Banded flash tiles", banded.run, banded.supports, "a CPU and a window"),
        Implementation(
            "flash_attn_2",
            "flash-attn 2",
            flash_attn2.run,
            flash_attn2.supports,
            "an NVIDIA GPU from Ampere (sm80), half types, pip install flash-attn (compiles)",
            external.tokens_first,
        ),
        Implementation(
            "flash_attn_3",
            "FlashAttention-3",
            flash_attn3.run,
            flash_attn3.supports,
            "Hopper (sm90), half types, flash_attn_interface built from its sources",
            external.tokens_first,
        ),
        Implementation(
            "flash_attn_4",
            "flash-attn 4",
            flash_attn4.run,
            flash_attn4.supports,
            "Hopper or Blackwell, half types, pip install --pre flash-attn-4",
            external.tokens_first,
        ),
        Implementation(
            "flash_attn_hub",
            "Hub flash-attn 2",
            hub.run,
            hub.supports,
            "an NVIDIA GPU from Ampere (sm80), half types, pip install kernels, a kernel fetched before",
            external.tokens_first,
        ),
        Implementation(
            "flashinfer",
            "FlashInfer",
            flashinfer.run,
            flashinfer.supports,
            "an NVIDIA GPU from Ampere (sm80), half types, pip install flashinfer-python",
            flashinfer.arrange_all,
        ),
        Implementation(
            "xformers",
            "xFormers",
            xformers.run,
            xformers.supports,
            "an NVIDIA GPU from Ampere (sm80), half types, pip install xformers",
            external.tokens_first,
        ),
    )
}
