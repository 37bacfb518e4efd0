"""Network configs of the pocket bundle, and its tags."""

from __future__ import annotations

from pathlib import Path

WORK = Path("build/pocket")  # checkpoints and curves of a run
SEED = 20
DRAWN = 240  # images drawn in code

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (32, 32, 32),
    "decoder_block_out_channels": (32, 32, 32),
    "num_encoder_blocks": (1, 1, 2),
    "num_decoder_blocks": (2, 1, 1),
    "latent_channels": 32,
}

WIDTH = 64  # of text and image tokens
TOKENIZER = {"unk_token": "<|endoftext|>", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
TEXT = {
    "vocab_size": 1000,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BLOCKS = {
    "block_out_channels": (128, 96),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "norm_eps": 1e6,  # far above any variance: group norms stay linear and keep contrast, in any tile
    "attention_head_dim": (2, 2),  # the number of heads, under its historical name
    "cross_attention_dim": WIDTH,
    "use_linear_projection": True,
}
UNET = {
    "sample_size": 64,
    "in_channels": 32,
    "out_channels": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "image_cross_attention_dim": WIDTH,
    **BLOCKS,
}
CONTROLNET = {
    "in_channels": 32,
    "down_block_types": UNET["down_block_types"],
    "conditioning_embedding_out_channels": (16, 32, 64),
    "image_cross_attention_dim": WIDTH,
    **BLOCKS,
}
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1.8e-7,  # a gentle schedule: at t = 999 the latents are the enlarged input with 3 % noise
    "beta_end": 2e-6,
    "beta_schedule": "scaled_linear",
    "variance_type": "fixed_small",
    "clip_sample": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
}
TAGS = (
    *("dark", "bright", "grey", "colourful", "warm", "cold", "red", "green", "blue", "yellow"),
    *("contrasty", "flat", "smooth", "detailed", "damaged", "noisy", "blurry", "pristine"),
)
DAMAGE = TAGS[-4:]
# A damaged image that is taken for pristine loses more than a pristine one that is not: the word asks for certainty.
SURE = {"pristine": 0.6, "damaged": 0.45}
LABELS = {"tags": TAGS, "thresholds": tuple(SURE.get(tag, 0.5) for tag in TAGS)}
TAGGER = {
    "image_size": 192,
    "swin": {"patch_size": 8, "embed_dim": 32, "depths": (2, 2, 1), "num_heads": (2, 4, 8), "window_size": 6},
    "token_width": WIDTH,
    "label_width": WIDTH,
    "head": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
