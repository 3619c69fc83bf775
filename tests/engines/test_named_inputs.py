"""Any number of inputs by name, inside dictionaries too, through the exported model; whole outputs; time steps as floats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qncd.engines.engine import export, open_engine
from qncd.engines.onnx.model import input_specs, read_onnx
from qncd.engines.onnx.tracing import dynamic_axes
from qncd.models.network import Network, network_of


class Tokens(nn.Module):
    """A denoiser of tokens (N, L, 8) that also predicts a variance: of a context, of sizes, and of what each token is."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"sample_size": 4}
        self.inner, self.context, self.sizes, self.out = nn.Linear(8, 16), nn.Linear(12, 16), nn.Linear(6, 16), nn.Linear(16, 16)
        self.kinds = nn.Embedding(5, 16)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        kinds: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        residuals: Sequence[Tensor] = (),
        return_dict: bool = True,
    ) -> Any:
        assert added_cond_kwargs is not None and kinds is not None
        scores = self.inner(hidden_states) @ self.context(encoder_hidden_states).transpose(1, 2)  # (N, L, M)
        x = scores.softmax(-1) @ self.context(encoder_hidden_states) + self.sizes(added_cond_kwargs["sizes"])[:, None]
        x = x * timestep.view(-1, 1, 1) + self.kinds(kinds) + residuals[0] - residuals[1]
        return SimpleNamespace(sample=self.out(x)) if return_dict else (self.out(x),)


class TokenFamily(Network):
    channel_dim = -1

    def example(self, batch: int, shape: Sequence[int] | None = None) -> dict[str, Tensor]:
        return {
            "hidden_states": torch.zeros(batch, *(shape or (4, 8))),
            "timestep": torch.zeros(batch),
            "encoder_hidden_states": torch.zeros(batch, 7, 12),
            "kinds": torch.zeros(batch, 4, dtype=torch.int64),
            "added_cond_kwargs.sizes": torch.zeros(batch, 6),
            "residuals.0": torch.zeros(batch, 4, 16),
            "residuals.1": torch.zeros(batch, 4, 16),
        }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Path]:
    torch.manual_seed(0)
    network = TokenFamily(Tokens().eval().requires_grad_(False), "flow")
    folder = tmp_path_factory.mktemp("tokens")
    export(network, folder, None)
    return network, folder


def arguments(batch: int, tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": draw(batch, 4, 8), "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": draw(batch, tokens, 12), "kinds": torch.randint(0, 5, (batch, 4), generator=generator),
        "added_cond_kwargs": {"sizes": draw(batch, 6)}, "residuals": [draw(batch, 4, 16), draw(batch, 4, 16)],
    }  # fmt: skip


def test_names_types_and_axes(exported: tuple[Network, Path]) -> None:
    network, folder = exported
    specs = input_specs(read_onnx(folder)[0])
    example = network.example(1)
    assert list(specs) == list(example) and {name: spec.dtype for name, spec in specs.items()} == {
        name: value.dtype for name, value in example.items()
    }
    assert specs["encoder_hidden_states"].shape == (None, None, 12) and str(specs["residuals.1"]) == "?x4x16"
    assert dynamic_axes(network)["encoder_hidden_states"] == {0: "batch", 1: "tokens"}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_same_on_engines(exported: tuple[Network, Path], backend: str) -> None:
    network, folder = exported
    engine = open_engine(network, folder, backend, threads=1)
    for batch, tokens in ((1, 3), (3, 9)):
        given = arguments(batch, tokens)
        expected = network.module(**given).sample
        torch.testing.assert_close(engine(**given).sample, expected, rtol=1e-4, atol=1e-5)
        (plain,) = engine(given.pop("hidden_states"), given.pop("encoder_hidden_states"), return_dict=False, **given)
        torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)
    other = network_of(engine)
    call = other.bind((), arguments(2, 3))
    assert other.prediction == "flow"
    torch.testing.assert_close(other.predict(call.x, call.t, call.inputs), network.predict(call.x, call.t, call.inputs))
    with pytest.raises(ValueError, match=r"the exported model needs its input residuals\.1"):
        engine(**{**arguments(1, 3), "residuals": [torch.zeros(1, 4, 16)]})
