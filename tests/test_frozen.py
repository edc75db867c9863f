"""Nothing of frozen.json changes by accident: see frozen.py, which writes it."""

import difflib
import json
import platform
from concurrent.futures import ThreadPoolExecutor

import frozen
import frozen_names
import frozen_runs
import frozen_states
import pytest
import torch
from helpers import LEVELS, in_format_1, in_format_2, supported_levels

from slide_torch import load_sampler_state, sampler_state

RECORD = frozen.record()
REMEDY = "if that is meant, run: python tests/frozen.py --write"


def difference(recorded, found):
    lines = difflib.unified_diff(recorded, found, "recorded", "found", lineterm="", n=0)
    return "\n".join([*lines, REMEDY])


def test_public_names_and_signatures():
    found = frozen_names.names()
    assert found == RECORD["names"], difference(RECORD["names"], found)


def test_keys_of_states():
    recorded, found = (
        json.dumps(keys, indent=1).split("\n") for keys in (RECORD["keys"], frozen_states.keys())
    )
    assert found == recorded, difference(recorded, found)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("format", frozen_states.SAVED_STATES)
@pytest.mark.parametrize("name", frozen_states.SAVED)
def test_a_sampler_state_is_taken_up_as_it_was(name, format):
    layer, _, saved = frozen_states.resumed(name, format)
    saved, state = saved["sampler"][""], sampler_state(layer)[""]
    assert saved["format"] == format and state["format"] == max(frozen_states.SAVED_STATES)
    assert saved["schedule"]["steps"] == frozen_states.SAVED_STEPS
    if format < 3:
        state = (in_format_1 if format == 1 else in_format_2)(state)
    # of a tail distribution that there is no longer
    if format < 3:
        assert saved.pop("kernel_sums") is None and saved["options"].pop("kernel_alpha") == 100.0
    assert saved.keys() == state.keys()
    for key in saved:
        assert equal(saved[key], state[key]), key


@pytest.mark.parametrize("format", [1, 2])
def test_a_sampler_state_of_the_quadratic_kernel_is_refused(format):
    """Saved when there was one; the layer has the other options of the one that was saved."""
    file = frozen_states.SAVED_STATES[format].with_name("sampler_states_quadratic_kernel.pt")
    state = torch.load(file, weights_only=True)[format]
    layer, _ = frozen_states.small(frozen_states.SAVED["drift"])
    message = r"options\.tail_distribution: .*got 'quadratic_kernel', which was removed: make the layer with"
    with pytest.raises(ValueError, match=message):
        load_sampler_state(layer, state)
    assert not layer.tables.built and layer.stats()["steps"] == 0


@pytest.mark.parametrize("name", frozen_states.SAVED)
def test_sampler_states_of_all_formats_resume_alike(name):
    """Those of format 1 have recorded bits, below."""
    of_formats = [frozen_states.resume(name, format) for format in frozen_states.SAVED_STATES]
    assert all(found == of_formats[0] for found in of_formats)


@pytest.fixture(scope="module")
def found_bits():
    """Digests at each recorded level of this machine, computed side by side; why others have none."""
    levels, reasons = [], {}
    for level in LEVELS:
        if level not in supported_levels():
            reasons[level] = f"this machine ({platform.machine()}) has no {level}"
        elif frozen.level_key(level) not in RECORD["bits"]:
            reasons[level] = f"frozen.json has no record of {frozen.level_key(level)}"
        else:
            levels.append(level)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(frozen.bits_at, levels, (place % 2 for place in range(len(levels))))
        return dict(zip(levels, found, strict=True)), reasons


@pytest.mark.parametrize("level", LEVELS)
def test_bits_of_training_runs(level, found_bits):
    """Parameters, losses, input gradients and optimizer states, with one thread and with two (by turns, where
    they are not of the matrix of patterns, corrections, dtypes and ways)."""
    found, reasons = found_bits
    if level in reasons:
        pytest.skip(reasons[level])
    recorded = RECORD["bits"][frozen.level_key(level)]
    found = {**found[level], "level": recorded["level"]}
    assert found_bits[0][level]["level"] == level and len(frozen_runs.CASES) > 100
    assert found.keys() == recorded.keys(), difference(sorted(recorded), sorted(found))
    by_threads = [name for name, digests in found.items() if isinstance(digests, dict)]
    assert not by_threads, f"not the same bits with one thread as with two: {by_threads}"
    if found["torch"] != recorded["torch"]:
        pytest.skip(f"torch {torch.__version__} itself computes other bits here than when recorded")
    changed = [name for name in found if found[name] != recorded[name]]
    if found["numpy"] != recorded["numpy"]:
        cases = frozen_runs.CASES | {
            f"resumed, {name}": case for name, case in frozen_states.SAVED.items()
        }
        changed = [name for name in changed if name in cases and not cases[name].uses_numpy]
    assert not changed, f"other bits than recorded: {changed}; {REMEDY}"


def test_fused_updates_are_those_of_step():
    """Of the record, so that it freezes what is right: inside backward or in step(), the same bits."""
    for level, recorded in RECORD["bits"].items():
        fused = [name for name in recorded if name.endswith(", fused")]
        assert len(fused) == 12
        for name in fused:
            assert recorded[name] == recorded[name.replace(", fused", ", sparse")], (level, name)
