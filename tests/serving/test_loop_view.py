"""/v1/loops against a forward pass for every number of loops."""

from collections.abc import Callable

import pytest
import torch
from serving.conftest import client_of, wait_until
from starlette.testclient import TestClient

from openmythos.data.tokenizer import ByteTokenizer
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.exit_rules import StateChangeExit
from openmythos.serve.answers import Loops
from openmythos.serve.limits import ServerLimits
from openmythos.serve.service import Service

BYTES = ByteTokenizer()


def test_every_row_is_a_pass_of_so_many_loops(client: TestClient, model: OpenMythos) -> None:
    answer = client.post("/v1/loops", json={"prompt": "abc", "num_loops": 4, "top": 3})
    found = Loops.model_validate(answer.json())
    ids = torch.tensor([BYTES.prompt_ids("abc")])
    p = {n: model(ids, num_loops=n).logits[0].detach().double().softmax(-1) for n in range(1, 5)}
    with torch.no_grad():
        states = model(ids, num_loops=4, collect_loops="all").recurrence.states
    assert [position.id for position in found.positions] == ids[0].tolist()
    for place, position in enumerate(found.positions):
        assert position.loops_used == 4 and [row.loop for row in position.loops] == [1, 2, 3, 4]
        for row in position.loops:
            mine = p[row.loop][place]
            assert [top.id for top in row.top] == mine.topk(3).indices.tolist()
            assert [top.prob for top in row.top] == pytest.approx(mine.topk(3).values.tolist())
            assert row.entropy == pytest.approx(float(torch.special.entr(mine).sum()), abs=1e-4)
            assert row.kl_last == pytest.approx(_kl(p[4][place], mine), abs=1e-4)
            if row.loop == 1:
                assert row.kl is None and row.change is None
                continue
            assert row.kl == pytest.approx(_kl(mine, p[row.loop - 1][place]), abs=1e-4)
            after, before = (states[n][0, place] for n in (row.loop, row.loop - 1))
            assert row.change == pytest.approx(float((after - before).norm() / after.norm()), 1e-4)


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p * (p.log() - q.log())).sum())


def test_a_position_has_the_loops_that_its_rule_let_it_run(
    client: TestClient, model: OpenMythos
) -> None:
    rule = {"kind": "state_change", "threshold": 0.12}
    body = {"prompt": "abcdef", "num_loops": 8, "exit_rule": rule}
    found = Loops.model_validate(client.post("/v1/loops", json=body).json())
    ids = torch.tensor([BYTES.prompt_ids("abcdef")])
    out = model(ids, num_loops=8, exit_rule=StateChangeExit(threshold=0.12))
    used = out.recurrence.loops_used[0].tolist()
    assert [position.loops_used for position in found.positions] == used
    assert len(set(used)) > 1 or used[0] < 8
    for place, position in enumerate(found.positions):
        assert len(position.loops) == used[place]
        assert position.loops[-1].top[0].id == int(out.logits[0, place].argmax())
    last = client.post("/v1/loops", json={**body, "last_only": True}).json()["positions"]
    (position,) = Loops.model_validate({**found.model_dump(), "positions": last}).positions
    assert (position.position, position.loops_used) == (len(used) - 1, used[-1])
    for row, again in zip(position.loops, found.positions[-1].loops, strict=True):
        assert [top.id for top in row.top] == [top.id for top in again.top]
        assert row.kl_last == pytest.approx(again.kl_last, abs=1e-5)


def test_the_last_row_is_what_is_generated(client: TestClient) -> None:
    body = {"prompt": "xyz", "num_loops": 6}
    (position,) = client.post("/v1/loops", json={**body, "last_only": True}).json()["positions"]
    asked = {**body, "max_tokens": 1, "temperature": 0, "return_loops": True}
    choice = client.post("/v1/completions", json=asked).json()["choices"][0]
    assert choice["token_ids"] == [position["loops"][-1]["top"][0]["id"]]


def test_a_table_that_would_be_too_large_is_refused(
    make_service: Callable[..., Service],
) -> None:
    limits = ServerLimits(max_loop_rows=12, max_loop_values=4000)
    with client_of(make_service(limits)) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        for prompt, loops, last_only, status in (
            ("abc", 3, False, 200),  # 4 tokens with the first; 3 * 4 * (257 + 32) values
            ("abc", 4, False, 400),  # 16 rows
            ("abc", 8, True, 200),
            ("x" * 15, 12, True, 400),  # 12 * (257 + 16 * 32) values
        ):
            body = {"prompt": prompt, "num_loops": loops, "last_only": last_only}
            assert client.post("/v1/loops", json=body).status_code == status, body
