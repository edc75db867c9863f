"""States of samplers that earlier versions saved: taken up, or refused by name."""

import copy

import pytest
import torch
from helpers import in_format_1, in_format_2
from saved_models import CASES, D, checkpoint, make, restore, train

from slide_torch import load_sampler_state, sampler_state


def test_a_state_without_copies_of_rows_is_completed():
    """One saved before tables kept coded copies of rows to search: they are made at the next use."""
    model, optimizer = make(**CASES["search"])
    train(model, optimizer, range(5))
    saved = checkpoint(model, optimizer)
    saved["sampler"] = {name: in_format_1(each) for name, each in saved["sampler"].items()}
    for state in saved["sampler"].values():
        for name in ("row_codes", "row_terms", "row_places"):
            assert state.pop(name) is not None
    other, other_optimizer = make(seed=1, **CASES["search"])
    restore(other, other_optimizer, saved)
    assert train(other, other_optimizer, range(5, 8)).isfinite().all()
    assert other[-1].tables.sq8 is not None


@pytest.mark.parametrize("to_format", [in_format_1, in_format_2])
def test_rows_in_eight_bits_are_taken_up_in_seven(to_format):
    model, optimizer = make(**CASES["search"])
    train(model, optimizer, range(5))
    model[-1].tables.maintain(model[-1].weight, model[-1].bias, advance=False, all_rows_move=False)
    saved = checkpoint(model, optimizer)
    (name, state), *_ = saved["sampler"].items()
    weight, places = model[-1].weight.detach(), state["sq8_places"].long()
    blocks, pairs = len(state["sq8_codes"]), (D + 1) // 2
    rows, scales = torch.zeros(blocks * 16, 2 * pairs), torch.zeros(blocks * 16)
    scales[places] = weight.abs().amax(1) / 127
    rows[places, :D] = (weight / scales[places, None]).round()
    old = to_format(state)
    codes, terms = ("row_codes", "row_terms") if old["format"] == 1 else ("sq8_codes", "sq8_terms")
    assert old[codes].dtype == torch.int8
    old[codes] = rows.to(torch.int8).view(blocks, 16, pairs, 2).transpose(1, 2).contiguous()
    old[terms] = torch.stack([scales.view(blocks, 16), state["sq8_terms"][:, 1]], 1)
    saved["sampler"] = {name: old}
    other, other_optimizer = make(seed=1, **CASES["search"])
    restore(other, other_optimizer, saved)
    found = other[-1].tables.sq8
    assert found.codes.shape == state["sq8_codes"].shape and torch.equal(
        found.places.long(), places
    )
    coded = found.codes.float().transpose(1, 2).reshape(blocks * 16, -1)[places] - 64
    scale = found.terms[:, 0].reshape(-1, 1)[places]
    assert not coded[:, D:].any()
    assert ((coded[:, :D] * scale - weight).abs() <= 0.76 * scale).all()  # rounded twice
    assert torch.equal(other[-1].tables.codes, model[-1].tables.codes)
    assert train(other, other_optimizer, range(5, 8)).isfinite().all()


def test_a_state_from_before_there_were_frequencies_and_drift():
    model, optimizer = make()
    train(model, optimizer, range(7))
    saved = checkpoint(model, optimizer)
    state = saved["sampler"]["3"] = in_format_1(saved["sampler"]["3"])
    for name in ("probe_codes", "frequencies"):
        del state[name]
    for name in ("drift_checks", "drift"):
        del state["schedule"][name]
    for name in ("schedule", "drift", "tail_distribution"):
        del state["options"][name]
    expected = train(model, optimizer, range(7, 12))
    other, other_optimizer = make(seed=1)
    restore(other, other_optimizer, saved)
    assert torch.equal(train(other, other_optimizer, range(7, 12)), expected)


@pytest.mark.parametrize(
    "option, value",
    [
        ("family", "minhash"),
        ("family", "cross_polytope"),
        ("projection", "sparse"),
        ("tail_distribution", "quadratic_kernel"),
        ("tail_distribution", ["uniform", "quadratic_kernel"]),
    ],
)
@pytest.mark.parametrize("format", [1, 2])
def test_states_of_removed_options_are_refused(option, value, format):
    model, optimizer = make()
    train(model, optimizer, range(4))
    state = copy.deepcopy(sampler_state(model))
    if format == 1:
        state = {name: in_format_1(each) for name, each in state.items()}
    state["3"]["options"][option] = value
    name = value if isinstance(value, str) else value[-1]
    message = rf"options\.{option}: .*got '{name}', which was removed: make the layer with another"
    with pytest.raises(ValueError, match=message):
        load_sampler_state(model, state)
    assert model[-1].stats()["steps"] == 4
