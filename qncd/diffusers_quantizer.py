"""What diffusers calls where a folder's network is quantized: `from_pretrained`, `save_pretrained`, PipelineQuantizationConfig.

This is imported while diffusers is: beside the two base classes, everything that takes long is imported where it is used.
"""

from __future__ import annotations

import importlib
import re
import weakref
from enum import Enum
from pathlib import Path
from typing import Any

from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from qncd.granularity import CHANNEL, TENSOR
from qncd.recipe import QuantConfig
from qncd.registration import METHOD
from qncd.widths import INTEGER

_SAVING = "qncd.saving"  # which imports this module, to hand networks to it
_SETTINGS = ("weight_bits", "act_bits", "weight_granularity", "act_granularity", "weight_format", "act_format")


_PART = re.compile(r"(?P<stem>[^.]+?)(?P<variant>\.\w+)?-\d+-of-\d+\.safetensors")  # of weights in several files


class _Method(str, Enum):
    QNCD = METHOD


class QNCDConfig(QuantizationConfigMixin):
    """How a network is quantized: in a folder's config.json, or asked for in `from_pretrained`.

    Asked for in `from_pretrained`, weights are rounded to the nearest codes, and activations are quantized where that needs no
    calibration, with scales found at run time; everything else is for `qncd.quantize`.

    Args:
        weight_bits: 2 to 8.
        act_bits: 2 to 8, with an `act_granularity`; None leaves activations in floating point.
        weight_granularity, act_granularity, weight_format, act_format: as in `qncd.recipe.QuantConfig`.
        recipe: of a network that is quantized already, as JSON; everything else is in the header of its weights.

    Raises:
        ValueError: a value that is not allowed, or another setting.
    """

    def __init__(
        self,
        weight_bits: int = 8,
        recipe: dict[str, Any] | None = None,
        act_bits: int | None = None,
        weight_granularity: str = CHANNEL,
        act_granularity: str = TENSOR,
        weight_format: str = INTEGER,
        act_format: str = INTEGER,
        **others: Any,
    ) -> None:
        others.pop("quant_method", None)
        self.quant_method: Any = _Method.QNCD  # not among diffusers' own
        self.weight_bits, self.act_bits, self.recipe = weight_bits, act_bits, recipe
        self.weight_granularity, self.act_granularity = weight_granularity, act_granularity
        self.weight_format, self.act_format = weight_format, act_format
        if others:
            told = f"allowed are {', '.join(_SETTINGS)}; what needs calibration is for qncd.quantize"
            raise ValueError(f"QNCDConfig: {', '.join(sorted(others))}: {told}")
        if recipe is not None:
            return
        if act_bits is not None and act_granularity == TENSOR:
            raise ValueError("QNCDConfig: act_bits needs an act_granularity such as token: ranges of tensors need qncd.quantize")
        try:
            self.quant = QuantConfig(bias_correction=False, **{name: getattr(self, name) for name in _SETTINGS})
        except ValueError as error:
            raise ValueError(f"QNCDConfig: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"quant_method": METHOD, **{name: getattr(self, name) for name in (*_SETTINGS, "recipe")}}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: there are few settings."""
        return self.to_dict()


class QNCDQuantizer(DiffusersQuantizer):
    """Reads a network that `qncd.save` wrote, and writes it.

    Args:
        quantization_config: its QNCDConfig.
    """

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: QNCDConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config
        self.file: Path | None = None
        self._module: weakref.ref[Any] | None = None

    @property
    def supports_parallel_loading(self) -> bool:
        return False

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember the file: its tensors are not those of the network in floating point."""
        if not self.pre_quantized:
            return loaded_keys
        self.file = Path(checkpoint_files[0])
        if match := _PART.fullmatch(self.file.name):
            self.file = self.file.with_name(f"{match['stem']}.safetensors.index{match['variant'] or ''}.json")
        return []

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """None: what is missing comes after the loading."""
        return [] if self.pre_quantized else missing_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        return None

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        saving = importlib.import_module(_SAVING)
        if self.file is not None:
            saving.read_quantized(model, self.file)
        else:
            saving.quantize_at_once(model, self.config.quant)
        self._module = weakref.ref(model)
        return model

    @classmethod
    def attach(cls, model: Any, recipe: dict[str, Any]) -> None:
        """Let `save_pretrained` of a quantized network write it quantized."""
        quantizer = cls(QNCDConfig(recipe=recipe))
        quantizer._module = weakref.ref(model)
        model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, _Method.QNCD
        config = model.config
        # load_ip_adapter changes the attribute of a setting, not the setting, and the network looks at the attribute.
        changed = {name: value for name, value in vars(config).items() if name in config and config[name] is not value}
        model.register_to_config(quantization_config=quantizer.quantization_config.to_dict())
        vars(model.config).update(changed)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Codes, ranges and what else a quantized checkpoint holds."""
        if not safe_serialization:
            raise ValueError("a network that qncd quantized is saved as safetensors: safe_serialization=True")
        tensors, header = importlib.import_module(_SAVING).written(self._module() if self._module else None)
        return tensors, header

    def _dequantize(self, model: Any) -> Any:
        raise ValueError("a network that qncd quantized has no weights in floating point: load the full-precision model")
