"""Problems for the engine: cells, random arguments, and the comparison with the cell's own torch form."""

import torch

from fastcells import cell, cells, functional, plan, unrolled
from fastcells.cpu import layer
from fastcells.expression import (
    exp,
    hard_sigmoid,
    maximum,
    mean,
    norm,
    relu,
    rsqrt,
    sigmoid,
    silu,
    sqrt,
    tanh,
    where,
)
from fastcells.roof import using_threads

BUILT_IN = [cells.lstm, cells.gru, cells.gru_reset_before, cells.rnn_tanh, cells.rnn_relu]


@cell(gates="i j k o", states="h c m")
def invented(x, u, s):
    """Three states, a gate without a recurrent product, one without an input, two levels of computed products."""
    i = hard_sigmoid(x.i + u.i)
    j = silu(x.j) * relu(s.c)
    c = i * s.c + (1.0 - i) * tanh(u.j(j + s.h))
    m = maximum(s.m * 0.9, c)
    k = u.k(sigmoid(c) * s.m)
    h = where(c < 0.1, k, tanh(x.o + u.o)) / sqrt(1.0 + exp(-m))
    return h, c, m


@cell(gates="h")
def additive(x, u, s):
    """No activation: results are sums of products as they are."""
    return x.h + u.h


@cell(gates="f z", states="h")
def minimal(x, u, s):
    """Minimal gated unit (Zhou et al. 2016)."""
    f = sigmoid(x.f + u.f)
    return s.h + f * (tanh(x.z + u.z(f * s.h)) - s.h)


@cell(gates="i f g o", states="h c", parameters="p_i p_f p_o", scalars="scale")
def peephole(x, u, s, p):
    """Gates that see the cell state (Gers, Schraudolph & Schmidhuber 2002), and a learned number."""
    i = sigmoid(x.i + u.i + p.p_i * s.c)
    f = sigmoid(x.f + u.f + p.p_f * s.c)
    c = f * s.c + i * tanh(x.g + u.g)
    o = sigmoid(x.o + u.o + p.p_o * c)
    return o * tanh(p.scale * c), c


@cell(gates="h", parameters="u")
def independent(x, u, s, p):
    """IndRNN (Li et al. 2018): no recurrent product at all."""
    return relu(x.h + p.u * s.h)


@cell(gates="i f g o", states="h c", inputs="mask", step_inputs="keep", parameters="gain")
def regularised(x, u, s, p):
    """Variational dropout of the operand of the products, with a learned gain, and zoneout of the cell state."""
    h = p.gain * p.mask * s.h + 0.1
    i = sigmoid(x.i + u.i(h))
    f = sigmoid(x.f + u.f(h))
    o = sigmoid(x.o + u.o(h))
    c = where(p.keep < 0.0, f * s.c + i * tanh(x.g + u.g(h)), p.keep * s.c)
    return o * tanh(c), c


@cell(gates="a b c", states="h m", step_inputs="mask")
def odd(x, u, s, p):
    """Products of another state, of an input projection, of a masked state (in a stage without products before it)."""
    a = tanh(u.a(s.m) + x.a)
    return a * tanh(u.b(p.mask * s.h)) + s.h * 0.5, a + u.c(x.c)


@cell(gates="i f g o", states="h c", parameters="x_gain h_gain c_gain c_bias")
def normed(x, u, s, p):
    """Layer-norm LSTM (Ba, Kiros & Hinton 2016), the gates of both products apart, but two of them together."""
    i = sigmoid(norm(x.i) * p.x_gain + norm(u.i) * p.h_gain)
    f = sigmoid(norm(x.f) * p.x_gain + norm(u.f) * p.h_gain)
    (xg, xo), (ug, uo) = norm(x.g, x.o), norm(u.g, u.o)
    c = f * s.c + i * tanh(xg * p.x_gain + ug * p.h_gain)
    return sigmoid(xo + uo) * tanh(norm(c) * p.c_gain + p.c_bias), c


@cell(gates="r z n", states="h m", scalars="beta")
def averaged(x, u, s, p):
    """Sums before and after a product of a computed vector; means that change with the sequence alone."""
    r = sigmoid(norm(x.r + u.r, eps=p.beta * p.beta))
    level = mean(r * s.h)
    n = tanh(x.n + u.n(r * s.h + level) * rsqrt(0.1 + mean(abs(x.n)) * p.beta**2))
    z = sigmoid(x.z + u.z)
    h = n + z * (s.h - n)
    return h + 0.1 * level, where(level < 0.1, mean(h) + s.m * 0.5, h)


NORMED = [normed, averaged]


OWN = [peephole, independent, regularised, odd]


def problem(c, steps, rows, inputs, hidden, *, directions=1, project=0, bias=True, given=True, lengths=None,
            dtype=torch.float64, seed=0):  # fmt: skip
    """Random arguments of functional.layer, all requiring gradients, and their names."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape, scale=1.0):
        numbers = torch.randn(shape, dtype=torch.float64, generator=generator) * scale
        return numbers.to(dtype).requires_grad_()

    gates, out, scale = len(c.gates), project or hidden, hidden**-0.5
    parameters, names = [], []
    for d in range(directions):
        w = (
            make(gates * hidden, inputs, scale=scale),
            make(gates * hidden, out, scale=scale),
            make(gates * hidden, scale=scale) if bias else None,
            make(gates * hidden, scale=scale) if bias else None,
            make(project, hidden, scale=scale) if project else None,
        )
        own = tuple(make() if n in c.scalars else make(hidden) for n in c.own)
        parameters.append((*w, own) if own else w)
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", *c.own)
        names += [f"{n}[{d}]" for n, p in zip(kinds, (*w, *own), strict=True) if p is not None]
    batch_sizes = None
    shape: tuple[int, ...] = (steps, rows)
    if lengths is not None:
        batch_sizes = torch.tensor([sum(length > t for length in lengths) for t in range(max(lengths))])
        shape, rows = (sum(lengths),), len(lengths)
    x = make(*shape, inputs)
    sizes = [out] + [hidden] * (len(c.states) - 1)
    states = tuple(make(directions, rows, s) for s in sizes) if given else None
    fed = [make(directions, *(shape if n in c.step_inputs else (rows,)), hidden) for n in c.fed]
    names = ["x", *(f"{s}_0" for s in c.states if given), *c.fed, *names]
    flat = (p for w in parameters for p in (*w[:5], *(w[5] if c.own else ())))
    leaves = [x, *(states or ()), *fed, *(p for p in flat if p is not None)]
    return (c, x, states, parameters, batch_sizes, *([fed] if fed else [])), leaves, names


def everything(function, arguments, leaves, seed=1):
    """Outputs and gradients with random cotangents on y and on every final state."""
    y, finals = function(*arguments)
    outputs = [y, *finals]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in outputs]
    return outputs, torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)


def same_bits(arguments, leaves, threads=(1, 2, 3, 5)):
    """Whether outputs and gradients are the same on any of these numbers of threads."""
    found = []
    try:
        for n in threads:
            with using_threads(n):
                plan.plan.cache_clear()
                outputs, gradients = everything(functional.layer, arguments, leaves)
            found.append([*outputs, *gradients])
    finally:
        plan.plan.cache_clear()
        layer.forget()
    return all(all(map(torch.equal, found[0], other)) for other in found[1:])


def agree(arguments, leaves, names, tolerance=1e-11):
    ours, our_grads = everything(functional.layer, arguments, leaves)
    truth, true_grads = everything(unrolled.layer, arguments, leaves)
    with torch.no_grad():
        y, finals = functional.layer(*arguments)
    labels = ["y", *(f"{s}_n" for s in arguments[0].states)]
    compared = [*zip(labels, ours, truth, strict=True)]
    compared += [(f"{n} without gradient", a, b) for n, a, b in zip(labels, (y, *finals), truth, strict=True)]
    compared += [(f"gradient of {n}", a, b) for n, a, b in zip(names, our_grads, true_grads, strict=True)]
    for name, a, b in compared:
        assert a.shape == b.shape, name
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"
