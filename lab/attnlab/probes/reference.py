"""What an attention is timed against in the same process: plain causal SDPA on its own queries, keys and values."""

from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from ..hook import LayerCall
from .kernel import KernelCall


def causal_reference(call: LayerCall, backward: bool) -> KernelCall:
    """Return PyTorch's own choice of causal attention on the tensors of a call, whatever the call's own mask."""
    operands = tuple(tensor.detach() for tensor in (call.query, call.key, call.value))
    if backward:
        operands = tuple(tensor.clone().requires_grad_() for tensor in operands)
    floor = sum(tensor.numel() * tensor.element_size() for tensor in (call.output, call.lse))
    return KernelCall(call.layer, operands, causal_attention, "sdpa", floor, backward, None, call.output)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of query [B, Hq, Sq, D] to key and value [B, Hkv, Sk, D], aligned at the bottom right."""
    grouped = query.shape[1] != key.shape[1]
    queries, keys = query.shape[2], key.shape[2]
    if queries == 1:  # the last token sees every key
        return scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
    if queries == keys:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    mask = causal_lower_right(queries, keys)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
