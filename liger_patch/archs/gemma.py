"""The Gemma family: norms whose weights are stored around zero, GeGLU, soft caps."""

from .._spec import GLU, Arch, Head, Norm, Rope
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
    Arch(
        "gemma4_text",
        norm=Norm("Gemma4RMSNorm", cast="gemma"),
        mlp=GLU("Gemma4TextMLP", act="gelu_tanh"),
        rope=Rope(kind="one"),
        head=Head(),
    ),
    Arch(
        "gemma4_unified_text",
        norm=Norm("Gemma4UnifiedRMSNorm", cast="gemma"),
        mlp=GLU("Gemma4UnifiedTextMLP", act="gelu_tanh"),
        rope=Rope(kind="one"),
        head=Head(),
    ),
    Arch(
        "recurrent_gemma",
        norm=Norm("RecurrentGemmaRMSNorm", offset=1.0, cast="gemma"),
        mlp=GLU("RecurrentGemmaMlp", act="gelu_tanh"),
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
