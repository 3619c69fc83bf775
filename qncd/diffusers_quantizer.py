"""What diffusers calls where a folder's network is quantized: `from_pretrained`, `save_pretrained`, PipelineQuantizationConfig.

This is imported while diffusers is: beside the two base classes, everything is imported where it is used.
"""

from __future__ import annotations

import importlib
import weakref
from enum import Enum
from pathlib import Path
from typing import Any

from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from qncd.registration import METHOD

_SAVING = "qncd.saving"  # which imports this module, to hand networks to it


class _Method(str, Enum):
    QNCD = METHOD


class QNCDConfig(QuantizationConfigMixin):
    """How a network is quantized: in a folder's config.json, or asked for in `from_pretrained`.

    Args:
        weight_bits: 2 to 8. Asked for in `from_pretrained`, weights alone are quantized, to the nearest code: activations need
            calibration, which is what `qncd.quantize` does.
        recipe: of a network that is quantized already, as JSON; everything else is in the header of its weights.

    Raises:
        ValueError: another number of bits, or another setting.
    """

    def __init__(self, weight_bits: int = 8, recipe: dict[str, Any] | None = None, **others: Any) -> None:
        others.pop("quant_method", None)
        if others:
            raise ValueError(
                f"QNCDConfig: {', '.join(sorted(others))}: allowed is weight_bits; what needs calibration is for qncd.quantize"
            )
        if recipe is None and (type(weight_bits) is not int or not 2 <= weight_bits <= 8):
            raise ValueError(f"QNCDConfig: weight_bits {weight_bits!r}: allowed are 2 to 8")
        self.quant_method: Any = _Method.QNCD  # not among diffusers' own
        self.weight_bits, self.recipe = weight_bits, recipe

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"quant_method": METHOD, "weight_bits": self.weight_bits, "recipe": self.recipe}

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
        if len(checkpoint_files) != 1:
            raise ValueError(f"{len(checkpoint_files)} files of weights: a network that qncd quantized has one")
        self.file = Path(checkpoint_files[0])
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
            saving.quantize_weights(model, self.config.weight_bits)
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
