"""The demo model: a plain diffusers pipeline over 64 x 64 pictures, loaded from this package."""

# The libraries used here are typed in part only.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnproc.app.demo.vocabulary import LENGTH, SPECIAL, WEIGHTS, Word, suggest, words

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import BertModel, PreTrainedTokenizerFast

__all__ = ["DemoWeightsError", "Word", "check", "load", "suggest", "words"]

WIDTH = 192
SUMS = "SHA256SUMS"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"

UNET: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 12,
    "out_channels": 12,
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    # diffusers reads this as the number of heads.
    "attention_head_dim": 4,
    "cross_attention_dim": WIDTH,
}

TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "type_vocab_size": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
    # StableDiffusionPipeline hands the tokenizer's mask over if this is set.
    "use_attention_mask": True,
}

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
}


class DemoWeightsError(Exception):
    """The demo model's files are missing or damaged; the message is one line."""


def new_unet() -> "UNet2DConditionModel":
    """An untrained denoiser: 12 channels at 32 x 32, attention at 16 x 16 and 8 x 8."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET)


def new_text_encoder(vocabulary: int) -> "BertModel":
    """An untrained text encoder that reads both ways, so that each word knows its neighbours.

    Args:
        vocabulary: How many tokens there are.
    """
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=vocabulary, **TEXT), add_pooling_layer=False)


def shuffle_vae() -> Any:
    """The pipeline's "VAE": each 2 x 2 patch of RGB becomes one cell of 12 channels, and back."""
    from attnproc.app.demo.shuffle import PixelShuffle

    return PixelShuffle()


def check(folder: Path = WEIGHTS) -> None:
    """Compares every weight file with its checksum.

    Args:
        folder: The model's folder.

    Raises:
        DemoWeightsError: If a file is missing or differs.
    """
    sums = folder / SUMS
    if not sums.is_file():
        raise DemoWeightsError(f"demo model: {sums} is missing; reinstall attnproc")
    for line in sums.read_text(encoding="utf-8").splitlines():
        expected, name = line.split(maxsplit=1)
        path = folder / name
        if not path.is_file():
            raise DemoWeightsError(f"demo model: {path} is missing; reinstall attnproc")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise DemoWeightsError(f"demo model: {path} is damaged (checksum); reinstall attnproc")


def load(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    folder: Path = WEIGHTS,
) -> "StableDiffusionPipeline":
    """Loads the demo model, offline, as an unmodified diffusers pipeline.

    Args:
        device: Where to put it.
        dtype: Its floating type; the files hold float16.
        folder: The model's folder; the shipped one if not given.

    Returns:
        A pipeline whose pictures are 64 x 64; 20 steps at guidance 3 suit it.

    Raises:
        DemoWeightsError: If a file is missing or damaged.
    """
    check(folder)
    with _quiet():
        from diffusers import (
            DPMSolverMultistepScheduler,
            StableDiffusionPipeline,
            UNet2DConditionModel,
        )
        from transformers import BertConfig, BertModel

    unet_config = _config(folder / "unet" / "config.json")
    text_config = _config(folder / "text_encoder" / "config.json")
    unet: Any = UNet2DConditionModel.from_config(unet_config)
    text_encoder: Any = BertModel(BertConfig.from_dict(text_config), add_pooling_layer=False)
    _fill(unet, folder / UNET_FILE)
    _fill(text_encoder, folder / TEXT_FILE)

    scheduler_config = _config(folder / "scheduler" / "scheduler_config.json")
    vae, tokenizer = shuffle_vae(), new_tokenizer(folder / "tokenizer" / "tokenizer.json")
    scheduler: Any = DPMSolverMultistepScheduler.from_config(scheduler_config)
    for module in (unet, text_encoder, vae):
        # diffusers' own `to` warns about every change of dtype, even where nothing can go wrong.
        torch.nn.Module.to(module, device=device, dtype=dtype)
    # The hints of diffusers know neither its own optional parts nor other tokenizers than CLIP's.
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "unet": unet.eval(),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def new_tokenizer(file: Path) -> "PreTrainedTokenizerFast":
    """Wraps a saved word-level tokenizer for the pipeline."""
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        model_max_length=LENGTH,
    )


def save(
    folder: Path,
    unet: "UNet2DConditionModel",
    text_encoder: "BertModel",
    vocabulary: list[str],
) -> None:
    """Writes a model in diffusers' layout, weights in float16, with checksums.

    Args:
        folder: Where to; other files in it stay.
        unet: The denoiser.
        text_encoder: The text encoder.
        vocabulary: The words, without the special tokens.
    """
    from diffusers import DPMSolverMultistepScheduler
    from safetensors.torch import save_file

    from attnproc.app.demo.vocabulary import build

    for name in ("unet", "text_encoder", "scheduler", "tokenizer"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    models: list[tuple[Any, str]] = [(unet, UNET_FILE), (text_encoder, TEXT_FILE)]
    for model, file in models:
        state = {key: value.half().cpu().contiguous() for key, value in model.state_dict().items()}
        save_file(state, folder / file, metadata={"format": "pt"})
    unet.save_config(folder / "unet")
    text_encoder.config.save_pretrained(folder / "text_encoder")
    DPMSolverMultistepScheduler(**SCHEDULER).save_config(folder / "scheduler")
    build(vocabulary).save(str(folder / "tokenizer" / "tokenizer.json"))
    new_tokenizer(folder / "tokenizer" / "tokenizer.json").save_pretrained(folder / "tokenizer")
    _sum(folder)


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Keeps transformers from logging that torchvision, which nothing here needs, is missing."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _sum(folder: Path) -> None:
    files = [UNET_FILE, TEXT_FILE, "tokenizer/tokenizer.json"]
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in files
    ]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DemoWeightsError(f"demo model: {path} is missing; reinstall attnproc")
    return json.loads(path.read_text(encoding="utf-8"))


def _fill(model: torch.nn.Module, file: Path) -> None:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(file))
