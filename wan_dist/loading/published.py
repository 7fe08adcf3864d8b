"""What the published checkpoints hold, as data: for plans made where neither their files nor the hub are at hand.

Readings of the model cards, of diffusers' conversion script and of lists of the repositories' files, not of the files
themselves; where those are at hand, they are what counts. What only decoding needs, such as the statistics of latents,
is left out. Imports no torch.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

from wan_dist.loading.checkpoint import Checkpoint

_TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2], "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-06, "image_dim": None, "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
}  # fmt: skip
_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_FIVE_B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
_IMAGE = {"in_channels": 36}
_ENCODED_IMAGE = {**_IMAGE, "image_dim": 1280, "added_kv_proj_dim": 5120}
_ENCODED_IMAGES = {**_ENCODED_IMAGE, "pos_embed_seq_len": 514}  # 257 tokens of each

_UMT5_XXL = {
    "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "vocab_size": 256384, "d_model": 4096, "d_ff": 10240,
    "d_kv": 64, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
}  # fmt: skip
_CLIP_VIT_H_14 = {
    "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": 1280,
    "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "num_channels": 3, "image_size": 224,
    "patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu",
}  # fmt: skip
_VAE_2_1 = {
    "_class_name": "AutoencoderKLWan", "base_dim": 96, "decoder_base_dim": None, "z_dim": 16, "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True], "is_residual": False,
    "in_channels": 3, "out_channels": 3, "patch_size": None, "scale_factor_temporal": 4, "scale_factor_spatial": 8,
}  # fmt: skip
_VAE_2_2 = {
    **_VAE_2_1, "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
    "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip
_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
    "use_flow_sigmas": True, "use_dynamic_shifting": False, "solver_order": 2,
}  # fmt: skip

# hub id -> what differs: the transformer, the scheduler's flow_shift, model_index.json
_PUBLISHED: dict[str, tuple[dict[str, Any], float, dict[str, Any]]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (_SMALL, 3.0, {}),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ({}, 3.0, {}),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": (_ENCODED_IMAGE, 3.0, {}),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": (_ENCODED_IMAGE, 5.0, {}),
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": (_ENCODED_IMAGES, 16.0, {}),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ({}, 3.0, {"boundary_ratio": 0.875}),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": (_IMAGE, 3.0, {"boundary_ratio": 0.9}),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (_FIVE_B, 5.0, {"expand_timesteps": True}),
}
_ABSENT = [None, None]


def published(hub_id: str) -> Checkpoint | None:
    """The checkpoint published under this id, its path the id itself; None for one that is not in the table."""
    if hub_id not in _PUBLISHED:
        return None
    differs, flow_shift, told = _PUBLISHED[hub_id]
    transformer = {**_TRANSFORMER, **differs}
    configs = {
        "text_encoder": _UMT5_XXL,
        "vae": _VAE_2_2 if told.get("expand_timesteps") else _VAE_2_1,
        "transformer": transformer,
    }
    if transformer["image_dim"] is not None:
        configs["image_encoder"] = _CLIP_VIT_H_14
    if "boundary_ratio" in told:
        configs["transformer_2"] = transformer
    index = {
        "_class_name": "WanPipeline" if transformer["in_channels"] != 36 else "WanImageToVideoPipeline",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if "transformer_2" in configs else _ABSENT,
        "image_encoder": ["transformers", "CLIPVisionModel"] if "image_encoder" in configs else _ABSENT,
        "image_processor": ["transformers", "CLIPImageProcessor"] if "image_encoder" in configs else _ABSENT,
        **told,
    }
    return Checkpoint(Path(hub_id), deepcopy(index), deepcopy(configs), {**_SCHEDULER, "flow_shift": flow_shift})


def file_dtypes(hub_id: str) -> dict[str, str]:
    """The dtype of each component's files (safetensors' names); nothing for an id that is not in the table.

    Told by how many shards of at most 5 GB there are, which only one dtype fills: transformers are in fp32, 57.2 GB for
    a 14B (12 shards), 65.6 GB with an image branch (14), 20.0 GB for the 5B (5), 5.7 GB for the 1.3B (2). So is the
    text encoder of Wan2.1, 22.7 GB (5); that of Wan2.2 is in bf16, 11.4 GB (3). By the model cards, VAEs are in fp32
    and the image encoder in bf16.
    """
    checkpoint = published(hub_id)
    if checkpoint is None:
        return {}
    text = "F32" if "/Wan2.1-" in hub_id else "BF16"
    of = {"text_encoder": text, "image_encoder": "BF16"}
    return {name: of.get(name, "F32") for name in checkpoint.configs}
