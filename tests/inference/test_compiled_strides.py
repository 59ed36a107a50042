"""Compiled code reads its inputs as contiguous: whatever strides they have, it gets them so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import random_tokens, tiny_config, tiny_model

from openmythos.inference import graphs
from openmythos.inference.compiled import CompiledModel
from openmythos.inference.decode import Places
from openmythos.inference.generation import Request, stream

PADDED = torch.tensor([[False, False, True], [True, True, True], [True, True, True]])


def as_read(tensors: list[Tensor]) -> list[Tensor]:
    """In the place of compiled code: what it reads, since it knows no strides."""
    return [x.as_strided(x.shape, torch.empty(x.shape).stride()) for x in tensors]


def test_strided_inputs_are_read_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(graphs.Compiled, "_first_call", first_call)
    run, wide = graphs.Compiled(tmp_path), torch.arange(12).view(3, 4)
    places = Places(wide[:, :1], wide[:, 1], wide[:, 2], wide[0], None)
    inputs: dict[str, Any] = {"places": places, "kv": [torch.zeros(3, 4, 2)]}
    run(region, None, **inputs)
    found = run(region, None, **inputs)
    assert [x.tolist() for x in found] == [x.tolist() for x in (*places[:4], inputs["kv"][0])]
    assert found[-1].data_ptr() == inputs["kv"][0].data_ptr()  # it is written to
    strided = inputs | {"kv": [torch.zeros(3, 2, 4).mT]}
    assert run(region, None, **strided) == "eager"


def region(_model: Any, **_inputs: Any) -> str:
    return "eager"


def first_call(run: Any, key: Any, *_: Any) -> None:
    run._graphs[key] = as_read


@pytest.mark.slow
@pytest.mark.compile
def test_rows_of_different_padding_are_decoded_alike(tmp_path: Path) -> None:
    model, prompt = tiny_model(tiny_config()), random_tokens(3, 3)
    request = Request(num_loops=2, max_new_tokens=6)
    found, wanted = (
        torch.stack([step.tokens for step in stream(each, prompt, request, PADDED)])
        for each in (CompiledModel(model, tmp_path), model)
    )
    assert torch.equal(found, wanted)
