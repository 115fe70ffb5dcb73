"""Decoders that differ from Llama in a part or two."""

from .._spec import GLU, Arch, Head, Norm, Rope

ARCHS = (
    Arch("bamba", norm=Norm("BambaRMSNorm"), mlp=GLU("BambaMLP"), head=Head()),
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
    Arch("ernie4_5", norm=Norm("Ernie4_5RMSNorm"), mlp=GLU("Ernie4_5MLP"), rope=Rope(kind="interleaved_of_halves"), head=Head()),
    Arch("falcon_mamba", norm=Norm("FalconMambaRMSNorm"), head=Head()),
    Arch(
        "glm",
        norm=Norm("GlmRMSNorm"),
        mlp=GLU("GlmMLP", packed="gate_up_proj", act_fn="activation_fn"),
        rope=Rope(kind="interleaved_of_halves"),
        head=Head(),
    ),
    Arch(
        "glm4",
        norm=Norm("Glm4RMSNorm"),
        mlp=GLU("Glm4MLP", packed="gate_up_proj", act_fn="activation_fn"),
        rope=Rope(kind="interleaved_of_halves"),
        head=Head(),
    ),
    Arch("helium", norm=Norm("HeliumRMSNorm", cast="gemma"), mlp=GLU("HeliumMLP"), rope=Rope(kind="interleaved_of_halves"), head=Head()),
    Arch("mamba", norm=Norm("MambaRMSNorm"), head=Head()),
    Arch("mamba2", norm=Norm("Mamba2RMSNorm"), head=Head()),
    Arch(
        "nanochat",
        norm=Norm("NanoChatRMSNorm"),
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
    Arch(
        "youtu",
        norm=Norm("YoutuRMSNorm"),
        mlp=GLU("YoutuMLP"),
        rope=(Rope(), Rope("apply_rotary_pos_emb_interleave", kind="deinterleaved")),
        head=Head(),
    ),
    Arch("blt", norm=Norm("BltRMSNorm"), mlp=GLU("BltMLP"), rope=Rope(kind="interleaved"), head=Head()),
)
