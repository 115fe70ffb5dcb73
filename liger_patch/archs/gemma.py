"""The Gemma family: norms whose weights are stored around zero, GeGLU, soft caps."""

from .._spec import GLU, Experts, Head, Rope
from ._like import like

ARCHS = (
    like("gemma", "Gemma", cast="gemma", offset=1.0, mlp=GLU("GemmaMLP", act="gelu_tanh")),
    like(
        "gemma2",
        "Gemma2",
        cast="gemma",
        offset=1.0,
        mlp=GLU("Gemma2MLP", act="gelu_tanh"),
        head=Head(softcap="config.final_logit_softcapping"),
    ),
    like("gemma3_text", "Gemma3", cast="gemma", offset=1.0, mlp=GLU("Gemma3MLP", act="gelu_tanh")),
    like(
        "gemma4_text",
        "Gemma4",
        cast="gemma",
        mlp=GLU("Gemma4TextMLP", act="gelu_tanh"),
        rope=Rope(kind="one"),
        experts=Experts("Gemma4TextExperts"),
    ),
    like("gemma4_unified_text", "Gemma4Unified", cast="gemma", mlp=GLU("Gemma4UnifiedTextMLP", act="gelu_tanh"), rope=Rope(kind="one")),
    like(
        "recurrent_gemma",
        "RecurrentGemma",
        cast="gemma",
        offset=1.0,
        mlp=GLU("RecurrentGemmaMlp", act="gelu_tanh"),
        rope=None,
        head=Head(softcap="config.logits_soft_cap"),
    ),
    like(
        "vaultgemma",
        "VaultGemma",
        cast="gemma",
        offset=1.0,
        mlp=GLU("VaultGemmaMLP", act="gelu_tanh"),
        head=Head(softcap="config.final_logit_softcapping"),
    ),
)
