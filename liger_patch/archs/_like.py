"""What many entries share."""

from __future__ import annotations

from typing import Any, Literal

from .._spec import GLU, Arch, Head, Norm, Rope

LAYER_NORM = Norm("LayerNorm", kind="layer")
DEINTERLEAVED = Rope("apply_rotary_pos_emb_interleave", kind="deinterleaved")  # of latent attention
OF_TOKENS = Rope("apply_rotary_pos_emb_vision", kind="of_tokens")  # of vision towers


def like(model_type: str, prefix: str, *, cast: Literal["llama", "gemma", "none"] = "llama", offset: float = 0.0, **parts: Any) -> Arch:
    """The entry of a model built like Llama, whose classes begin with `prefix`; `cast` and `offset` are its norm's."""
    given: dict[str, Any] = {"norm": Norm(f"{prefix}RMSNorm", offset=offset, cast=cast), "mlp": GLU(f"{prefix}MLP")}
    return Arch(model_type, **given | {"rope": Rope(), "head": Head()} | parts)
