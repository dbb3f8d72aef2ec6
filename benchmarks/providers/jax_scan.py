"""JAX: `lax.scan` under jit, the input projection before the scan."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Provider, refuse_variants


def cell(jax: Any, name: str, x: Any, u: Any, states: Any) -> Any:
    """The new states from x = W x_t + b and u = U h + b'."""
    sigmoid, tanh, split = jax.nn.sigmoid, jax.numpy.tanh, jax.numpy.split
    if name == "rnn":
        return (tanh(x + u),)
    if name == "gru":
        (x_r, x_z, x_n), (u_r, u_z, u_n) = split(x, 3, 1), split(u, 3, 1)
        n = tanh(x_n + sigmoid(x_r + u_r) * u_n)
        return (n + sigmoid(x_z + u_z) * (states[0] - n),)
    i, f, g, o = split(x + u, 4, 1)
    c = sigmoid(f) * states[1] + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


class Jax(Provider):
    name = "JAX scan"
    packages = ("jax",)

    def prepare(self, problem: Problem) -> Prepared:
        jax: Any = import_module("jax")
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_platforms", "cpu")
        jnp, case, mode = jax.numpy, problem.case, problem.case.how
        refuse_variants(problem.case, resets=True)
        letters = case.kind.states
        names = ("y", *(f"{letter}_n" for letter in letters))
        # A step past a sequence's end leaves the state alone.
        alive = jnp.asarray(problem.alive[:, :, None]) if mode.ragged else None
        resets = jnp.asarray(problem.resets[:, :, None]) if mode.resets else None
        given = {name: jnp.asarray(value) for name, value in problem.states.items()}
        zero = jnp.zeros((mode.layers * mode.directions, case.N, case.H), case.dtype)
        initial = [given.get(f"{letter}_0", zero) for letter in letters]

        def direction(weights: Any, x: Any, row: int, suffix: str) -> Any:
            w_ih, w_hh, b_ih, b_hh = (weights[f"{n}{suffix}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

            def step(states: Any, inputs: Any) -> Any:
                if resets is not None:
                    states = tuple(jnp.where(inputs[2], 0, s) for s in states)
                new = cell(jax, case.cell, inputs[0], states[0] @ w_hh.T + b_hh, states)
                if alive is None:
                    return new, new[0]
                new = tuple(jnp.where(inputs[1], a, b) for a, b in zip(new, states, strict=True))
                return new, jnp.where(inputs[1], new[0], 0)

            inputs = (x @ w_ih.T + b_ih, alive, resets)
            final, y = jax.lax.scan(step, tuple(s[row] for s in initial), inputs, reverse=suffix.endswith("_reverse"))
            return y, final

        def forward(weights: Any, x: Any) -> Any:
            finals = []
            for k in range(mode.layers):
                suffixes = [f"_l{k}", f"_l{k}_reverse"][: mode.directions]
                passes = [direction(weights, x, k * mode.directions + d, suffix) for d, suffix in enumerate(suffixes)]
                finals += [final for _, final in passes]
                x = jnp.concatenate([y for y, _ in passes], -1)
            return x, *(jnp.stack(s) for s in zip(*finals, strict=True))

        weights = {name: jnp.asarray(value) for name, value in problem.weights.items()}
        x = jnp.asarray(problem.x)
        cotangents = tuple(jnp.asarray(problem.cotangents[name]) for name in names)

        def outputs(result: Any) -> dict[str, np.ndarray]:
            return {name: np.asarray(value) for name, value in zip(names, result, strict=True)}

        def gradients(result: Any) -> dict[str, np.ndarray]:
            of_weights, dx = result
            return {"dx": np.asarray(dx)} | {f"d{name}": np.asarray(value) for name, value in of_weights.items()}

        def train(weights: Any, x: Any, cotangents: Any) -> Any:
            return jax.vjp(forward, weights, x)[1](cotangents)

        wait = jax.block_until_ready
        if mode.call == "forward":
            run = jax.jit(forward)
            return Prepared(lambda: wait(run(weights, x)), outputs)
        if mode.call == "training":
            run = jax.jit(train)
            return Prepared(lambda: wait(run(weights, x, cotangents)), gradients)
        forwards = jax.jit(lambda weights, x: jax.vjp(forward, weights, x)[1])
        backwards = jax.jit(lambda pullback, cotangents: pullback(cotangents))
        graph: list[Any] = []
        setup = lambda: graph.append(wait(forwards(weights, x)))  # noqa: E731
        return Prepared(lambda: wait(backwards(graph.pop(), cotangents)), gradients, setup=setup)
