"""Decoders that differ from Llama in a part or two."""

from .._spec import GLU, Arch, Head, Norm, Rope
from ._like import DEINTERLEAVED, like

ARCHS = (
    like("bamba", "Bamba", rope=None),
    Arch(
        "cohere",
        norm=Norm("CohereLayerNorm", kind="layer"),
        mlp=GLU("CohereMLP"),
        rope=Rope(kind="interleaved"),
        head=Head(scale="logit_scale"),
    ),
    Arch(
        "cohere2",
        norm=Norm("Cohere2LayerNorm", kind="layer"),
        mlp=GLU("Cohere2MLP"),
        rope=Rope(kind="interleaved"),
        head=Head(scale="logit_scale"),
    ),
    Arch("diffllama", norm=(Norm("RMSNorm"), Norm("DiffLlamaRMSNorm")), mlp=GLU("DiffLlamaMLP"), rope=Rope(), head=Head()),
    like("ernie4_5", "Ernie4_5", rope=Rope(kind="interleaved_of_halves")),
    Arch("falcon_mamba", norm=Norm("FalconMambaRMSNorm"), head=Head()),
    like("glm", "Glm", mlp=GLU("GlmMLP", packed="gate_up_proj", act_fn="activation_fn"), rope=Rope(kind="interleaved_of_halves")),
    like("glm4", "Glm4", mlp=GLU("Glm4MLP", packed="gate_up_proj", act_fn="activation_fn"), rope=Rope(kind="interleaved_of_halves")),
    like("helium", "Helium", cast="gemma", rope=Rope(kind="interleaved_of_halves")),
    Arch("mamba", norm=Norm("MambaRMSNorm"), head=Head()),
    Arch("mamba2", norm=Norm("Mamba2RMSNorm"), head=Head()),
    like(
        "nanochat",
        "NanoChat",
        mlp=GLU("NanoChatMLP", act="relu_squared", gate="", up="fc1", down="fc2", act_fn="activation_fn"),
        rope=Rope(kind="half_backwards"),
        head=Head(softcap="config.final_logit_softcapping"),
    ),
    Arch(
        "nemotron",
        norm=Norm("NemotronLayerNorm1P", kind="layer", offset=1.0),
        mlp=GLU("NemotronMLP", act="relu_squared", gate=""),
        rope=Rope(),
        head=Head(),
    ),
    Arch("olmo", mlp=GLU("OlmoMLP"), rope=Rope(), head=Head()),
    like("youtu", "Youtu", rope=(Rope(), DEINTERLEAVED)),
    like("blt", "Blt", rope=Rope(kind="interleaved")),
)
