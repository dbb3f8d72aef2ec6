"""Recurrent policies of stable-baselines3-contrib: the same numbers as that library's loop over time."""

import copy

import pytest
import torch

import fastcells

sb3_contrib = pytest.importorskip("sb3_contrib")
from sb3_contrib.common.recurrent.type_aliases import RNNStates  # noqa: E402


def trainer(**options):
    return sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy", "CartPole-v1", n_steps=96, batch_size=96, n_epochs=2, seed=0, device="cpu",
        policy_kwargs={"lstm_hidden_size": 16, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"enable_critic_lstm": False, "shared_lstm": True}, {"n_lstm_layers": 2}],
    ids=["two", "shared", "deep"],
)
def test_losses_and_gradients(options):
    """Of a batch in which episodes begin anywhere, from a carried state."""
    theirs = trainer(**options).policy
    ours = fastcells.rl.use_resets(copy.deepcopy(theirs))
    generator = torch.Generator().manual_seed(1)
    size, steps, layers = 3, 20, options.get("n_lstm_layers", 1)
    observations = torch.randn(size * steps, 4, generator=generator)
    actions = torch.randint(2, (size * steps,), generator=generator)
    starts = (torch.rand(size * steps, generator=generator) < 0.2).float()
    states = RNNStates(*(tuple(torch.randn(2, layers, size, 16, generator=generator)) for _ in range(2)))
    results = []
    for policy in (ours, theirs):
        values, log_probability, entropy = policy.evaluate_actions(observations, actions, states, starts)
        loss = values.square().mean() - log_probability.mean() - 0.1 * entropy.mean()
        policy.zero_grad()
        loss.backward()
        results.append([loss, values, log_probability, *(p.grad for p in policy.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_training():
    """Collecting and learning: the same rewards, losses and parameters."""
    models = []
    for use in (fastcells.rl.use_resets, lambda policy: policy):
        model = trainer()  # seeds torch's generator
        use(model.policy)
        models.append(model.learn(192))
    ours, theirs = (model.logger.name_to_value for model in models)
    assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    assert ours["train/value_loss"] == pytest.approx(theirs["train/value_loss"], rel=1e-4)
    for (name, a), b in zip(models[0].policy.named_parameters(), models[1].policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_layers_that_are_torchs_again_go_through_the_policys_own_loop():
    theirs = trainer().policy
    ours = copy.deepcopy(fastcells.rl.use_resets(copy.deepcopy(theirs)))
    fastcells.revert(ours)
    observations, actions = torch.randn(8, 4), torch.randint(2, (8,))
    starts = torch.tensor([0.0, 0, 1, 0, 1, 0, 0, 1])
    states = RNNStates(*(tuple(torch.randn(2, 1, 2, 16)) for _ in range(2)))
    results = [policy.evaluate_actions(observations, actions, states, starts) for policy in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_what_is_no_recurrent_policy():
    with pytest.raises(TypeError, match="policy must be a recurrent policy of sb3-contrib, got Linear"):
        fastcells.rl.use_resets(torch.nn.Linear(1, 1))
