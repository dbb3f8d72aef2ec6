"""The examples of the README that are whole programs do what they say."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"<!-- runs -->\n```python\n(.*?)```", README, re.DOTALL)


NAMED = re.findall(r"`(tests/\w+\.py)::(\w+)`", README)


def test_the_tests_that_are_named_exist():
    assert len(NAMED) > 30
    for file, name in NAMED:
        defined = re.findall(r"^def (test_\w+)\(", (Path(__file__).parent.parent / file).read_text(), re.MULTILINE)
        assert name in defined, f"{file} has no {name}"


def test_every_capability_names_a_test_or_says_no():
    (table,) = re.findall(r"<!-- capabilities -->\n(.*?)<!-- /capabilities -->", README, re.DOTALL)
    _, _, *rows = table.strip().splitlines()
    for row in rows:
        *_, ours = row.strip("|").split("|")
        assert "::test_" in ours or ours.strip().startswith("no:"), row


def run(example):
    torch.manual_seed(0)
    scope = {"__name__": "example"}
    exec(example, scope)
    return scope


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: re.search(r"^class (\w+)", text, re.M).group(1))
def test_example_runs(example):
    run(example)


def test_the_layer_of_the_own_cell_ran_on_the_engine_and_trains_as_the_loop():
    scope = run(EXAMPLES[0])
    fast, slow, x = scope["fast"], scope["slow"], scope["x"]
    assert fast._route(x) is None
    fast(x)[0].square().sum().backward()
    slow(x).square().sum().backward()
    torch.testing.assert_close(fast.weight_hh_l0.grad, slow.U.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.weight_ih_l0.grad, slow.W.weight.grad, rtol=1e-4, atol=1e-4)


def test_the_translator_is_blind_to_padding_and_all_of_it_learns():
    scope = run(EXAMPLES[1])
    model, source, lengths, target = (scope[n] for n in ("model", "source", "lengths", "target"))
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    padding = torch.arange(source.shape[1]) >= lengths[:, None]
    changed = torch.where(padding, 7, source)
    assert not torch.equal(changed, source)
    torch.testing.assert_close(model(changed, lengths, target), model(source, lengths, target))
