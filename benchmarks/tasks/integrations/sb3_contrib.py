"""stable-baselines3-contrib's RecurrentPPO, with `fastcells.rl.use_resets` in place of its loop over time."""

from __future__ import annotations

from time import perf_counter

from sb3_contrib import RecurrentPPO

import fastcells
from benchmarks.tasks.integrations.training import Epoch, Integration
from fastcells.convert import Conversion


class Model(Integration):
    """An epoch is one rollout and the updates that it is used for."""

    model_name = "RecurrentPPO, an LSTM each for actor and critic"

    def __init__(self, seed: int, hidden: int = 128, steps: int = 256) -> None:
        self.steps = steps
        self.model = RecurrentPPO(
            "MlpLstmPolicy", "CartPole-v1", n_steps=steps, batch_size=steps // 2, n_epochs=4, seed=seed, device="cpu",
            policy_kwargs={"lstm_hidden_size": hidden},
        )  # fmt: skip
        self.module = self.model.policy

    def convert(self) -> Conversion:
        conversion = super().convert()
        fastcells.rl.use_resets(self.model.policy)
        return conversion

    def epoch(self) -> Epoch:
        began = perf_counter()
        self.model.learn(self.steps, reset_num_timesteps=False)
        seconds = perf_counter() - began
        return Epoch([float(self.model.logger.name_to_value["train/value_loss"])], seconds)
