"""A network on an engine is called as the module that it stands in for, and refuses what the engine does not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qncd.engines.network import EngineNetwork, InputSpec
from qncd.models.network import network_of

SPECS = {
    "sample": InputSpec(torch.float32, (None, 3, 8, 8)),
    "timestep": InputSpec(torch.int64, (None,)),
    "encoder_hidden_states": InputSpec(torch.float32, (None, None, 12)),
}


class Recorder:
    """A session that keeps what it gets and gives the sample back, plus the time steps."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Tensor]] = []

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        self.calls.append(inputs)
        return inputs["sample"] + inputs["timestep"].view(-1, 1, 1, 1)


@pytest.fixture
def unet(make_cross_unet: Any) -> Any:
    return make_cross_unet(in_channels=3, out_channels=3)


def test_every_way_to_call_it(unet: Any) -> None:
    session = Recorder()
    engine, x, context = EngineNetwork(network_of(unet), session, SPECS), torch.randn(2, 3, 8, 8), torch.randn(2, 5, 12)
    calls = [
        engine(x, 3, context), engine(sample=x, timestep=torch.tensor(3), encoder_hidden_states=context),
        engine(x, torch.tensor([3, 3]), encoder_hidden_states=context, class_labels=None, cross_attention_kwargs={}),
        engine(x.double(), torch.tensor(3.0), context, added_cond_kwargs={"image_embeds": None}),
    ]  # fmt: skip
    for out in calls:
        assert torch.equal(out.sample, out[0]) and torch.allclose(out.sample.float(), x + 3)
    assert calls[-1].sample.dtype is torch.float64
    (plain,) = engine(x, 3, context, return_dict=False)
    assert torch.equal(plain, calls[0].sample)
    for given in session.calls:
        assert list(given) == list(SPECS)
        assert given["timestep"].tolist() == [3, 3] and given["timestep"].dtype is torch.int64
        assert given["sample"].dtype is torch.float32 and torch.equal(given["encoder_hidden_states"], context)


def test_what_is_refused(unet: Any) -> None:
    engine, x, context = EngineNetwork(network_of(unet), Recorder(), SPECS), torch.randn(2, 3, 8, 8), torch.randn(2, 5, 12)
    with pytest.raises(ValueError, match="the exported model has no input class_labels"):
        engine(x, 3, context, class_labels=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"the exported model has no input added_cond_kwargs\.time_ids"):
        engine(x, 3, context, added_cond_kwargs={"time_ids": torch.zeros(2, 6)})
    with pytest.raises(ValueError, match=r"the exported model has no input down_block_additional_residuals\.0"):
        engine(x, 3, context, down_block_additional_residuals=[x])
    with pytest.raises(ValueError, match="the exported model needs its input encoder_hidden_states"):
        engine(x, 3)
    with pytest.raises(ValueError, match="called without timestep"):
        engine(x)
    with pytest.raises(
        ValueError, match=r"cross_attention_kwargs is \{'scale': 0\.5\}: the network on the engine is made without it"
    ):
        engine(x, 3, context, cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(ValueError, match="class_labels is 0: the network on the engine is made without it"):
        engine(x, 3, context, class_labels=0)
    with pytest.raises(ValueError, match=r"sample is 2x3x16x16, the exported model takes \?x3x8x8"):
        engine(torch.randn(2, 3, 16, 16), 3, context)
    with pytest.raises(ValueError, match="timestep holds fractions, the exported model takes whole numbers"):
        engine(x, 3.5, context)


def test_what_is_no_tensor_is_as_it_was_exported(unet: Any) -> None:
    """An engine that was made for a setting takes calls with that one alone; tuples are lists."""
    made_for = {"cross_attention_kwargs": {"scale": 0.5, "sizes": [[1, 2]]}}
    engine, x = EngineNetwork(network_of(unet), Recorder(), SPECS, made_for), torch.randn(2, 3, 8, 8)
    context = torch.randn(2, 5, 12)
    out = engine(x, 3, context, cross_attention_kwargs={"scale": 0.5, "sizes": [(1, 2)]})
    torch.testing.assert_close(out.sample, x + 3)
    with pytest.raises(ValueError, match=r"cross_attention_kwargs is not given: the network on the engine is made for \{'scale'"):
        engine(x, 3, context)
    with pytest.raises(ValueError, match=r"is \{'scale': 1\.0\}: the network on the engine is made for \{'scale': 0\.5"):
        engine(x, 3, context, cross_attention_kwargs={"scale": 1.0})
    with pytest.raises(ValueError, match=r"cross_attention_kwargs\.mask: a network on an engine takes tensors, numbers"):
        engine(x, 3, context, cross_attention_kwargs={"scale": 0.5, "mask": object()})


def test_time_steps_one_by_one(unet: Any) -> None:
    session = Recorder()
    engine = EngineNetwork(network_of(unet), session, SPECS, one_step_a_call=True)
    x, context, t = torch.randn(3, 3, 8, 8), torch.randn(3, 5, 12), torch.tensor([7, 3, 7])
    torch.testing.assert_close(engine(x, t, context).sample, x + t.view(-1, 1, 1, 1))
    assert [given["timestep"].tolist() for given in session.calls] == [[3], [7, 7]]
    torch.testing.assert_close(session.calls[1]["encoder_hidden_states"], context[[0, 2]])


def test_it_is_a_network(unet: Any, make_unet: Any) -> None:
    """network_of binds and predicts with the original's names, and holds none of its weights."""
    session = Recorder()
    network = network_of(EngineNetwork(network_of(unet, "v_prediction"), session, SPECS))
    x, context = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 12)
    torch.testing.assert_close(network.predict(x, torch.tensor([1, 2]), {"encoder_hidden_states": context})[1], x[1] + 2)
    call = network.bind((x, 3), {"encoder_hidden_states": context})
    torch.testing.assert_close(network.predict(call.x, call.t, call.inputs), x + 3)
    assert network.prediction == "v_prediction" and network.condition == "encoder_hidden_states" and not network.layers()
    assert network.config is unet.config and (network.device, network.dtype) == (unet.device, unet.dtype)
    assert not list(network.module.parameters()) and not network.module.state_dict()
    labelled = network_of(make_unet(num_class_embeds=3))
    assert network_of(EngineNetwork(labelled, session)).condition == "class_labels"


def test_it_follows_to_and_takes_anything_without_specs(unet: Any) -> None:
    session = Recorder()
    engine = EngineNetwork(network_of(unet), session).to(torch.float16)
    x = torch.randn(2, 3, 8, 8).half()
    assert engine.dtype is torch.float16 and engine(x, 0, encoder_hidden_states=x).sample.dtype is torch.float16
    engine(
        x, 0, class_labels=torch.tensor([1, 2], dtype=torch.int32), added_cond_kwargs={"mask": torch.ones(2, dtype=torch.bool)}
    )
    given = session.calls[-1]
    assert [value.dtype for value in given.values()] == [torch.float32, torch.int64, torch.int64, torch.bool]
    assert list(given)[2:] == ["class_labels", "added_cond_kwargs.mask"]
