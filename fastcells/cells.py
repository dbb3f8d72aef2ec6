"""The built-in cells: one page of equations.

x.g = W_g x_t + b_g and u.g = U_g h_{t-1} + b'_g for each gate g; u.g(v) = U_g v + b'_g; s holds the state of the step
before and p the cell's own parameters. * is the elementwise product. Gates are listed in the order of torch's weight
rows.
"""

from .cell import cell
from .expression import exp, maximum, norm, relu, sigmoid, softplus, tanh


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


@cell(gates="i g o", states="h c")
def coupled_lstm(x, u, s):
    """LSTM whose forget gate is what the input gate leaves (Greff et al. 2017, LSTM: A Search Space Odyssey, CIFG)."""
    i = sigmoid(x.i + u.i)
    g = tanh(x.g + u.g)
    o = sigmoid(x.o + u.o)
    c = (1 - i) * s.c + i * g
    return o * tanh(c), c


@cell(gates="f n")
def mgu(x, u, s):
    """Minimal gated unit (Zhou, Wu, Zhang & Zhou 2016): one gate both resets and updates."""
    f = sigmoid(x.f + u.f)
    n = tanh(x.n + u.n(f * s.h))
    return s.h + f * (n - s.h)


@cell(gates="z n")
def ligru(x, u, s):
    """Light gated recurrent unit (Ravanelli, Brakel, Omologo & Bengio 2018).

    Its batch normalisation of W x_t needs no state and stays outside: before the layer, or folded into W and b.
    """
    z = sigmoid(x.z + u.z)
    n = relu(x.n + u.n)
    return n + z * (s.h - n)


@cell(gates="f g")
def janet(x, u, s):
    """Just another network: the LSTM with a forget gate alone (van der Westhuizen & Lasenby 2018), its beta being 1."""
    f = x.f + u.f
    g = tanh(x.g + u.g)
    return sigmoid(f) * s.h + (1 - sigmoid(f - 1)) * g


@cell(gates="g c")
def ugrnn(x, u, s):
    """Update gate network (Collins, Sohl-Dickstein & Sussillo 2017)."""
    g = sigmoid(x.g + u.g)
    c = tanh(x.c + u.c)
    return c + g * (s.h - c)


@cell(gates="z u")
def minimal_rnn(x, u, s):
    """MinimalRNN (Chen 2017): the input is taken into the space of the states, z, and a gate mixes it in there.

    U_u is the paper's U_h and U_z its U_z, which applies to z; of W_u and its bias nothing is used.
    """
    z = tanh(x.z)
    gate = sigmoid(u.u + u.z(z))
    return z + gate * (s.h - z)


@cell(gates="i f g o", states="h c", parameters="peephole_i peephole_f peephole_o")
def peephole_lstm(x, u, s, p):
    """LSTM whose gates see the cell state (Gers, Schraudolph & Schmidhuber 2002)."""
    i = sigmoid(x.i + u.i + p.peephole_i * s.c)
    f = sigmoid(x.f + u.f + p.peephole_f * s.c)
    g = tanh(x.g + u.g)
    c = f * s.c + i * g
    o = sigmoid(x.o + u.o + p.peephole_o * c)
    return o * tanh(c), c


def _gains(gates, more=""):
    return " ".join(f"input_gain_{g}=1 recurrent_gain_{g}=1 offset_{g}=0" for g in gates.split()) + more


def _sums_of_norms(x, u, p, gates):
    """For each gate g, gain * norm(W x)_g + gain' * norm(U h)_g + offset, all the gates being normalised together."""
    names = gates.split()
    xs, us = (norm(*(getattr(v, g) for g in names)) for v in (x, u))
    return [
        getattr(p, f"input_gain_{g}") * a + getattr(p, f"recurrent_gain_{g}") * b + getattr(p, f"offset_{g}")
        for g, a, b in zip(names, xs, us, strict=True)
    ]


@cell(gates="i f g o", states="h c", parameters=_gains("i f g o", " cell_gain=1 cell_offset=0"))
def layer_norm_lstm(x, u, s, p):
    """LSTM with layer normalisation (Ba, Kiros & Hinton 2016). As there with bias=False; a bias is normalised too."""
    i, f, g, o = _sums_of_norms(x, u, p, "i f g o")
    c = sigmoid(f) * s.c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(p.cell_gain * norm(c) + p.cell_offset), c


@cell(
    gates="r z n", parameters=_gains("r z", " input_gain_n=1 recurrent_gain_n=1 input_offset_n=0 recurrent_offset_n=0")
)
def layer_norm_gru(x, u, s, p):
    """Gated recurrent unit with layer normalisation (Ba, Kiros & Hinton 2016; its z is 1 - z here, as in torch's GRU).

    As there with bias=False; a bias is normalised too.
    """
    r, z = _sums_of_norms(x, u, p, "r z")
    proposed = p.recurrent_gain_n * norm(u.n) + p.recurrent_offset_n
    n = tanh(p.input_gain_n * norm(x.n) + p.input_offset_n + sigmoid(r) * proposed)
    return n + sigmoid(z) * (s.h - n)


@cell(gates="h", parameters="recurrent")
def indrnn(x, u, s, p):
    """Independently recurrent network (Li, Li, Cook, Zhu & Gao 2018): each unit sees of the state itself alone."""
    return relu(x.h + p.recurrent * s.h)


@cell(gates="i f z o", states="h c n m")
def slstm(x, u, s):
    """sLSTM (Beck et al. 2024, xLSTM): exponential input gate, normaliser n, stabiliser m, sigmoid forget gate.

    The paper's recurrent weights are block-diagonal by heads; here they are dense, so one head.
    """
    i = x.i + u.i
    f = s.m - softplus(-(x.f + u.f))  # m_{t-1} + log(sigmoid(f))
    z = tanh(x.z + u.z)
    o = sigmoid(x.o + u.o)
    m = maximum(f, i)
    gain, keep = exp(i - m), exp(f - m)
    c = keep * s.c + gain * z
    n = keep * s.n + gain
    return o * c / n, c, n, m
