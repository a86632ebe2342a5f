"""Whole denoisers of random weights, stock beside `attnproc.swap(model)`: a pass of a pipeline's.

    python benchmarks/denoisers.py --device cuda
    python benchmarks/denoisers.py --tiny --dtype fp32     # tries the program on a CPU

The same gate and modes as benchmarks/run.py. Depth is cut where it says so: all blocks of a model
are alike. Results go to `benchmarks/results/denoisers-<device>-<dtype>.json` after each model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from modes import COMMON, Options, gated
from results import RESULTS
from session import DTYPES, chosen, chosen_modes, measured, named, opened
from sides import Disagreement, difference
from torch import Tensor, nn

import attnproc

# Roundings of one layer pass through all that follow.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
MODES = {name: mode for name, mode in COMMON.items() if name != "backward"}
Value = TypeVar("Value")


@dataclass(frozen=True)
class Make:
    """Makes inputs on a device, small ones if the models are to be tiny."""

    device: str
    dtype: torch.dtype
    tiny: bool
    generator: torch.Generator

    def pick(self, full: Value, small: Value) -> Value:
        """The value for the size that is wanted."""
        return small if self.tiny else full

    def random(self, *shape: int) -> Tensor:
        """Normally distributed, of the model's dtype."""
        made = torch.empty(shape, device=self.device, dtype=self.dtype)
        return made.normal_(generator=self.generator)

    def numbers(self, *values: float) -> Tensor:
        """These numbers, as float32."""
        return torch.tensor(values, device=self.device)

    def valid(self, *lengths: int, of: int) -> Tensor:
        """A mask of as many first tokens in each row."""
        rows = torch.tensor(lengths, device=self.device)[:, None]
        return torch.arange(of, device=self.device) < rows


Built = tuple[str, dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Denoiser:
    """A model.

    Args:
        name: What it is called, with how much of its depth is run.
        build: Gives the name of diffusers' class, its configuration and a call's arguments.
    """

    name: str
    build: Callable[[Make], Built]


@dataclass
class Models:
    """A stock model and one with our processors, of the same weights."""

    models: dict[str, nn.Module]
    inputs: dict[str, Any]
    dtype: torch.dtype
    swapped: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def call(self, side: str) -> Callable[[], Any]:
        """A forward pass."""
        model, inputs = self.models[side], self.inputs
        return lambda: model(**inputs, return_dict=False)[0]

    def agree(self) -> float:
        """The difference of the outputs.

        Raises:
            Disagreement: It is larger than roundings make it.
        """
        found = difference(self.call("ours")(), self.call("diffusers")())
        if not found <= (most := TOLERANCES[self.dtype]):
            raise Disagreement(f"the outputs differ by {found:.1e}, allowed are {most:.0e}")
        return found


def models(denoiser: Denoiser, device: str, dtype: torch.dtype, tiny: bool) -> Models:
    """Builds both sides on the device."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    torch.manual_seed(0)
    make = Make(device, dtype, tiny, torch.Generator(device).manual_seed(0))
    kind, config, inputs = denoiser.build(make)
    with torch.device(device):
        stock: nn.Module = getattr(diffusers, kind)(**config)
    stock = stock.to(device, dtype).eval()
    shared = {id(t): t for t in (*stock.parameters(), *stock.buffers())}
    ours = copy.deepcopy(stock, shared)
    report = attnproc.swap(ours)
    counts = {"swapped": len(report.replaced), "kept": dict(report.kept)}
    return Models({"ours": ours, "diffusers": stock}, inputs, dtype, counts)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="Pattern of models; several add.")] = None,
    modes: Annotated[
        str, typer.Option(help="Of eager, peak, compiled, graph; by commas.")
    ] = "eager,peak,graph",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    tiny: Annotated[bool, typer.Option(help="Small models, to try the program.")] = False,
    seconds: Annotated[float, typer.Option(help="Time of one measurement.")] = 1.0,
    compile_limit: Annotated[float, typer.Option(help="Seconds that compiling may take.")] = 120,
    limit: Annotated[float, typer.Option(help="Seconds after which no model is begun.")] = 1e9,
    passes: Annotated[int, typer.Option(help="How often all models are measured.")] = 1,
    merge: Annotated[bool, typer.Option(help="Add to the file in place of a new one.")] = False,
    commit: Annotated[str | None, typer.Option(help="What is measured, without git.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Times the models and writes the JSON."""
    asked = chosen_modes(modes, MODES)
    options = Options(device, named("dtype", dtype, DTYPES), 1, asked, seconds, compile_limit)
    path = out or RESULTS / f"denoisers-{device}-{dtype}.json"
    results = opened(path, device, commit, merge, dtype=dtype, tiny=tiny)
    asked_for = chosen(DENOISERS, only)
    measured(asked_for, lambda model: of_model(model, options, tiny), results, limit, passes)


def of_model(denoiser: Denoiser, options: Options, tiny: bool) -> dict[str, Any]:
    """All that is asked about one model."""
    made: list[Models] = []

    def make() -> Models:
        made.append(models(denoiser, options.device, options.dtype, tiny))
        return made[0]

    found = gated(make, [(name, MODES[name]) for name in options.modes], options)
    return found | (made[0].swapped if made else {})


def sdxl(make: Make) -> Built:
    """SDXL's UNet at 1024 pixels, under classifier-free guidance."""
    text, side = make.pick(2048, 32), make.pick(128, 16)
    config = {
        "sample_size": side,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": make.pick((320, 640, 1280), (32, 64, 64)),
        "transformer_layers_per_block": make.pick((1, 2, 10), 1),
        "attention_head_dim": make.pick((5, 10, 20), (1, 2, 2)),
        "cross_attention_dim": text,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    inputs = {
        "sample": make.random(2, 4, side, side),
        "timestep": make.numbers(500.0)[0],
        "encoder_hidden_states": make.random(2, 77, text),
        "added_cond_kwargs": {
            "text_embeds": make.random(2, 1280),
            "time_ids": make.random(2, 6),
        },
    }
    return "UNet2DConditionModel", config, inputs


def sd15(make: Make) -> Built:
    """Stable Diffusion 1.5's UNet at 512 pixels, under classifier-free guidance."""
    text, side = make.pick(768, 32), make.pick(64, 16)
    config = {
        "sample_size": side,
        "cross_attention_dim": text,
        "attention_head_dim": make.pick(8, 2),
        "block_out_channels": make.pick((320, 640, 1280, 1280), (32, 32, 64, 64)),
    }
    inputs = {
        "sample": make.random(2, 4, side, side),
        "timestep": make.numbers(500.0)[0],
        "encoder_hidden_states": make.random(2, 77, text),
    }
    return "UNet2DConditionModel", config, inputs


def sd35(make: Make) -> Built:
    """Stable Diffusion 3.5 large at 1024 pixels, under classifier-free guidance."""
    heads, side, text = make.pick(38, 2), make.pick(128, 16), make.pick(4096, 32)
    config = {
        "sample_size": side,
        "in_channels": 16,
        "num_layers": make.pick(6, 2),
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "caption_projection_dim": heads * 64,
        "pooled_projection_dim": make.pick(2048, 32),
        "pos_embed_max_size": make.pick(192, 16),
        "qk_norm": "rms_norm",
    }
    inputs = {
        "hidden_states": make.random(2, 16, side, side),
        "encoder_hidden_states": make.random(2, make.pick(333, 21), text),
        "pooled_projections": make.random(2, make.pick(2048, 32)),
        "timestep": make.numbers(500.0, 500.0),
    }
    return "SD3Transformer2DModel", config, inputs


def flux(make: Make) -> Built:
    """Flux at 1024 pixels, its guidance distilled."""
    side, text = make.pick(64, 8), make.pick(512, 24)
    config = {
        "num_layers": make.pick(4, 1),
        "num_single_layers": make.pick(8, 1),
        "num_attention_heads": make.pick(24, 2),
        "joint_attention_dim": make.pick(4096, 32),
        "pooled_projection_dim": make.pick(768, 32),
        "guidance_embeds": True,
    }
    ids = torch.zeros(side, side, 3, device=make.device, dtype=make.dtype)
    ids[..., 1] += torch.arange(side, device=make.device)[:, None]
    ids[..., 2] += torch.arange(side, device=make.device)
    inputs = {
        "hidden_states": make.random(1, side * side, 64),
        "encoder_hidden_states": make.random(1, text, make.pick(4096, 32)),
        "pooled_projections": make.random(1, make.pick(768, 32)),
        "timestep": make.numbers(0.5).to(make.dtype),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3, device=make.device, dtype=make.dtype),
        "guidance": make.numbers(3.5),
    }
    return "FluxTransformer2DModel", config, inputs


def sana(make: Make, side: int, layers: int) -> Built:
    """Sana 1600M, under classifier-free guidance."""
    heads, crossing = make.pick((70, 20), (7, 2))
    config = {
        "num_attention_heads": heads,
        "num_cross_attention_heads": crossing,
        "cross_attention_dim": heads * 32,
        "caption_channels": make.pick(2304, 32),
        "num_layers": make.pick(layers, 2),
        "sample_size": make.pick(side, 8),
    }
    side = config["sample_size"]
    inputs = {
        "hidden_states": make.random(2, 32, side, side),
        "encoder_hidden_states": make.random(2, 300, config["caption_channels"]),
        "encoder_attention_mask": make.valid(8, 60, of=300).to(make.dtype),
        "timestep": make.numbers(500.0, 500.0),
    }
    return "SanaTransformer2DModel", config, inputs


def sana_1024(make: Make) -> Built:
    """Sana at 1024 pixels."""
    return sana(make, 32, 20)


def sana_4096(make: Make) -> Built:
    """Sana at 4096 pixels."""
    return sana(make, 128, 8)


def cogvideox(make: Make) -> Built:
    """CogVideoX-5b, 49 frames of 480 x 720 pixels."""
    heads, frames, height, width = make.pick((48, 13, 60, 90), (2, 3, 8, 12))
    config = {
        "num_attention_heads": heads,
        "num_layers": make.pick(4, 2),
        "text_embed_dim": make.pick(4096, 32),
        "sample_width": width,
        "sample_height": height,
        "sample_frames": make.pick(49, 9),
        "use_rotary_positional_embeddings": True,
    }
    tokens = frames * height * width // 4
    angles = make.random(tokens, 64).float()
    inputs = {
        "hidden_states": make.random(1, frames, 16, height, width),
        "encoder_hidden_states": make.random(1, 226, config["text_embed_dim"]),
        "timestep": make.numbers(500.0),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    return "CogVideoXTransformer3DModel", config, inputs


def auraflow(make: Make) -> Built:
    """AuraFlow at 1024 pixels, under classifier-free guidance."""
    heads, side, text = make.pick(12, 1), make.pick(128, 16), make.pick(2048, 32)
    config = {
        "num_mmdit_layers": make.pick(2, 1),
        "num_single_dit_layers": make.pick(8, 1),
        "num_attention_heads": heads,
        "caption_projection_dim": heads * 256,
        "joint_attention_dim": text,
        "pos_embed_max_size": make.pick(9216, 64),
        "sample_size": side,
    }
    inputs = {
        "hidden_states": make.random(2, 4, side, side),
        "encoder_hidden_states": make.random(2, make.pick(256, 24), text),
        "timestep": make.numbers(0.5, 0.5),
    }
    return "AuraFlowTransformer2DModel", config, inputs


def lumina(make: Make) -> Built:
    """Lumina-Next at 1024 pixels, under classifier-free guidance; all of the image is valid."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    heads, side, text = make.pick(32, 4), make.pick(128, 16), make.pick(2048, 32)
    config = {
        "sample_size": side,
        "hidden_size": heads * 72,
        "num_layers": 2,
        "num_attention_heads": heads,
        "num_kv_heads": heads // 4,
        "cross_attention_dim": text,
    }
    inputs = {
        "hidden_states": make.random(2, 4, side, side),
        "timestep": make.numbers(0.5, 0.5),
        "encoder_hidden_states": make.random(2, 128, text),
        "encoder_mask": make.valid(8, 128, of=128),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(72, 384, 384).to(make.device),
        "cross_attention_kwargs": {"base_sequence_length": 4096},
    }
    return "LuminaNextDiT2DModel", config, inputs


def hunyuan(make: Make) -> Built:
    """Hunyuan-DiT 1.2 at 1024 pixels, under classifier-free guidance."""
    heads, side, text = make.pick(16, 2), make.pick(128, 16), make.pick((1024, 2048), (32, 32))
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": 88,
        "hidden_size": heads * 88,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": side,
        "num_layers": make.pick(6, 4),
        "cross_attention_dim": text[0],
        "cross_attention_dim_t5": text[1],
        "use_style_cond_and_image_meta_size": False,
    }
    angles = make.random(side * side // 4, 88).float()
    inputs = {
        "hidden_states": make.random(2, 4, side, side),
        "timestep": make.numbers(500.0, 500.0).to(make.dtype),
        "encoder_hidden_states": make.random(2, 77, text[0]),
        "text_embedding_mask": make.valid(2, 20, of=77).long(),
        "encoder_hidden_states_t5": make.random(2, 256, text[1]),
        "text_embedding_mask_t5": make.valid(2, 20, of=256).long(),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    return "HunyuanDiT2DModel", config, inputs


def mochi(make: Make) -> Built:
    """Mochi, 37 frames of 480 x 848 pixels, under classifier-free guidance."""
    heads, frames, height, width = make.pick((24, 7, 60, 106), (2, 2, 8, 12))
    text = make.pick(4096, 32)
    config = {"num_attention_heads": heads, "num_layers": 2, "text_embed_dim": text}
    config |= make.pick({}, {"pooled_projection_dim": 64})
    inputs = {
        "hidden_states": make.random(2, 12, frames, height, width),
        "encoder_hidden_states": make.random(2, 256, text),
        "timestep": make.numbers(500.0, 500.0),
        "encoder_attention_mask": make.valid(64, 200, of=256),
    }
    return "MochiTransformer3DModel", config, inputs


DENOISERS = [
    Denoiser("sdxl-unet-1024px", sdxl),
    Denoiser("sd15-unet-512px", sd15),
    Denoiser("sd35-large-1024px (6 of 38 layers)", sd35),
    Denoiser("flux-1024px (4+8 of 19+38 layers)", flux),
    Denoiser("sana-1600m-1024px", sana_1024),
    Denoiser("sana-1600m-4096px (8 of 20 layers)", sana_4096),
    Denoiser("cogvideox-5b-49f (4 of 42 layers)", cogvideox),
    Denoiser("auraflow-1024px (2+8 of 4+32 layers)", auraflow),
    Denoiser("lumina-next-1024px (2 of 24 layers)", lumina),
    Denoiser("hunyuandit-1024px (6 of 40 layers)", hunyuan),
    Denoiser("mochi-37f (2 of 48 layers)", mochi),
]


if __name__ == "__main__":
    typer.run(main)
