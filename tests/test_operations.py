"""Every operation that a cell may use, through compiled kernels: values and gradients against torch's in float64, and
at the ends of the range against torch's own in the same format."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastcells import cell, functional
from fastcells import expression as ex

# Ours, written as in a cell, and torch's, of one or two values.
UNARY = {
    "sigmoid": (torch.sigmoid, torch.sigmoid),
    "tanh": (torch.tanh, torch.tanh),
    "relu": (torch.relu, torch.relu),
    "exp": (torch.exp, torch.exp),
    "expm1": (ex.expm1, torch.expm1),
    "log": (torch.log, torch.log),
    "sqrt": (torch.sqrt, torch.sqrt),
    "rsqrt": (torch.rsqrt, torch.rsqrt),
    "abs": (abs, abs),
    "neg": (lambda v: -v, torch.neg),
    "softplus": (F.softplus, lambda v: F.softplus(v, threshold=40)),
    "sin": (torch.sin, torch.sin),
    "cos": (torch.cos, torch.cos),
    "erf": (torch.erf, torch.erf),
    "silu": (F.silu, F.silu),
    "gelu": (F.gelu, lambda v: 0.5 * v * (1 + torch.erf(v * 0.5**0.5))),  # torch's own: NaN at inf, in float32 alone
    "gelu_tanh": (lambda v: F.gelu(v, approximate="tanh"),) * 2,
    "softsign": (F.softsign, F.softsign),
    "leaky_relu": (F.leaky_relu, F.leaky_relu),
    "elu": (F.elu, F.elu),
    "selu": (F.selu, F.selu),
    "hard_sigmoid": (F.hardsigmoid, lambda v: F.relu6(v + 3) / 6),  # torch's own takes 1 / 6 in float32
    "hardtanh": (F.hardtanh, F.hardtanh),
    "clip": (lambda v: torch.clamp(v, -1.0, 0.5),) * 2,
    "clamp_min": (lambda v: torch.clamp(v, min=0.0),) * 2,
    "cube": (lambda v: v**3,) * 2,
    "inverse_square": (lambda v: v**-2,) * 2,
    "power_of_two": (lambda v: 2**v,) * 2,
    "equal": (lambda v: ex.where(v == 1.0, -v, 2.0 * v), lambda v: torch.where(v == 1.0, -v, 2.0 * v)),
    "both": (
        lambda v: ex.where((v > -1.0) & ~(v >= 1.0) | (v != v), v, 0.5 * v),
        lambda v: torch.where((v > -1.0) & ~(v >= 1.0) | (v != v), v, 0.5 * v),
    ),
}
BINARY = {
    "sub": (lambda a, b: a - b,) * 2,
    "mul": (lambda a, b: a * b,) * 2,
    "div": (lambda a, b: a / b,) * 2,
    "maximum": (torch.maximum, torch.maximum),
    "minimum": (torch.minimum, torch.minimum),
    "where": (lambda a, b: torch.where(a < b, 2.0 * a, b),) * 2,
    "step": (lambda a, b: (a <= b) * a,) * 2,
}
FUNCTIONS = UNARY | BINARY
NAMES = list(FUNCTIONS)
ODD = [
    0.0,
    1.0,
    -1.0,
    3.0,
    -3.0,
    20.0,
    -20.0,
    90.0,
    -90.0,
    1e4,
    -1e4,
    1e30,
    -1e30,
    1e-30,
    math.inf,
    -math.inf,
    math.nan,
]
SPECIAL = {  # where the gradient is torch's, of functions of which it is not everywhere
    "sin": lambda v: v.abs() < 1e5,  # the range of the reduction
    "cos": lambda v: v.abs() < 1e5,
    "clip": lambda v: ~v.isnan() & (v != -1.0) & (v != 0.5),  # torch gives 0 where it is not a number, and from 2.14 on
    "clamp_min": lambda v: ~v.isnan() & (v != 0.0),  # at the ends
    "hard_sigmoid": lambda v: ~v.isnan(),
}


def call(function, name, a, b):
    return function(a) if name in UNARY else function(a, b)


@cell(gates="g", step_inputs="a b which")
def every(x, u, s, p):
    """The function of a and b that a unit asks for by its number; the others get ones there, and are left out."""
    result = x.g
    for k, (name, (ours, _)) in enumerate(FUNCTIONS.items()):
        asked = p.which == float(k)
        a, b = (torch.where(asked, v, 1.0) for v in (p.a, p.b))
        result = result + torch.where(asked, call(ours, name, a, b), 0.0)
    # Of nothing, but sums over the units make all of this one short loop: compiled in a second, not in minutes.
    return result + ex.mean(torch.where(p.which < 0.0, result, 0.0))


@pytest.fixture(params=[torch.float32, torch.float64], ids=str, scope="module")
def computed(request):
    """Numbers a, b, how many of them are ordinary, and {name: (value, *gradients)} of all functions by the kernels."""
    ordinary, odd = torch.linspace(-6, 6, 50).to(request.param), torch.tensor(ODD, dtype=request.param)
    a = torch.cat([ordinary, *[odd] * len(odd)])
    b = torch.cat([torch.cos(7 * ordinary), odd.repeat_interleave(len(odd))])
    which = torch.arange(len(FUNCTIONS), dtype=a.dtype).repeat_interleave(len(a))
    fed = [t.view(1, 1, 1, -1).requires_grad_() for t in (a.repeat(len(FUNCTIONS)), b.repeat(len(FUNCTIONS)), which)]
    weight = torch.zeros(len(which), 1, dtype=a.dtype)
    x = torch.zeros(1, 1, 1, dtype=a.dtype)
    _, (y,) = functional.layer(every, x, None, [(weight, None, None, None, None)], None, fed)
    grads = torch.autograd.grad(y, fed[:2], torch.ones_like(y))
    found = zip(*(t.detach().view(len(FUNCTIONS), -1) for t in (y, *grads)), strict=True)
    return a, b, len(ordinary), dict(zip(FUNCTIONS, found, strict=True))


def by_torch(name, a, b):
    """(value, *gradients)"""
    a, b = (v.clone().requires_grad_() for v in (a, b))
    y = call(FUNCTIONS[name][1], name, a, b)
    return y.detach(), *torch.autograd.grad(y, (a, b), torch.ones_like(y), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_gradient(name, computed):
    a, b, count, found = computed
    eps = torch.finfo(a.dtype).eps
    for ours, exact in zip(found[name], by_torch(name, a[:count].double(), b[:count].double()), strict=True):
        torch.testing.assert_close(ours[:count].double(), exact, rtol=30 * eps, atol=8 * eps, equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ends_of_the_range(name, computed):
    """Zero, large numbers, infinities and NaN, every one with every other: as torch has it in the same format."""
    a, b, count, found = computed
    (value, *gradients), (torchs, *others) = ([t[count:] for t in r] for r in (found[name], by_torch(name, a, b)))
    a = a[count:]
    compared = SPECIAL.get(name, lambda v: v == v)
    tolerance = {"rtol": 1e-5, "atol": 1e-30, "equal_nan": True}
    within = a.abs() < 1e5 if name in ("sin", "cos") else slice(None)
    torch.testing.assert_close(value[within], torchs[within], **tolerance)
    if name in ("elu", "selu"):  # expm1's derivative is that plus one
        tolerance["atol"] = torch.finfo(a.dtype).eps
    for ours, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(ours[compared(a)], theirs[compared(a)], **tolerance)
