"""Models of several: the head of the whole, and parts whose own output layer is that of the whole."""

from .._spec import GLU, Arch, Head, Norm, Rope
from ._like import LAYER_NORM, OF_TOKENS, like

ARCHS = (
    like("blt_local_decoder", "Blt", rope=Rope(kind="interleaved"), head=None),
    like("blt_patcher", "Blt", rope=Rope(kind="interleaved"), head=None),
    Arch("cpmant", norm=Norm("CpmAntLayerNorm")),
    Arch("fuyu", head=Head()),
    Arch("gemma3", norm=Norm("Gemma3RMSNorm", offset=1.0, cast="gemma"), head=Head()),
    Arch("gemma4", head=Head()),
    Arch("gemma4_unified", head=Head()),
    Arch("glm4v", head=Head()),
    Arch("glm4v_moe", head=Head()),
    Arch("glm4v_moe_vision", norm=(Norm("Glm4vMoeRMSNorm"), LAYER_NORM), mlp=GLU("Glm4vMoeisionMlp"), rope=OF_TOKENS),
    like(
        "glm4v_text",
        "Glm4v",
        mlp=GLU("Glm4vTextMLP", packed="gate_up_proj", act_fn="activation_fn"),
        rope=Rope(kind="interleaved"),
        head=None,
    ),
    Arch("glm4v_vision", norm=(Norm("Glm4vRMSNorm"), LAYER_NORM), mlp=GLU("Glm4VisionMlp"), rope=OF_TOKENS),
    Arch("got_ocr2", head=Head()),
    Arch("idefics3", head=Head()),
    Arch("llama4"),  # its output layer is in a causal LM within, its loss outside of that
    Arch("llava", head=Head()),
    Arch("llava_next", head=Head()),
    Arch("llava_onevision", head=Head()),
    Arch("mistral3", norm=Norm("Mistral3RMSNorm"), head=Head()),
    Arch("mllama", head=Head()),
    like("mllama_text_model", "MllamaText", head=None),
    Arch("modernbert", norm=LAYER_NORM, mlp=GLU("ModernBertMLP", act="gelu", down="Wo", packed="Wi", act_fn="act"), rope=Rope()),
    Arch(
        "modernbert-decoder",
        norm=LAYER_NORM,
        mlp=GLU("ModernBertDecoderMLP", act="gelu", down="Wo", packed="Wi", act_fn="act"),
        rope=Rope(),
    ),
    Arch("paligemma", head=Head()),
    like("pixtral", "Pixtral", mlp=GLU("PixtralMLP", act="gelu"), head=None),
    Arch("qwen2_5_vl", head=Head()),
    like("qwen2_5_vl_text", "Qwen2_5_VL", mlp=GLU("Qwen2MLP"), head=None),
    like("qwen2_5_vl_vision", "Qwen2_5_VL", rope=OF_TOKENS, head=None),
    Arch("qwen2_vl", head=Head()),
    like("qwen2_vl_text", "Qwen2VL", mlp=GLU("Qwen2MLP"), head=None),
    Arch("qwen3_5", head=Head()),
    Arch("qwen3_5_moe", head=Head()),
    Arch("qwen3_vl", head=Head()),
    Arch("qwen3_vl_moe", head=Head()),
    like("qwen3_vl_text", "Qwen3VLText", head=None),
    Arch("smolvlm", head=Head()),
)
