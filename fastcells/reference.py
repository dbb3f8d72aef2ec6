"""Recurrent layers from scratch: NumPy, float64, forward and backpropagation through time (BPTT), written to be read.

The file has three parts, each knowing only the one before:

1. `Affine`: the product a = W v + b, and how a gradient passes back through it.
2. The cells: one time step of the RNN, LSTM and GRU, forward and, derived by hand, backward.
3. The layers `RNN`, `LSTM`, `GRU`: any cell over time, sequence lengths, directions and stacked layers, with the
   constructors, parameter names, gate order and shapes of `torch.nn`.

Notation: x is the input of a step, h the hidden state, c the cell state; a prime marks the new state (h', c'). `dv` is
the gradient of the loss L with respect to `v`, so it has the shape of `v`; `*` is elementwise. Sizes: T time steps,
N sequences, I = input_size, H = hidden_size, P = proj_size, D = 2 directions if bidirectional else 1.

Example: a GRU learns to remember. Each sequence is noise, of its own length, and the answer asked for at its end is its
first number. It is read from the first unit of the final hidden state, so the loss and its gradient are a line each:

>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> x = rng.uniform(-0.8, 0.8, size=(6, 32, 1))            # (T, N, I)
>>> lengths = rng.integers(3, 7, size=32)                  # from 3 to T
>>> gru = GRU(input_size=1, hidden_size=8, seed=0)
>>> losses = []
>>> for _ in range(300):
...     y, h_n = gru.forward(x, lengths=lengths)           # (T, N, H), (1, N, H)
...     error = h_n[0, :, 0] - x[0, :, 0]
...     losses.append(np.mean(error**2))                   # L
...     dh_n = np.zeros_like(h_n)
...     dh_n[0, :, 0] = 2 * error / error.size             # dL/dh_n
...     gradients = gru.backward(dh_n=dh_n)
...     for name, parameter in gru.parameters.items():     # gradient descent
...         parameter -= 1.0 * gradients[name]
>>> bool(losses[-1] < losses[0] / 20)
True
>>> list(gradients)
['x', 'h_0', 'weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0', 'bias_hh_l0']
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
State = tuple[Array, ...]  # (h,) or (h, c)


# 1. The affine map ----------------------------------------------------------------------------------------------------


class Affine:
    """a = W v + b for each row v of a batch, where `rows` may select some rows of W and b.

    With a = W v + b and the gradient da known:    dv = W^T da    dW = da v^T    db = da
    W and b serve at every time step, so dW and db are sums over time; a batch holds its vectors as rows.
    """

    def __init__(self, weight: Array, bias: Array | None = None):
        self.weight = weight
        self.bias = np.zeros(len(weight)) if bias is None else bias
        self.d_weight, self.d_bias = np.zeros_like(self.weight), np.zeros_like(self.bias)

    def __call__(self, v: Array, rows: slice = slice(None)) -> Array:
        return v @ self.weight[rows].T + self.bias[rows]

    def backward(self, da: Array, v: Array, rows: slice = slice(None)) -> Array:
        self.d_weight[rows] += da.T @ v
        self.d_bias[rows] += da.sum(axis=0)
        return da @ self.weight[rows]


# 2. The cells ---------------------------------------------------------------------------------------------------------


def sigmoid(a: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * a))  # 1 / (1 + exp(-a)), which would overflow


class Cell:
    """One time step. `ih` is applied to the input, `hh` to the hidden state, `hr` projects the LSTM's output.

    The gates are stacked along the rows of `ih` and `hh`, G*H of them.
    """

    gates = 1  # G
    state_names: tuple[str, ...] = ("h",)

    def __init__(self, ih: Affine, hh: Affine, hr: Affine | None = None):
        self.ih, self.hh, self.hr = ih, hh, hr

    def forward(self, x: Array, state: State) -> tuple[State, tuple]:
        """x (N, I) and the old state -> the new state, and what `backward` needs."""
        raise NotImplementedError

    def backward(self, d_state: State, saved: tuple) -> tuple[Array, State]:
        """Gradient of the new state -> dx (N, I) and the gradient of the old state; dW and db add up in the maps."""
        raise NotImplementedError


class TanhCell(Cell):
    """h' = tanh(a),    a = W x + b + U h + b'    (Elman, 1990)."""

    def activation(self, a: Array) -> Array:
        return np.tanh(a)

    def slope(self, y: Array) -> Array:
        return 1.0 - y**2  # tanh' from its value y

    def forward(self, x: Array, state: State) -> tuple[State, tuple]:
        (h,) = state
        h_new = self.activation(self.ih(x) + self.hh(h))
        return (h_new,), (x, h, h_new)

    def backward(self, d_state: State, saved: tuple) -> tuple[Array, State]:
        x, h, h_new = saved
        (dh_new,) = d_state
        da = dh_new * self.slope(h_new)
        return self.ih.backward(da, x), (self.hh.backward(da, h),)


class ReluCell(TanhCell):
    """h' = max(a, 0) in place of tanh; the slope at 0 is taken as 0."""

    def activation(self, a: Array) -> Array:
        return np.maximum(a, 0.0)

    def slope(self, y: Array) -> Array:
        return np.where(y <= 0.0, 0.0, 1.0)


class LSTMCell(Cell):
    """Long short-term memory (Hochreiter & Schmidhuber, 1997) with the forget gate (Gers et al., 2000).

    a  = W x + b + U h + b'                                        one block of rows per gate: a_i, a_f, a_g, a_o
    i  = sigmoid(a_i)    f = sigmoid(a_f)    g = tanh(a_g)    o = sigmoid(a_o)
    c' = f * c + i * g
    m  = o * tanh(c')
    h' = m, or with a projection h' = R m                          (Sak et al., 2014)
    """

    gates = 4
    state_names = ("h", "c")

    def forward(self, x: Array, state: State) -> tuple[State, tuple]:
        h, c = state
        a_i, a_f, a_g, a_o = np.split(self.ih(x) + self.hh(h), 4, axis=1)
        i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
        c_new = f * c + i * g
        m = o * np.tanh(c_new)
        h_new = m if self.hr is None else self.hr(m)
        return (h_new, c_new), (x, h, c, i, f, g, o, c_new, m)

    def backward(self, d_state: State, saved: tuple) -> tuple[Array, State]:
        x, h, c, i, f, g, o, c_new, m = saved
        dh_new, dc_new = d_state
        tanh_c = np.tanh(c_new)
        # h' = R m
        dm = dh_new if self.hr is None else self.hr.backward(dh_new, m)
        # m = o * tanh(c'): this reaches c' besides what came from the next step
        do = dm * tanh_c
        dc_new = dc_new + dm * o * (1.0 - tanh_c**2)
        # c' = f * c + i * g
        di, dg, df, dc = dc_new * g, dc_new * i, dc_new * c, dc_new * f
        # sigmoid' = sigmoid (1 - sigmoid),    tanh' = 1 - tanh^2
        da = np.hstack([di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g**2), do * o * (1.0 - o)])
        return self.ih.backward(da, x), (self.hh.backward(da, h), dc)


class GRUCell(Cell):
    """Gated recurrent unit in the form of torch and cuDNN: the reset gate acts after the recurrent product.

    w  = W x + b    u = U h + b'                                   one block of rows per gate: r, z, n
    r  = sigmoid(w_r + u_r)
    z  = sigmoid(w_z + u_z)
    n  = tanh(w_n + r * u_n)
    h' = (1 - z) * n + z * h
    """

    gates = 3

    def forward(self, x: Array, state: State) -> tuple[State, tuple]:
        (h,) = state
        w_r, w_z, w_n = np.split(self.ih(x), 3, axis=1)
        u_r, u_z, u_n = np.split(self.hh(h), 3, axis=1)
        r, z = sigmoid(w_r + u_r), sigmoid(w_z + u_z)
        n = np.tanh(w_n + r * u_n)
        return ((1.0 - z) * n + z * h,), (x, h, r, z, n, u_n)

    def backward(self, d_state: State, saved: tuple) -> tuple[Array, State]:
        x, h, r, z, n, u_n = saved
        (dh_new,) = d_state
        # h' = (1 - z) * n + z * h
        da_z = dh_new * (h - n) * z * (1.0 - z)
        da_n = dh_new * (1.0 - z) * (1.0 - n**2)
        # a_n = w_n + r * u_n, so da_n reaches r times u_n, and u_n times r
        da_r = da_n * u_n * r * (1.0 - r)
        dx = self.ih.backward(np.hstack([da_r, da_z, da_n]), x)
        dh = dh_new * z + self.hh.backward(np.hstack([da_r, da_z, da_n * r]), h)
        return dx, (dh,)


class ResetBeforeGRUCell(Cell):
    """Gated recurrent unit as published (Cho et al., 2014), Keras's `reset_after=False`: h is reset before the product.

    r, z and h' are those of the `GRUCell`, and
    n  = tanh(w_n + U_n (r * h) + b'_n)
    """

    gates = 3

    def _rows(self) -> tuple[slice, slice]:
        """Those of r and z, which are applied to h, and those of n, applied to r * h."""
        start = 2 * len(self.hh.weight) // 3
        return slice(None, start), slice(start, None)

    def forward(self, x: Array, state: State) -> tuple[State, tuple]:
        (h,) = state
        of_rz, of_n = self._rows()
        w_r, w_z, w_n = np.split(self.ih(x), 3, axis=1)
        u_r, u_z = np.split(self.hh(h, of_rz), 2, axis=1)
        r, z = sigmoid(w_r + u_r), sigmoid(w_z + u_z)
        n = np.tanh(w_n + self.hh(r * h, of_n))
        return ((1.0 - z) * n + z * h,), (x, h, r, z, n)

    def backward(self, d_state: State, saved: tuple) -> tuple[Array, State]:
        x, h, r, z, n = saved
        (dh_new,) = d_state
        of_rz, of_n = self._rows()
        # h' = (1 - z) * n + z * h
        da_z = dh_new * (h - n) * z * (1.0 - z)
        da_n = dh_new * (1.0 - z) * (1.0 - n**2)
        # a_n = w_n + U_n (r * h) + b'_n
        d_reset = self.hh.backward(da_n, r * h, of_n)
        da_r = d_reset * h * r * (1.0 - r)
        dx = self.ih.backward(np.hstack([da_r, da_z, da_n]), x)
        # h acts in three ways: kept by z, reset by r, and in the two gates
        dh = dh_new * z + d_reset * r + self.hh.backward(np.hstack([da_r, da_z]), h, of_rz)
        return dx, (dh,)


# 3. The layers --------------------------------------------------------------------------------------------------------


def through_time(cell: Cell, x: Array, state: State, alive: Mask, steps: range) -> tuple[Array, State, list]:
    """One direction of one layer: x (T, N, I) -> y (T, N, H), the final state, and the tape of saved values.

    `alive` (T, N, 1) is False past the end of a sequence. There the state stands still and the output is 0. So the
    forward direction carries the state of the true end to the last step, and the reverse direction carries the initial
    state down to the true end before it starts.
    """
    y = np.zeros((*x.shape[:2], state[0].shape[1]))
    tape = []
    for t in steps:
        new, saved = cell.forward(x[t], state)
        state = tuple(np.where(alive[t], s_new, s) for s_new, s in zip(new, state, strict=True))
        y[t] = np.where(alive[t], state[0], 0.0)
        tape.append(saved)
    return y, state, tape


def back_through_time(
    cell: Cell, dy: Array, d_state: State, alive: Mask, steps: range, tape: list
) -> tuple[Array, State]:
    """`through_time` in reverse: dy (T, N, H), gradient of the final state -> dx (T, N, I), that of the initial state.

    A hidden state reaches the loss as the output of its step (dy) and through all later steps (d_state): the two add
    up. Where a sequence is not alive the step left its state alone, and so the gradient passes by the step.
    """
    dx = np.zeros((*dy.shape[:2], cell.ih.weight.shape[1]))
    for t, saved in zip(reversed(steps), reversed(tape), strict=True):
        dh, *dc = (np.where(alive[t], d, 0.0) for d in d_state)
        dx[t], d_old = cell.backward((dh + np.where(alive[t], dy[t], 0.0), *dc), saved)
        d_state = tuple(np.where(alive[t], d, passed) for d, passed in zip(d_old, d_state, strict=True))
    return dx, d_state


def _checked(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    """A float64 copy, so that later changes of what was given reach neither the parameters nor the tape."""
    array = np.asarray(value, dtype=np.float64).copy()
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")
    return array


class Layer:
    """A cell over time in `num_layers` stacked layers of one or two directions. Use `RNN`, `LSTM` or `GRU`.

    The arguments mean what they mean in `torch.nn`; there is no dropout. Layer k reads the outputs of layer k-1, both
    directions side by side. `parameters` maps torch's names to arrays: `weight_ih_l{k}` (G*H, I or D*H),
    `weight_hh_l{k}` (G*H, H), `bias_ih_l{k}` and `bias_hh_l{k}` (G*H), with a projection `weight_hr_l{k}` (P, H), each
    again with `_reverse` for the other direction. They start out uniform in +-1/sqrt(H), drawn from
    `numpy.random.default_rng(seed)`. With a projection, P stands for H in the hidden state and in y.

    An argument that does not fit raises ValueError with its name, what was given and what was expected.
    """

    cell_type: type[Cell]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False, *,
        bidirectional: bool = False, proj_size: int = 0, seed: int | np.random.Generator | None = None,
    ):  # fmt: skip
        given = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for name, size in given.items():
            if not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(f"{name}: got {size!r}, expected an integer of at least 1")
        if not isinstance(proj_size, int | np.integer) or not 0 <= proj_size < hidden_size:
            raise ValueError(f"proj_size: got {proj_size!r}, expected an integer from 0 (none) to {hidden_size - 1}")
        if proj_size and self.cell_type is not LSTMCell:
            raise ValueError(f"proj_size: got {proj_size}, expected 0: only an LSTM has a projection")
        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, proj_size or hidden_size
        self.num_layers, self.batch_first, self.directions = num_layers, batch_first, 2 if bidirectional else 1
        self._tape: tuple | None = None

        rng = np.random.default_rng(seed)
        bound = 1.0 / np.sqrt(hidden_size)
        rows = self.cell_type.gates * hidden_size
        self.parameters: dict[str, Array] = {}
        for k in range(num_layers):
            width = input_size if k == 0 else self.directions * self.output_size
            shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, width), "weight_hh": (rows, self.output_size)}
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)} if bias else {}
            shapes |= {"weight_hr": (proj_size, hidden_size)} if proj_size else {}
            for _, suffix, _ in self._passes(k):
                self.parameters |= {name + suffix: rng.uniform(-bound, bound, shapes[name]) for name in shapes}

    def load_state_dict(self, state_dict: Mapping[str, ArrayLike]) -> None:
        """Copy the parameters from a mapping of the same names, such as that of a `torch.nn` layer."""
        if set(state_dict) != set(self.parameters):
            raise ValueError(f"state_dict: got the names {sorted(state_dict)}, expected {sorted(self.parameters)}")
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self.parameters = {n: _checked(f"state_dict[{n!r}]", state_dict[n], shape) for n, shape in shapes.items()}

    def forward(self, x: ArrayLike, state: Any = None, lengths: ArrayLike | None = None) -> tuple[Array, Any]:
        """Run over the sequences: x -> (y, h_n), or for an LSTM (y, (h_n, c_n)).

        x: (T, N, I), with batch_first (N, T, I), or one sequence (T, I).
        state: h_0, or for an LSTM (h_0, c_0), each (num_layers*D, N, H), without N for one sequence; zeros if None.
        lengths: the N sequence lengths, 1 to T in any order; x is not read, and y is 0, past the end of a sequence.

        y is (T, N, D*H) in the layout of x; the final states have the shapes of the initial ones.
        """
        x = np.asarray(x, dtype=np.float64)
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            layout = "(N, T, I)" if self.batch_first else "(T, N, I)"
            raise ValueError(f"x: got shape {x.shape}, expected {layout} or (T, I) with I = {self.input_size}")
        batched = x.ndim == 3
        x = self._time_major(x, batched)
        time, batch = x.shape[:2]
        if time == 0:
            raise ValueError("x: got a sequence length of 0, expected at least 1")
        ends = np.full(batch, time) if lengths is None else np.asarray(lengths)
        if ends.shape != (batch,) or ends.dtype.kind not in "iu" or np.any((ends < 1) | (ends > time)):
            raise ValueError(f"lengths: got {lengths!r}, expected integers from 1 to {time} in shape ({batch},)")
        alive = (np.arange(time)[:, None] < ends)[:, :, None]

        has_cell = "c" in self.cell_type.state_names
        if has_cell and state is not None and not (isinstance(state, tuple | list) and len(state) == 2):
            raise ValueError(f"state: got {type(state).__name__}, expected the pair (h_0, c_0)")
        h_0, c_0 = (None, None) if state is None else state if has_cell else (state, None)
        initial = self._states({"h_0": h_0, "c_0": c_0}, batch, batched)

        final: list[State] = list(initial)
        tapes: list[list] = [[]] * len(initial)
        y = np.where(alive, x, 0.0)  # so that nothing in the padding, not even NaN, gets into a product
        for k in range(self.num_layers):
            outputs = []
            for index, suffix, steps in self._passes(k, time):
                output, final[index], tapes[index] = through_time(self._cell(suffix), y, initial[index], alive, steps)
                outputs.append(output)
            y = np.concatenate(outputs, axis=2)
        self._tape = alive, batched, tapes
        h_n, *c_n = self._stacked(final, batched)
        return self._user_layout(y, batched), (h_n, *c_n) if c_n else h_n

    def backward(
        self, dy: ArrayLike | None = None, dh_n: ArrayLike | None = None, dc_n: ArrayLike | None = None
    ) -> dict[str, Array]:
        """BPTT through the latest `forward`, whose parameters must not have changed since.

        dy, dh_n, dc_n: gradients of the loss with respect to y, h_n and, for an LSTM, c_n; zeros if None.

        Returns the gradients by name: "x", "h_0", for an LSTM "c_0", and every name in `parameters`.
        Raises RuntimeError if there was no `forward`.
        """
        if self._tape is None:
            raise RuntimeError("backward: called before forward")
        if dc_n is not None and "c" not in self.cell_type.state_names:
            raise ValueError("dc_n: got an array, expected None, since this layer has no cell state")
        alive, batched, tapes = self._tape
        time, batch, _ = alive.shape
        d_layer = np.zeros((time, batch, self.directions * self.output_size))
        if dy is not None:
            d_layer = self._time_major(_checked("dy", dy, self._user_layout(d_layer, batched).shape), batched)
        d_final = self._states({"dh_n": dh_n, "dc_n": dc_n}, batch, batched)

        d_initial: list[State] = list(d_final)
        computed: dict[str, Array] = {}
        for k in reversed(range(self.num_layers)):
            d_outputs, d_layer = np.split(d_layer, self.directions, axis=2), np.zeros(())
            for d_output, (index, suffix, steps) in zip(d_outputs, self._passes(k, time), strict=True):
                cell = self._cell(suffix)
                dx, d_initial[index] = back_through_time(cell, d_output, d_final[index], alive, steps, tapes[index])
                d_layer = d_layer + dx  # both directions read the same input
                for kind, affine in (("ih", cell.ih), ("hh", cell.hh), ("hr", cell.hr)):
                    if affine is not None:
                        computed |= {f"weight_{kind}{suffix}": affine.d_weight, f"bias_{kind}{suffix}": affine.d_bias}
        gradients = {"x": self._user_layout(d_layer, batched)}
        gradients |= zip(("h_0", "c_0"), self._stacked(d_initial, batched), strict=False)
        return gradients | {name: computed[name] for name in self.parameters}  # less the biases that are none

    def _passes(self, k: int, time: int = 0) -> list[tuple[int, str, range]]:
        """The directions of layer k: their index among the states, the suffix of their parameters, their steps."""
        forward = (k * self.directions, f"_l{k}", range(time))
        reverse = (k * self.directions + 1, f"_l{k}_reverse", range(time)[::-1])
        return [forward, reverse][: self.directions]

    def _cell(self, suffix: str) -> Cell:
        """The cell of one direction of one layer, with sums of gradients that start at zero."""
        p = self.parameters
        hr = Affine(p["weight_hr" + suffix]) if self.output_size != self.hidden_size else None
        ih, hh = (Affine(p[f"weight_{kind}{suffix}"], p.get(f"bias_{kind}{suffix}")) for kind in ("ih", "hh"))
        return self.cell_type(ih, hh, hr)

    # Inside, sequences are (T, N, features) and states a list of (h,) or (h, c), one for each direction of each layer.

    def _time_major(self, a: Array, batched: bool) -> Array:
        return a[:, None] if not batched else a.swapaxes(0, 1) if self.batch_first else a

    def _user_layout(self, a: Array, batched: bool) -> Array:
        return a[:, 0] if not batched else a.swapaxes(0, 1) if self.batch_first else a

    def _states(self, given: Mapping[str, ArrayLike | None], batch: int, batched: bool) -> list[State]:
        arrays = []
        sizes = {"h": self.output_size, "c": self.hidden_size}
        for state_name, (name, value) in zip(self.cell_type.state_names, given.items(), strict=False):
            shape = (self.num_layers * self.directions, *([batch] if batched else []), sizes[state_name])
            array = np.zeros(shape) if value is None else _checked(name, value, shape)
            arrays.append(array if batched else array[:, None])
        return list(zip(*arrays, strict=True))

    def _stacked(self, states: list[State], batched: bool) -> list[Array]:
        return [np.stack(s) if batched else np.concatenate(s) for s in zip(*states, strict=True)]


class RNN(Layer):
    """The layer of the `TanhCell`, or with nonlinearity="relu" of the `ReluCell`."""

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, **options: Any,
    ):  # fmt: skip
        cells = {"tanh": TanhCell, "relu": ReluCell}
        if nonlinearity not in cells:
            raise ValueError(f"nonlinearity: got {nonlinearity!r}, expected 'tanh' or 'relu'")
        self.cell_type = cells[nonlinearity]
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, **options)


class LSTM(Layer):
    """The layer of the `LSTMCell`; with proj_size=P > 0 its hidden state is a projection of size P."""

    cell_type = LSTMCell


class GRU(Layer):
    """The layer of the `GRUCell`, or with reset_after=False of the `ResetBeforeGRUCell`."""

    def __init__(self, *args: Any, reset_after: bool = True, **options: Any):
        self.cell_type = GRUCell if reset_after else ResetBeforeGRUCell
        super().__init__(*args, **options)
