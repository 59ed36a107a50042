"""A process that goes on with no rows, for others that have some, computes what it would alone."""

import pytest
import torch
from variants import (
    FEW_VARIANT_IDS,
    FEW_VARIANTS,
    assert_gradients_close,
    gradients,
    random_tokens,
    tiny,
    tiny_config,
    tiny_model,
)

from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.halting import ACT


def trained(model: OpenMythos, backprop_loops: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens, loops = random_tokens(2), torch.tensor([1, 3])
    torch.manual_seed(0)
    losses = model.train().losses(tokens, tokens, num_loops=loops, backprop_loops=backprop_loops)
    total = losses.cross_entropy + sum(stats.balance for stats in losses.router.values())
    model.zero_grad()
    total.backward()
    return total.detach(), gradients(model)


CASES = [(config, number % 2) for number, config in enumerate(FEW_VARIANTS[::2])]


@pytest.mark.parametrize(("config", "backprop_loops"), CASES, ids=FEW_VARIANT_IDS[::2])
def test_loops_without_rows_change_nothing(config: MythosConfig, backprop_loops: int) -> None:
    model = tiny_model(config)
    wanted, wanted_gradients = trained(model, backprop_loops)
    model.recurrent.sync_num_loops = lambda loops: max(loops, 5)
    found, found_gradients = trained(model, backprop_loops)
    torch.testing.assert_close(found, wanted)
    assert_gradients_close(
        {name: found_gradients[name] for name in wanted_gradients}, wanted_gradients
    )


def test_positions_stop_when_the_others_have() -> None:
    model = tiny_model(tiny_config(halting=tiny(ACT)))
    tokens, said = random_tokens(2), []
    wanted = model(tokens, num_loops=12)

    def others(number: int) -> int:
        said.append(number)
        return max(number, int(len(said) < 10))

    model.recurrent.sync_num_loops = others
    found = model(tokens, num_loops=12)
    assert said[-1] == 0 and len(said) == 10
    torch.testing.assert_close(found.logits, wanted.logits)
