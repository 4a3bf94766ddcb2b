"""The networks of zoo/mini-flux: how they are built, what they are given in training, how they become a pipeline.

Parameters: FluxTransformer2DModel 3.4 M (1 joint and 6 single blocks, width 160), T5 encoder 0.29 M (2 layers, width
128), CLIP text encoder 0.29 M (the first layer of zoo/clip's text tower), AutoencoderKL 0.96 M: 10 MB in bf16, which
is what the zoo has room for. Wider and deeper ones (3 joint and 6 single blocks of width 192: 7.6 M) are options of
`zoo/train_mini_flux.py`.

Eight latent channels at a quarter of the size: the first 8 principal components of 4 x 4 blocks of pixels keep 29.9 dB
at 64 px and 33.1 dB at 128 px (4 components: 25.9 and 28.3); the landed autoencoder, briefly trained, is about as
good. A token, 2 x 2 latents, stays at 32 numbers. FLUX has 16 channels; here they would spend the few parameters of
the transformer on texture.

Shape suffixes: B images, C latent channels, H W latents, N image tokens, D numbers of a token, L words.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from data.scenes import NUM_CLASSES, edit_vocabulary, vocabulary
from zoo.phrases import VALUES
from zoo.training import FUSED_ATTENTION, save_pipeline

WORDS = 32  # tokens of a prompt, for both text encoders
SMALL, LARGE = 64, 128  # the two native sizes in pixels
LATENT_CHANNELS = 8


class Words(NamedTuple):
    """Token ids of prompts, (B, L) each."""

    clip: Tensor
    t5: Tensor


class Tokenizers(NamedTuple):
    """CLIP's and T5's."""

    clip: CLIPTokenizer
    t5: T5Tokenizer

    def __call__(self, prompts: list[str]) -> Words:
        """Padded and cut to `WORDS`, as the pipelines do it."""
        settings = {"padding": "max_length", "max_length": WORDS, "truncation": True, "return_tensors": "pt"}
        return Words(*(tokenizer(prompts, **settings).input_ids for tokenizer in self))


# ------------------------------------------------------------------------------------------------- what is built


def build_t5_tokenizer() -> T5Tokenizer:
    """Every word of captions and instructions is a token; letters spell the others."""
    words = sorted({*vocabulary(), *edit_vocabulary()})
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [(f"▁{word}", -1.0) for word in words] + [("▁", -3.0), (",", -3.0), (".", -3.0)]
    pieces += [(letter, -10.0) for letter in letters]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=specials + pieces, extra_ids=0, additional_special_tokens=[], model_max_length=WORDS)


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            num_heads=4,
            d_ff=192,
            num_layers=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            initializer_factor=1.0,
        )
    )


def build_transformer(width: int, joint_layers: int, single_layers: int, text_widths: tuple[int, int]):
    """A FluxTransformer2DModel with heads of 32; an image token is 2 x 2 latents.

    Args:
        text_widths: of the pooled text, of the text tokens.
    """
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=joint_layers,
        num_single_layers=single_layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        pooled_projection_dim=text_widths[0],
        joint_attention_dim=text_widths[1],
        axes_dims_rope=(8, 12, 12),
    )
    # As in DiT: every block begins as the identity, and the answer as zero.
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks, transformer]
    for name in ("norm", "norm1", "norm1_context", "norm_out"):
        for layer in (getattr(block, name).linear for block in blocks if hasattr(block, name)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Dynamic shifting: FLUX's two shifts, at our two numbers of tokens instead of 256 and 4096.

    Their ratio, e^0.65, is close to the factor 2 that keeps the signal-to-noise ratio when the side doubles.
    """
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=tokens_of(SMALL),
        max_image_seq_len=tokens_of(LARGE),
    )


def tokens_of(size: int) -> int:
    """Image tokens of a square picture of `size` pixels."""
    return (size // 8) ** 2


# --------------------------------------------------------------------------------------------- what is trained


class Denoiser(nn.Module):
    """The networks that are trained together: the velocity of noisy latents, from a noise level and a prompt.

    A hidden layer in the middle also tells what every image token shows, class by class, which speeds up learning as
    alignment with the features of another network does (arXiv 2410.06940); zoo/dino hardly tells shapes, and the world
    knows its own. Likewise the text encoder tells, at every noun, what is said of it (`zoo.phrases`): from the flow
    alone it hardly learns which colour belongs to which noun. The heads that read them are dropped after training.
    """

    def __init__(
        self, transformer: FluxTransformer2DModel, text_encoder: CLIPTextModel, text_encoder_2: T5EncoderModel
    ):
        super().__init__()
        self.transformer, self.text_encoder, self.text_encoder_2 = transformer, text_encoder, text_encoder_2
        self.classify = nn.Linear(transformer.inner_dim, NUM_CLASSES)
        self.describe = nn.Linear(text_encoder_2.config.d_model, sum(VALUES))
        blocks = transformer.single_transformer_blocks
        blocks[(len(blocks) - 1) // 2].register_forward_hook(self._keep_middle)
        self._middle = None

    def _keep_middle(self, block: nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        self._middle = outputs[1]

    def forward(
        self, x_BCHW: Tensor, sigma_B: Tensor, words: Words, source_BCHW: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity (B, C, H, W), logits (B, N, classes) of what the image tokens show, and (B, L, values) of words.

        Args:
            x_BCHW: (1 - σ) x_0 + σ ε.
            sigma_B: noise levels in [0, 1].
            words: of the captions, or of instructions where there is a source.
            source_BCHW: latents of the picture to edit.
        """
        height, width = x_BCHW.shape[2:]
        tokens_BND, ids_N3 = pack(x_BCHW), position_ids(x_BCHW)
        count = tokens_BND.shape[1]
        if source_BCHW is not None:
            tokens_BND = torch.cat([tokens_BND, pack(source_BCHW)], dim=1)
            ids_N3 = torch.cat([ids_N3, position_ids(source_BCHW, reference=1)])
        text_BLD = self.text_encoder_2(words.t5)[0]
        v_BND = self.transformer(
            hidden_states=tokens_BND,
            encoder_hidden_states=text_BLD,
            pooled_projections=self.text_encoder(words.clip).pooler_output,
            timestep=sigma_B,
            img_ids=ids_N3,
            txt_ids=ids_N3.new_zeros(words.t5.shape[1], 3),
            return_dict=False,
        )[0][:, :count]
        logits = self.classify(self._middle[:, :count])
        self._middle = None
        return unpack(v_BND, height, width).float(), logits.float(), self.describe(text_BLD).float()


def pack(x_BCHW: Tensor) -> Tensor:
    """Latents as tokens (B, H/2 · W/2, 4C)."""
    return FluxPipeline._pack_latents(x_BCHW, *x_BCHW.shape)


def unpack(tokens_BND: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`; height and width are those of the latents."""
    return FluxPipeline._unpack_latents(tokens_BND, height, width, vae_scale_factor=1)


def position_ids(x_BCHW: Tensor, reference: int = 0) -> Tensor:
    """Kontext's ids (N, 3) of image tokens: 0 or, for a reference picture, 1; row; column."""
    height, width = x_BCHW.shape[2:]
    ids_N3 = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, x_BCHW.device, torch.float32)
    ids_N3[:, 0] = reference
    return ids_N3


def noise_levels(
    count: int, tokens: int, scheduler: FlowMatchEulerDiscreteScheduler, draw: torch.Generator, further: float = 1.0
) -> Tensor:
    """Logit-normal σ (arXiv 2403.03206), stratified over the batch, shifted as the scheduler shifts for `tokens`.

    And `further` times that, towards noise.
    """
    strata = (torch.randperm(count, generator=draw) + torch.rand(count, generator=draw)) / count
    sigma_B = torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4)).sigmoid()
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[key] for key in keys))
    shift = further * math.exp(mu)
    return shift / (shift + 1 / sigma_B - 1)


# ------------------------------------------------------------------------------------------------ what is saved


def open_tokenizers(clip_folder: Path, t5_folder: Path | None = None) -> Tokenizers:
    """CLIP's from a folder; T5's likewise, or a new one."""
    t5 = build_t5_tokenizer() if t5_folder is None else T5Tokenizer.from_pretrained(t5_folder)
    return Tokenizers(CLIPTokenizer.from_pretrained(clip_folder), t5)


def open_networks(folder: Path) -> Denoiser:
    """The networks of a pipeline's folder, in float32."""
    settings = {"dtype": torch.float32}
    attention = {"attn_implementation": "sdpa" if FUSED_ATTENTION else "eager"}
    return Denoiser(
        FluxTransformer2DModel.from_pretrained(folder / "transformer", **settings),
        CLIPTextModel.from_pretrained(folder / "text_encoder", **settings, **attention),
        T5EncoderModel.from_pretrained(folder / "text_encoder_2", **settings),
    )


def build_networks(clip_folder: Path, tokenizers: Tokenizers, width: int, joint_layers: int, single_layers: int):
    """New networks; the CLIP text encoder is the first layer of the tower in `clip_folder`."""
    attention = "sdpa" if FUSED_ATTENTION else "eager"
    clip = CLIPTextModel.from_pretrained(
        clip_folder, dtype=torch.float32, num_hidden_layers=1, attn_implementation=attention
    )
    t5 = build_t5(tokenizers.t5)
    widths = clip.config.hidden_size, t5.config.d_model
    return Denoiser(build_transformer(width, joint_layers, single_layers, widths), clip, t5)


def assemble(denoiser: Denoiser, vae: AutoencoderKL, tokenizers: Tokenizers, folder: Path) -> None:
    """Writes a folder, in bf16, that both FluxPipeline and FluxKontextPipeline load."""
    denoiser.text_encoder.config._attn_implementation = "sdpa"
    for part in (vae, denoiser.transformer):
        part.register_to_config(_name_or_path="")
    pipeline = FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizers.clip,
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer_2=tokenizers.t5,
        transformer=denoiser.transformer,
    )
    save_pipeline(pipeline, folder)
