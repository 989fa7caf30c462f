"""Tell vLLM the sizes of a compressed model, and refuse at once what it cannot serve."""

from __future__ import annotations

from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from vdcompress import serving
from vdcompress.modeling.layout import LayerLayout


class LatentShapes(ModelArchConfigConvertorBase):  # type: ignore[misc]
    """Reads the layout of a config: where layers differ, its plain fields are empty."""

    def layouts(self) -> list[LayerLayout]:
        """Return the layout of every layer.

        Raises:
            ValueError: no attention backend of vLLM takes them; the message says why.
        """
        config = self.hf_text_config
        layouts = [config.layer_layout(layer) for layer in range(config.num_hidden_layers)]
        if reasons := serving.vllm_problems(layouts):
            raise ValueError(f"vLLM cannot serve this model: {'; '.join(reasons)}")
        return layouts

    def get_total_num_kv_heads(self) -> int:
        """Return the latents of the layer that keeps most."""
        return max(layout.k_groups for layout in self.layouts())

    def get_head_size(self) -> int:
        """Return the width of the widest K latent."""
        return max(layout.k_head_dim for layout in self.layouts())


def register(model_types: list[str]) -> None:
    """Have vLLM read configs of these types so."""
    MODEL_ARCH_CONFIG_CONVERTORS.update(dict.fromkeys(model_types, LatentShapes))
