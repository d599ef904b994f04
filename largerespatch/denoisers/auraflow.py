"""AuraFlow's transformer: text first, two streams, then one."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from ..core.checks import warn
from ..core.families import factor_of, register
from ..techniques.joint.tokens import BOTH, IMAGE, TEXT, Tokens
from .any import Call
from .joint import JointAttention

# What the `Tokens` here must know the inside of: of which tokens arguments and results have rows, and their order in
# attention; of the model, that it passes tokens on from block to block; and what becomes of places that the table of
# positions does not have.
LEANS_ON = (
    "diffusers.models.transformers.auraflow_transformer_2d.AuraFlowJointTransformerBlock.forward",
    "diffusers.models.transformers.auraflow_transformer_2d.AuraFlowSingleTransformerBlock.forward",
    "diffusers.models.transformers.auraflow_transformer_2d.AuraFlowTransformer2DModel.forward",
    "diffusers.models.transformers.auraflow_transformer_2d.AuraFlowPatchEmbed.pe_selection_index_based_on_dim",
    "diffusers.models.attention_processor.AuraFlowAttnProcessor2_0.__call__",
    "diffusers.models.attention_processor.FusedAuraFlowAttnProcessor2_0.__call__",
)

TWO = Tokens(takes={"hidden_states": IMAGE, "encoder_hidden_states": TEXT}, gives=(TEXT, IMAGE), text_first=True)
ONE = Tokens(takes={"hidden_states": BOTH}, gives=BOTH, text_first=True)


@register
class AuraFlow(JointAttention):
    """`AuraFlowTransformer2DModel`. The image's positions are cut from the middle of a square table."""

    class_name = "AuraFlowTransformer2DModel"
    ends = ("norm_out", "proj_out")

    def kinds(self, model: Any) -> Mapping[str, Tokens]:
        return {"joint_transformer_blocks": TWO, "single_transformer_blocks": ONE}

    def scheduled(self, timestep: float) -> float:
        return 1000 * timestep

    def longest(self, model: Any) -> tuple[int, bool] | None:
        return isqrt(model.config.pos_embed_max_size) * model.config.patch_size, True

    def check(self, model: Any, pipe: Any, height: int, width: int) -> None:
        try:
            super().check(model, pipe, height, width)
        except ValueError as error:
            if self._last_place(model, pipe, height, width) >= model.config.pos_embed_max_size:
                raise
            warn(str(error))

    def _last_place(self, model: Any, pipe: Any, height: int, width: int) -> int:
        """In the table, row by row: columns that it does not have are places of the rows above and below."""
        side, cell = isqrt(model.config.pos_embed_max_size), model.config.patch_size * factor_of(pipe)
        row, column = (side // 2 - length // cell // 2 + length // cell - 1 for length in (height, width))
        return int(row * side + column)

    def told(self, call: Call) -> dict[str, Any]:
        text = call.new(call.batch, call.prompt_tokens(), call.model.config.joint_attention_dim)
        return {"encoder_hidden_states": text, "timestep": call.new(call.batch)}
