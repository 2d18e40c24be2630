"""Tiny text-to-image pipelines of diffusers' own classes with random weights, hand-made tokenizers and no autoencoder."""

import diffusers
import torch
import transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz "
CLIP = dict(
    vocab_size=60, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=12, projection_dim=6, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
T5 = dict(vocab_size=40, d_model=10, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
GEMMA = dict(
    vocab_size=70, hidden_size=10, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=4,
)  # fmt: skip
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
UNET = dict(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=4,
)  # fmt: skip


def seeded(cls, *args, **kwargs):
    torch.manual_seed(0)
    return cls(*args, **kwargs)


def clip_tokenizer() -> transformers.CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    return transformers.CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=12)


def t5_tokenizer() -> transformers.T5Tokenizer:
    words = ["<pad>", "</s>", "<unk>", "▁", *LETTERS.strip()]
    return transformers.T5Tokenizer([(word, -float(i)) for i, word in enumerate(words)], extra_ids=0)


def bpe_tokenizer(cls):
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|endoftext|>", "▁", *LETTERS, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    return cls({word: i for i, word in enumerate(words)}, [], pad_token="<pad>")


def clip(cls=transformers.CLIPTextModel, **changes):
    return seeded(cls, transformers.CLIPTextConfig(**{**CLIP, **changes})).eval()


def t5(cls=transformers.T5EncoderModel, config=transformers.T5Config):
    return seeded(cls, config(**T5)).eval()


def gemma():
    return {
        "text_encoder": seeded(transformers.Gemma2Model, transformers.Gemma2Config(**GEMMA)).eval(),
        "tokenizer": bpe_tokenizer(transformers.GemmaTokenizer),
    }


def umt5():
    return {"text_encoder": t5(transformers.UMT5EncoderModel, transformers.UMT5Config), "tokenizer": t5_tokenizer()}


def stable_diffusion():
    unet = seeded(diffusers.UNet2DConditionModel, cross_attention_dim=8, **UNET)
    return diffusers.StableDiffusionPipeline(
        None, clip(), clip_tokenizer(), unet, diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
    )


def stable_diffusion_xl():
    unet = seeded(
        diffusers.UNet2DConditionModel, cross_attention_dim=16, addition_embed_type="text_time",
        projection_class_embeddings_input_dim=6 + 6 * 4, addition_time_embed_dim=4, **UNET,
    )  # fmt: skip
    second = clip(transformers.CLIPTextModelWithProjection)
    return diffusers.StableDiffusionXLPipeline(
        None, clip(), second, clip_tokenizer(), clip_tokenizer(), unet, diffusers.DDIMScheduler(), add_watermarker=False
    )


def stable_diffusion_3():
    transformer = seeded(
        diffusers.SD3Transformer2DModel, sample_size=8, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, joint_attention_dim=16, caption_projection_dim=8, pooled_projection_dim=12,
    )  # fmt: skip
    first, second = (clip(transformers.CLIPTextModelWithProjection, hidden_size=8) for _ in "12")
    third = seeded(transformers.T5EncoderModel, transformers.T5Config(**{**T5, "d_model": 16})).eval()
    return diffusers.StableDiffusion3Pipeline(
        transformer, FLOW(), None, first, clip_tokenizer(), second, clip_tokenizer(), third, t5_tokenizer()
    )


def flux():
    transformer = seeded(
        diffusers.FluxTransformer2DModel, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=10, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return diffusers.FluxPipeline(FLOW(), None, clip(), clip_tokenizer(), t5(), t5_tokenizer(), transformer)


def pixart():
    transformer = seeded(
        diffusers.PixArtTransformer2DModel, num_attention_heads=2, attention_head_dim=4, cross_attention_dim=8,
        in_channels=4, out_channels=8, sample_size=8, num_layers=1, caption_channels=10, norm_num_groups=4,
        use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(t5_tokenizer(), t5(), None, transformer, diffusers.DDIMScheduler())


def sana():
    transformer = seeded(
        diffusers.SanaTransformer2DModel, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=10, sample_size=8, patch_size=1, mlp_ratio=1.0,
    )  # fmt: skip
    return diffusers.SanaPipeline(vae=None, transformer=transformer, scheduler=FLOW(), **gemma())


def lumina2():
    transformer = seeded(
        diffusers.Lumina2Transformer2DModel, sample_size=8, patch_size=2, in_channels=4, hidden_size=8, num_layers=1,
        num_refiner_layers=1, num_attention_heads=1, num_kv_heads=1, multiple_of=4, cap_feat_dim=10,
        axes_dim_rope=(2, 2, 4), axes_lens=(300, 64, 64),
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(transformer, FLOW(), None, **gemma())


def aura_flow():
    transformer = seeded(
        diffusers.AuraFlowTransformer2DModel, sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=10,
        caption_projection_dim=8, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(vae=None, transformer=transformer, scheduler=FLOW(), **umt5())


def qwen_image():
    text = dict(
        vocab_size=70, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, rope_parameters={"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 1e4},
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=8, patch_size=2)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    encoder = seeded(transformers.Qwen2_5_VLForConditionalGeneration, config).eval()
    transformer = seeded(
        diffusers.QwenImageTransformer2DModel, patch_size=2, in_channels=16, out_channels=4, num_layers=1,
        attention_head_dim=8, num_attention_heads=1, joint_attention_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return diffusers.QwenImagePipeline(FLOW(), None, encoder, bpe_tokenizer(transformers.Qwen2Tokenizer), transformer)


def wan():
    transformer = seeded(
        diffusers.WanTransformer3DModel, num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=10, freq_dim=8, ffn_dim=8, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.WanPipeline(vae=None, transformer=transformer, scheduler=FLOW(), **umt5())


def stable_diffusion_3_without_t5():
    parts = stable_diffusion_3().components
    return diffusers.StableDiffusion3Pipeline(**{**parts, "text_encoder_3": None, "tokenizer_3": None})


PIPELINES = (
    stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux, pixart, sana, lumina2, aura_flow, qwen_image, wan,
)  # fmt: skip
