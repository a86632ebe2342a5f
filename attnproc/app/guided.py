"""Perturbed-attention guidance for the demo model, by diffusers' pipeline on our processors."""

# The libraries used here are typed in part only.
# pyright: reportPrivateImportUsage=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionPAGPipeline

from attnproc.on import on

__all__ = ["LAYERS", "Guided"]

LAYERS = "*"


class Guided(StableDiffusionPAGPipeline):
    """Puts perturbation on the processors that there are, where diffusers replaces them.

    So whatever else is on them stays. The pipeline takes it off again after its call.
    """

    @classmethod
    def of(cls, pipeline: Any) -> Any:
        """One of the same parts as another pipeline."""
        made: Any = cls(
            **pipeline.components, requires_safety_checker=False, pag_applied_layers=LAYERS
        )
        made.set_progress_bar_config(disable=True)
        return made

    def _set_pag_attn_processor(
        self, pag_applied_layers: list[str], do_classifier_free_guidance: bool
    ) -> None:
        for layers in pag_applied_layers:
            on(self.unet, layers, kind="self").with_pag(3 if do_classifier_free_guidance else 2)
