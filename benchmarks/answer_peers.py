"""What people would train with instead: the other contenders of answer.py, each with a policy of its own.

- stable-baselines3's PPO, with its own MlpPolicy, and with a transformer over the window of bars (torch's layers).
- CleanRL's PPO, written again from its single file ppo.py (MIT licence), as it is no package to install: two
  towers of 64, orthogonal weights, Adam with epsilon 1e-5 and a rate that falls to zero, 4 passes of 4
  minibatches, advantages normalised by minibatch, clipped values, episodes that are cut taken as ended.
- PufferLib's own trainer (PuffeRL of 3.0.0), its Default policy in its LSTM wrapper, its settings but for the
  sizes. PyPI has its source alone, which cannot be built without the games that it fetches, as ``setup.py`` then
  misses a name: unpack it, add ``c_extension_paths = []``, and run ``NO_OCEAN=1 python setup.py build_torch
  --inplace`` with no nvcc on the path. It takes part where ``import pufferlib`` works, which also needs
  ``heavyball==2.0.0`` (later ones have no ForeachMuon), ``pyro-ppl`` and ``rich_argparse``.

All train on the vectorized environment at once, with the discount, rewards' scale and growing costs of ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.answer import Accounts, KnownMarket, Training

WIDTH, LAYERS, HEADS = 64, 2, 4


# --- stable-baselines3 ------------------------------------------------------------------------------------


def stable_baselines3(
    known: KnownMarket,
    policy: str = "MLP",
    num_envs: int = 64,
    context: int = 16,
    steps: int = 128,
    batch: int = 1_024,
    passes: int = 4,
    rate: float = 3e-4,
    entropy: float = 0.0,
    cost_ramp: int = 500_000,
    **given: Any,
) -> Training:
    """Train with stable_baselines3.PPO; rates, passes and the rest default to its own."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import VecEnv

    class Adapter(VecEnv):
        """Our vectorized environment as theirs."""

        def __init__(self, accounts: Accounts) -> None:
            self.inner, self.scale = accounts.training, accounts.reward_scale
            super().__init__(
                self.inner.num_envs, self.inner.single_observation_space, self.inner.single_action_space
            )

        def reset(self) -> np.ndarray:
            return self.inner.reset()[0]

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = actions

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
            observations, rewards, terminated, truncated, infos = self.inner.step(self.actions)
            ended = terminated | truncated
            details: list[dict] = [{} for _ in range(self.num_envs)]
            for number in np.flatnonzero(ended):
                details[number] = {
                    "terminal_observation": infos["final_obs"][number],
                    "TimeLimit.truncated": not terminated[number],
                }
            return observations, (rewards * self.scale).astype(np.float32), ended, details

        def close(self) -> None: ...

        def get_attr(self, attr_name: str, indices: Any = None) -> list:
            return [None] * self.num_envs

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise NotImplementedError

        def env_method(self, method_name: str, *arguments: Any, indices: Any = None, **named: Any) -> list:
            raise NotImplementedError

        def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
            return [False] * self.num_envs

    class Transformer(BaseFeaturesExtractor):
        """torch's own encoder over the window, causal and pre-norm, and the account beside it."""

        def __init__(self, space: gymnasium.spaces.Box, num_features: int) -> None:
            self.bars = context + 1
            num_account = space.shape[0] - self.bars * num_features
            super().__init__(space, WIDTH + num_account)
            self.num_features = num_features
            self.embed = nn.Linear(num_features, WIDTH)
            self.positions = nn.Parameter(torch.zeros(self.bars, WIDTH))
            layer = nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
            )
            norm = nn.LayerNorm(WIDTH)
            self.encoder = nn.TransformerEncoder(layer, LAYERS, norm, enable_nested_tensor=False)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(self.bars))

        def forward(self, observations: Tensor) -> Tensor:
            bars, account = observations.tensor_split([self.bars * self.num_features], dim=1)
            x = self.embed(bars.unflatten(1, (self.bars, self.num_features))) + self.positions
            return torch.cat((self.encoder(x, mask=self.mask, is_causal=True)[:, -1], account), dim=1)

    accounts = Accounts(known, num_envs, context, cost_ramp)
    arguments: dict[str, Any] = {}
    if policy == "transformer":
        arguments = {
            "features_extractor_class": Transformer,
            "features_extractor_kwargs": {"num_features": accounts.training.env.market.num_features},
            "net_arch": {"pi": [WIDTH], "vf": [WIDTH]},
        }
    model = PPO(
        "MlpPolicy",
        Adapter(accounts),
        learning_rate=rate,
        n_steps=steps,
        batch_size=batch,
        n_epochs=passes,
        gamma=accounts.gamma,
        gae_lambda=accounts.gae_lambda,
        ent_coef=entropy,
        policy_kwargs=arguments,
        seed=known.seed,
        device="cpu",
        **given,
    )

    def act(observations: np.ndarray) -> np.ndarray:
        return model.predict(observations, deterministic=True)[0]

    while True:
        accounts.grow_costs(model.num_timesteps)
        model.learn(num_envs * steps, reset_num_timesteps=False)
        yield model.num_timesteps, partial(accounts.examine, act)


# --- CleanRL ----------------------------------------------------------------------------------------------


def orthogonal(inputs: int, outputs: int, gain: float = 2.0**0.5) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def tower(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    hidden = (orthogonal(inputs, WIDTH), nn.Tanh(), orthogonal(WIDTH, WIDTH), nn.Tanh())
    return nn.Sequential(*hidden, orthogonal(WIDTH, outputs, gain))


def cleanrl(
    known: KnownMarket,
    num_envs: int = 64,
    context: int = 16,
    steps: int = 128,
    minibatches: int = 4,
    passes: int = 4,
    rate: float = 2.5e-4,
    entropy: float = 0.01,
    clip: float = 0.2,
    transitions: int = 10_000_000,
    cost_ramp: int = 500_000,
) -> Training:
    """Train as CleanRL's ppo.py does; ``transitions`` is where its rate would reach zero."""
    torch.manual_seed(known.seed)
    accounts = Accounts(known, num_envs, context, cost_ramp)
    size, choices = accounts.training.single_observation_space.shape[0], 3
    actor, critic = tower(size, choices, 0.01), tower(size, 1, 1.0)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=rate, eps=1e-5)
    observations = torch.empty(steps, num_envs, size)
    actions = torch.empty(steps, num_envs, dtype=torch.int64)
    log_chances, rewards, ended, values = torch.empty(4, steps, num_envs).unbind()
    now, now_ended, done = torch.from_numpy(accounts.training.reset()[0]), torch.zeros(num_envs), 0

    def act(seen: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return actor(torch.from_numpy(seen)).argmax(1).numpy()

    while done < transitions:
        accounts.grow_costs(done)
        optimizer.param_groups[0]["lr"] = rate * (1.0 - done / transitions)
        with torch.no_grad():
            for t in range(steps):
                observations[t], ended[t] = now, now_ended
                chances = torch.distributions.Categorical(logits=actor(now))
                actions[t] = chances.sample()
                log_chances[t], values[t] = chances.log_prob(actions[t]), critic(now).flatten()
                seen, reward, terminated, truncated, _ = accounts.training.step(actions[t].numpy())
                rewards[t] = torch.from_numpy(reward * accounts.reward_scale)
                now = torch.from_numpy(seen)
                now_ended = torch.from_numpy((terminated | truncated).astype(np.float32))
            advantages, last = torch.empty(steps, num_envs), torch.zeros(num_envs)
            following, goes_on = critic(now).flatten(), 1.0 - now_ended
            for t in reversed(range(steps)):
                surprise = rewards[t] + accounts.gamma * following * goes_on - values[t]
                last = surprise + accounts.gamma * accounts.gae_lambda * goes_on * last
                advantages[t], following, goes_on = last, values[t], 1.0 - ended[t]
        done += num_envs * steps
        rows = [x.flatten(0, 1) for x in (observations, actions, log_chances, advantages, values)]
        for _ in range(passes):
            for batch in torch.randperm(num_envs * steps).chunk(minibatches):
                seen, chosen, old, advantage, value = (x[batch] for x in rows)
                chances = torch.distributions.Categorical(logits=actor(seen))
                ratio = (chances.log_prob(chosen) - old).exp()
                returns = advantage + value
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                gain = torch.min(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
                new = critic(seen).flatten()
                near = value + (new - value).clamp(-clip, clip)
                error = torch.max((new - returns) ** 2, (near - returns) ** 2).mean()
                loss = 0.5 * 0.5 * error - gain - entropy * chances.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
        yield done, partial(accounts.examine, act)


# --- PufferLib --------------------------------------------------------------------------------------------


def pufferlib(
    known: KnownMarket,
    num_envs: int = 256,
    context: int = 1,
    transitions: int = 10_000_000,
    cost_ramp: int = 500_000,
    width: int = 64,
    **given: Any,
) -> Training:
    """Train with PuffeRL; ``given`` replaces settings of default.ini, ``transitions`` is where its rate ends."""
    import configparser
    from ast import literal_eval
    from pathlib import Path

    import pufferlib.models
    import pufferlib.pufferl

    pufferlib.pufferl.ADVANTAGE_CUDA = False  # it takes any nvcc on the path for a GPU
    accounts = Accounts(known, num_envs, context, cost_ramp)
    inner = accounts.training

    class Adapter:
        """Our vectorized environment as theirs."""

        single_observation_space = observation_space = inner.single_observation_space
        single_action_space = inner.single_action_space
        num_agents = agents_per_batch = num_envs

        def async_reset(self, seed: int) -> None:
            none = np.zeros(num_envs, bool)
            self.last = inner.reset(seed=seed)[0], np.zeros(num_envs, np.float32), none, none

        def recv(self) -> tuple:
            return *self.last, [], np.arange(num_envs), np.ones(num_envs, bool)

        def send(self, actions: np.ndarray) -> None:
            observations, rewards, *ends, _ = inner.step(actions)
            self.last = observations, (rewards * accounts.reward_scale).astype(np.float32), *ends

    file = configparser.ConfigParser()
    file.read(Path(pufferlib.__file__).parent / "config" / "default.ini")
    config: dict[str, Any] = {}
    for name, value in file["train"].items():
        config[name] = value
        with contextlib.suppress(ValueError, SyntaxError):
            config[name] = literal_eval(value)
    config |= {
        "device": "cpu",
        "seed": known.seed,
        "use_rnn": True,
        "total_timesteps": transitions,
        "checkpoint_interval": 10**9,
        "gamma": accounts.gamma,
        "gae_lambda": accounts.gae_lambda,
        **given,
    }
    torch.manual_seed(known.seed)
    adapter = Adapter()
    policy = pufferlib.models.LSTMWrapper(adapter, pufferlib.models.Default(adapter, width), width, width)

    class Trainer(pufferlib.pufferl.PuffeRL):
        """Without its dashboard."""

        def print_dashboard(self, *_: Any, **__: Any) -> None: ...

    trainer = Trainer(config, adapter, policy)
    trainer.utilization.stopped = True  # a thread that measures the machine

    def examine() -> tuple[float, float]:
        state: dict[str, Any] = {}
        bar = 0

        def act(observations: np.ndarray) -> np.ndarray:
            nonlocal bar
            if bar % config["bptt_horizon"] == 0:  # as it was trained: from nothing in each of them
                state.update(lstm_h=None, lstm_c=None)
            bar += 1
            with torch.no_grad():
                return policy.forward_eval(torch.from_numpy(observations), state)[0].argmax(1).numpy()

        return accounts.examine(act)

    while trainer.global_step + num_envs * config["bptt_horizon"] < transitions:
        accounts.grow_costs(trainer.global_step)
        trainer.evaluate()
        trainer.train()
        yield trainer.global_step, examine


CONTENDERS: dict[str, Callable[..., Training]] = {
    "stable-baselines3, MLP": stable_baselines3,
    "stable-baselines3, transformer": partial(stable_baselines3, policy="transformer"),
    "CleanRL": cleanrl,
    "PufferLib, LSTM": pufferlib,
}
