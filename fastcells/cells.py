"""The built-in cells: one page of equations.

x.g = W_g x_t + b_g and u.g = U_g h_{t-1} + b'_g for each gate g; u.g(v) = U_g v + b'_g; s holds the state of the step
before. * is the elementwise product. Gates are listed in the order of torch's weight rows.
"""

from .cell import cell
from .expression import relu, sigmoid, tanh


@cell(gates="i f g o", states="h c")
def lstm(x, u, s):
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with forget gate (Gers, Schmidhuber & Cummins 2000)."""
    i = sigmoid(x.i + u.i)
    f = sigmoid(x.f + u.f)
    g = tanh(x.g + u.g)
    o = sigmoid(x.o + u.o)
    c = f * s.c + i * g
    return o * tanh(c), c


@cell(gates="r z n")
def gru(x, u, s):
    """Gated recurrent unit (Cho et al. 2014), reset applied after the recurrent product: torch's and cuDNN's form."""
    r = sigmoid(x.r + u.r)
    z = sigmoid(x.z + u.z)
    n = tanh(x.n + r * u.n)
    return n + z * (s.h - n)


@cell(gates="r z n")
def gru_reset_before(x, u, s):
    """Gated recurrent unit of the textbooks, reset applied to the state (Cho et al. 2014; Keras reset_after=False)."""
    r = sigmoid(x.r + u.r)
    z = sigmoid(x.z + u.z)
    n = tanh(x.n + u.n(r * s.h))
    return n + z * (s.h - n)


@cell(gates="h")
def rnn_tanh(x, u, s):
    """Simple recurrent network (Elman 1990)."""
    return tanh(x.h + u.h)


@cell(gates="h")
def rnn_relu(x, u, s):
    """Simple recurrent network with rectified linear units (Le, Jaitly & Hinton 2015)."""
    return relu(x.h + u.h)
