"""Number formats: `fp16` and its loss scaling, `bf16`, `torch_autocast`, and `data_types`."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator

from deepspeedlite.config.base import Dtype, Flag, Int, Number, Section, Text, _dtype, key

HalfDtype = Annotated[Literal["fp16", "bf16"], BeforeValidator(_dtype)]


def name_pattern(text: str) -> re.Pattern[str]:
    """A regular expression to search names for; a bare * stands for anything, as in file names."""
    return re.compile(re.sub(r"(?<!\.)\*", ".*", text))


class Fp16(Section, beside="fp16"):
    """fp16 weights and gradients, fp32 masters, and a loss scale that keeps small gradients from vanishing."""

    SWITCH = "enabled"

    enabled: Flag = key(False, "Train in fp16 with fp32 master weights.")
    auto_cast: Flag = key(False, "Convert floating-point inputs of the model to fp16.")
    loss_scale: Number = key(0.0, "A fixed factor on the loss; 0 lets it adapt (dynamic loss scaling).", ge=0)
    initial_scale_power: Int = key(16, "The dynamic scale starts at 2 to this power.", ge=0, le=127)
    loss_scale_window: Int = key(1000, "Steps without overflow before the one that doubles the dynamic scale.", ge=1)
    hysteresis: Int = key(2, "Overflows that are tolerated before the dynamic scale is halved.", ge=1)
    consecutive_hysteresis: Flag = key(False, "Any step without overflow restores the tolerance in full.")
    min_loss_scale: Int = key(1, "The dynamic scale never goes below this; overflowing there is an error.", ge=1)


class Bf16(Section, beside="bf16"):
    """bf16 weights and gradients with fp32 masters; the range of fp32, so no loss scale."""

    SWITCH = "enabled"

    enabled: Flag = key(False, "Train in bf16 with fp32 master weights.")
    auto_cast: Flag = key(False, "Convert floating-point inputs of the model to bf16.")
    check_grad_overflow: Flag = key(True, "Skip a step whose gradients hold an infinity or NaN.")
    bf16_master_weights_and_grads: Flag = key(
        False, "No fp32 masters: the optimizer updates the bf16 weights; needs bf16_optimizer_states."
    )
    bf16_optimizer_states: Flag = key(
        False, "Keep the optimizer's moments in bf16; needs bf16_master_weights_and_grads."
    )


class TorchAutocast(Section, beside="torch_autocast"):
    """fp32 weights; `torch.autocast` chooses a lower precision operation by operation."""

    SWITCH = "enabled"

    enabled: Flag = key(False, "Run the forward pass under torch.autocast.")
    dtype: HalfDtype = key("bf16", "The lower precision.")


class DataTypes(Section):
    """Types of gradients' sums and of what the module holds."""

    grad_accum_dtype: Dtype | None = key(None, "Type in which gradients accumulate; null: the model's own.")
    param_dtype: Dtype | None = key(
        None, "Type of the parameters, which the fp16 and bf16 sections choose and which must be theirs."
    )
    buffer_dtype: Dtype | None = key(
        None, "Type to convert floating-point buffers to; null: they keep theirs, whatever the parameters' type."
    )
    keep_in_fp32_modules: Literal["auto"] | list[Text] = key(
        "auto",
        "Patterns, found anywhere in a buffer's full name, of buffers that are fp32 whatever buffer_dtype says; auto: "
        "those in the model's _keep_in_fp32_modules_strict and, for fp16, _keep_in_fp32_modules.",
    )
