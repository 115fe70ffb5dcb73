"""Llama."""

from .._spec import GLU, Arch, Head, Norm, Rope

ARCHS = (
    Arch(
        model_type="llama",
        norm=Norm("LlamaRMSNorm"),
        mlp=GLU("LlamaMLP", act="silu"),
        rope=Rope("apply_rotary_pos_emb"),
        head=Head(),
    ),
)
