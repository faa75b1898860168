"""Every family of the table is right when its model is run, and the docs name just those."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from units_families import FAMILIES, randomise
from units_more_families import KNOWN

from fedveil import ConfigurationError, FedQSN
from fedveil.units import find_units, tried_units
from fedveil.units.table import RULES
from toys import SECRET, play

DOCS = Path(__file__).parents[2] / "docs" / "units.md"


@pytest.mark.parametrize("name", KNOWN)
def test_units_of_a_family_are_units(name: str) -> None:
    kinds, build = KNOWN[name]
    model = build()
    groups = tried_units(model)
    assert {group.kind for group in groups} == set(kinds.split(" and "))
    mlp = tried_units(model, "mlp")
    assert mlp == tuple(group for group in groups if group.kind != "heads")
    assert {group.kind for group in tried_units(model, "columns")} == {"columns"}
    assert find_units(randomise(build())) == groups


@pytest.mark.parametrize("name", ["phi3", "deberta", "modernbert", "mixtral", "swin", "gpt_neox"])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_garbage_in_withheld_units_is_not_heard(name: str, kind: str) -> None:
    """The same as the trial asks for, done here by hand."""
    model = randomise(KNOWN[name][1]())
    vision = name == "swin"
    draw = torch.Generator().manual_seed(5)
    given = {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)} if vision else {
        "input_ids": torch.randint(3, 40, (2, 9), generator=draw)
    }  # fmt: skip
    state, garbage = model.state_dict(), torch.Generator().manual_seed(1)
    answers = []
    for filled in (False, True):
        for group in (group for group in find_units(model) if group.kind == kind):
            gone = torch.arange(0, group.size, 2)
            for cut in group.slices:
                shape = list(state[cut.tensor].shape)
                shape[cut.axis] = len(gone) * cut.width
                values = torch.zeros(shape)
                if filled and not cut.scaled:
                    values.normal_(generator=garbage)
                state[cut.tensor].index_copy_(cut.axis, cut.indices(gone), values)
        with torch.no_grad():
            answers.append(model(**given)[0])
    assert torch.equal(*answers)


def test_every_family_of_the_table_is_tried() -> None:
    tried = set()
    for build in [*(family.build for family in FAMILIES.values()), *(b for _, b in KNOWN.values())]:
        configs = (getattr(module, "config", None) for module in build().modules())
        tried |= {getattr(config, "model_type", "") for config in configs}
    assert {kind for rule in RULES for kind in rule.model_types} <= tried


def test_the_docs_name_every_family_of_the_table_and_no_other() -> None:
    text = DOCS.read_text(encoding="utf-8")
    known = text.partition("<!-- known families -->")[2].partition("<!-- end -->")[0]
    assert sorted(re.findall(r"`([^`]+)`", known)) == sorted(
        kind for rule in RULES for kind in rule.model_types
    )


# Without masks no rule is needed ----------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.cell, self.head = nn.LayerNorm(5), nn.GRU(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(x) if x.sum() > 0 else x
        return self.head(self.cell(x)[0])


SIZES = {"d_model": 16, "hidden_size": 16, "n_layer": 1, "num_hidden_layers": 1, "vocab_size": 40}
UNKNOWN = {
    "falcon": lambda: transformers.FalconModel(
        transformers.FalconConfig(**SIZES, num_attention_heads=4)
    ),
    "xlnet": lambda: transformers.XLNetModel(
        transformers.XLNetConfig(**SIZES, n_head=4, d_inner=24)
    ),
    "fnet": lambda: transformers.FNetModel(transformers.FNetConfig(**SIZES, intermediate_size=24)),
    "branching": Branching,
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("scheme", [FedQSN.once(server_mask=0.0), FedQSN(0.0, 0.0)])
def test_a_model_of_an_unknown_family_is_released_where_nothing_is_withheld(name, scheme) -> None:
    model = UNKNOWN[name]()
    server = play(scheme, model, clients=2)
    assert server.groups == ()
    changed = server.final()
    assert all(not torch.equal(changed[n], p) for n, p in model.named_parameters() if p.numel() > 1)


def test_a_known_family_is_cut_as_ever_where_nothing_is_withheld() -> None:
    model = randomise(FAMILIES["bert"].build())
    server = FedQSN.once(server_mask=0.0).server(model, SECRET)
    assert server.groups == find_units(model, "mlp")


def test_a_choice_that_is_none_is_refused_all_the_same() -> None:
    with pytest.raises(ConfigurationError, match="choice of units"):
        FedQSN(0.0, 0.0, units="rows").server(Branching(), SECRET)


def test_where_nothing_is_withheld_a_model_is_not_run(monkeypatch) -> None:
    model = UNKNOWN["fnet"]()
    model.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    FedQSN.once(server_mask=0.0).server(model, SECRET)
