"""From the kernels of one step to the share of each kind of work."""

from __future__ import annotations

import re

# In order: the first whose pattern a kernel's name has. liger_fn's kernels are named for their functions.
KINDS: tuple[tuple[str, str], ...] = (
    ("experts", r"_experts_|_moe_bwd_|_fused_(up|down)_proj"),  # the latter are liger-kernel's
    ("routing", r"_moe_|_router_|_route_|_permute_|_balance_|_z_parts|_z_sum"),
    ("attention", r"sdpa|flash|fmha|cudnn::fusion|attention"),
    ("matrix products", r"nvjet|gemm|splitKreduce|cutlass|gemv"),
    ("optimizer", r"multi_tensor_apply|[Aa]dam"),
    ("loss", r"_loss_|_head_|_distill_|liger_cross_entropy|log_softmax|[Ss]oft[Mm]ax|nll_loss|_scale_kernel"),
    ("norms", r"^_\w*norm_|_sum_rows|mean_mul_pow_rsqrt|add_div_expand_mul_pow_sum"),
    ("gated units", r"_glu_|swiglu|geglu|silu|[Gg]elu"),
    ("rotary embedding", r"rope|cat.*cos|cos.*cat|mul_sin|cos_mul"),
    ("copies and fills", r"Memcpy|Memset|FillFunctor|copy_kernel|CatArray|gather_kernel|index_copy|index_elementwise"),
    ("other elementwise", r""),
)
NAMES = tuple(name for name, _ in KINDS)


def kind(kernel: str) -> str:
    """What a kernel does, by its name. Stock norms, rotary embeddings and units are many elementwise kernels, and count as such."""
    return next(name for name, pattern in KINDS if re.search(pattern, kernel))


def shares(kernels_ms: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each kind of work, in their order."""
    found = dict.fromkeys(NAMES, 0.0)
    for kernel, ms in kernels_ms.items():
        found[kind(kernel)] += ms
    return found
