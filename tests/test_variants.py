"""The pinned combinations: what is added to the unions leaves the others as they are."""

from dataclasses import replace

import torch
import variants
from variants import AXES, EXIT_RULES, cover, name_of

from openmythos import OpenMythos


def test_a_new_member_adds_combinations_and_changes_none() -> None:
    new = replace(AXES["injection"][0], init_decay=0.123)
    wider = AXES | {"injection": [new, *AXES["injection"]]}
    rows, before = cover("variants", wider), cover("variants", AXES)
    assert rows[: len(before)] == before
    assert all(row["injection"] == new for row in rows[len(before) :])
    met = {name_of(row["attention"]) for row in rows[len(before) :]}
    assert met == {name_of(value) for value in AXES["attention"]}


def test_a_new_axis_changes_no_combination() -> None:
    rows = cover("variants", AXES | {"rule": EXIT_RULES})
    assert all(row["rule"] == EXIT_RULES[0] for row in rows[: len(cover("variants", AXES))])
    assert {name_of(row["rule"]) for row in rows} == {name_of(rule) for rule in EXIT_RULES}


def test_every_combination_is_pinned() -> None:
    for name, rows in variants.COVERS.items():
        added = len(rows) - len(variants.PINNED[name]["rows"])
        assert not added, f"{name}: {added} new, whose ids may change: run python tests/variants.py"


def test_on_a_device_the_tests_tensors_are_there_and_the_packages_are_not() -> None:
    with variants.OnDevice(torch.device("meta")):
        assert torch.zeros(2).is_meta and variants.here().type == "meta"
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        assert variants.random_tokens(1).is_meta
        model = OpenMythos(variants.tiny_config(), seed=0)
        assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.zeros(2).device.type == variants.here().type == "cpu"
