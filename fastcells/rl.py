"""Recurrent policies of stable-baselines3-contrib without the Python loop over time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .convert import convert
from .nn import OverTime

Policy = TypeVar("Policy", bound=torch.nn.Module)


def use_resets(policy: Policy) -> Policy:
    """Make a policy of sb3-contrib's RecurrentPPO reset its state inside the kernels; in place, and returned.

    `_process_sequence` takes a batch in which an episode begins one time step after the other, as a Python loop; here
    it is one call of the layer with `reset`, whose results and gradients are the same up to rounding. The policy's
    layers become fastcells' (see `convert`), with the same parameters, so that saved models load as before. A layer
    that was left, or that `revert` has made torch's again, goes through the policy's own loop.

        model = RecurrentPPO("MlpLstmPolicy", env)
        fastcells.rl.use_resets(model.policy)

    Raises TypeError for a policy without `_process_sequence`.
    """
    if not callable(getattr(policy, "_process_sequence", None)):
        raise TypeError(f"policy must be a recurrent policy of sb3-contrib, got {type(policy).__name__}")
    convert(policy)
    loop: Any = getattr(type(policy), "_process_sequence", policy._process_sequence)
    policy._process_sequence = partial(process_sequence, loop=loop)  # type: ignore[assignment]
    return policy


def process_sequence(
    features: Tensor,
    lstm_states: tuple[Tensor, Tensor],
    episode_starts: Tensor,
    lstm: torch.nn.LSTM,
    *,
    loop: Callable[..., tuple[Tensor, tuple[Tensor, Tensor]]],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `RecurrentActorCriticPolicy._process_sequence` computes. loop: that function, for layers of torch.nn.

    features: [N * T, I], all steps of a sequence side by side. lstm_states: two of [num_layers, N, H]. episode_starts:
    [N * T], 1 where an episode begins, before which the state is zero. Returns ([N * T, H], final states).
    """
    if not isinstance(lstm, OverTime):
        return loop(features, lstm_states, episode_starts, lstm)
    size = lstm_states[0].shape[1]
    x = features.reshape(size, -1, lstm.input_size).transpose(0, 1)
    reset = episode_starts.reshape(size, -1).transpose(0, 1) != 0
    y, final = lstm(x, lstm_states, reset=reset, reset_to=0)
    return y.transpose(0, 1).flatten(0, 1), final
