"""The one differentiable call (interim: torch's own implementation behind the final signature)."""
import torch
from torch import Tensor, _VF


def refusal(*tensors: Tensor) -> str | None:
    """Why the engine does not take these tensors here and now, or None where it does."""
    for t in tensors:
        if t.device.type != "cpu":
            return f"device {t.device}"
        if t.dtype not in (torch.float32, torch.float64):
            return f"dtype {t.dtype}"
    return None


def layer(cell, x, states, parameters, batch_sizes=None):
    flat = [w for p in parameters for w in p if w is not None]
    n = int(batch_sizes[0]) if batch_sizes is not None else x.shape[1]
    d = len(parameters)
    h = parameters[0][1].shape[0] // {"lstm": 4, "gru": 3}.get(cell.name, 1)
    if states is None:
        sizes = [parameters[0][1].shape[1], h][: 2 if cell.name == "lstm" else 1]
        states = tuple(x.new_zeros(d, n, s) for s in sizes)
    f = getattr(_VF, cell.name)
    hx = list(states) if len(states) > 1 else states[0]
    bias = parameters[0][2] is not None
    if batch_sizes is None:
        y, *s = f(x, hx, flat, bias, 1, 0.0, False, d == 2, False)
    else:
        y, *s = f(x, batch_sizes, hx, flat, bias, 1, 0.0, False, d == 2)
    return y, tuple(s)
