"""Fixtures that several tests share."""
import pytest
import torch


@pytest.fixture(scope="session")
def make_pipe():
    """make_pipe(inpaint=False, seed=0): a random-weight Stable-Diffusion-shaped pipeline, 128x128, in under 0.1 s."""
    def build(inpaint=False, seed=0):
        from diffusers import (AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline,
                               UNet2DConditionModel)
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
        torch.manual_seed(seed)
        letters = "abcdefghijklmnopqrstuvwxyz,."
        words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
        vocab = {word: i for i, word in enumerate(words)}
        bos, eos = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
        text = CLIPTextModel(CLIPTextConfig(vocab_size=len(vocab), hidden_size=16, intermediate_size=32,
                                            num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16,
                                            bos_token_id=bos, eos_token_id=eos, pad_token_id=eos))
        vae = AutoencoderKL(block_out_channels=(8, 8, 8, 16), norm_num_groups=4, latent_channels=4, layers_per_block=1,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        unet = UNet2DConditionModel(sample_size=16, in_channels=9 if inpaint else 4, out_channels=4,
                                    block_out_channels=(16, 16, 32), norm_num_groups=4, layers_per_block=1,
                                    cross_attention_dim=16, attention_head_dim=2,
                                    down_block_types=("CrossAttnDownBlock2D",) * 3,
                                    up_block_types=("CrossAttnUpBlock2D",) * 3)
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                  clip_sample=False, set_alpha_to_one=False)
        kind = StableDiffusionInpaintPipeline if inpaint else StableDiffusionPipeline
        pipe = kind(vae=vae, text_encoder=text, tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16),
                    unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
                    requires_safety_checker=False)
        for part in (vae, unet, text):
            part.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    return build


@pytest.fixture(scope="session")
def tiny_pipe(make_pipe):
    """One shared random pipeline. Tests must leave it as they found it (that is what several of them check)."""
    return make_pipe()
