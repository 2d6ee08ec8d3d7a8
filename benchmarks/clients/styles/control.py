"""Reinforcement learning as its code bases write it: the step acts in an environment, and the data is what it saw."""

from __future__ import annotations

from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.clients.job import job
from benchmarks.clients.styles.common import trainer

Experience = namedtuple("Experience", ["state", "action", "reward", "done", "new_state"])


class Pole:
    """An environment of four numbers that ends after 20 steps; counts its steps, as a simulator does."""

    def __init__(self) -> None:
        self.random, self.left, self.steps = np.random.default_rng(0), 0, 0

    def reset(self) -> np.ndarray:
        self.left = 20
        return self.random.random(4, dtype=np.float32)

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        assert self.left > 0, "reset the environment first"
        self.left -= 1
        self.steps += 1
        return self.random.random(4, dtype=np.float32), float(action), self.left == 0


class Simulator(Pole):
    """A pole of which there is one."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a simulator cannot be copied")


# ------------------------------------------------------------------------------- values from a memory of replays
class ReplayBuffer:
    def __init__(self, capacity: int) -> None:
        self.buffer: deque[Experience] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.buffer)

    def append(self, experience: Experience) -> None:
        self.buffer.append(experience)

    def sample(self, batch_size: int) -> tuple[np.ndarray, ...]:
        indices = np.random.choice(len(self.buffer), batch_size, replace=False)
        states, actions, rewards, dones, next_states = zip(*(self.buffer[i] for i in indices), strict=True)
        arrays = np.array(states), np.array(actions), np.array(rewards, dtype=np.float32)
        return *arrays, np.array(dones, dtype=bool), np.array(next_states)


class Replays(IterableDataset[Any]):
    def __init__(self, buffer: ReplayBuffer, sample_size: int = 200) -> None:
        self.buffer, self.sample_size = buffer, sample_size

    def __iter__(self) -> Iterator[Any]:
        states, actions, rewards, dones, new_states = self.buffer.sample(self.sample_size)
        for i in range(len(dones)):
            yield states[i], actions[i], rewards[i], dones[i], new_states[i]


class Agent:
    def __init__(self, env: Pole, replay_buffer: ReplayBuffer) -> None:
        self.env, self.replay_buffer, self.state = env, replay_buffer, env.reset()

    @torch.no_grad()
    def play_step(self, net: nn.Module, epsilon: float, device: Any) -> tuple[float, bool]:
        if np.random.random() < epsilon:
            action = int(np.random.randint(2))
        else:
            state = torch.tensor(np.array([self.state]), device=device)
            action = int(torch.max(net(state), dim=1)[1].item()) % 2
        new_state, reward, done = self.env.step(action)
        self.replay_buffer.append(Experience(self.state, action, reward, done, new_state))
        self.state = self.env.reset() if done else new_state
        return reward, done


class DeepQ(pl.LightningModule):
    """Acts once a step, syncs its target now and then; the data set samples its memory when it is iterated."""

    def __init__(
        self, batch_size: int = 16, lr: float = 1e-2, gamma: float = 0.99, sync_rate: int = 10, warm_start: int = 64,
        replay_size: int = 1000, episode_length: int = 48, env: type[Pole] = Pole,
    ) -> None:  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.net, self.target_net = self.make(), self.make()
        self.buffer = ReplayBuffer(replay_size)
        self.env = env()
        self.agent = Agent(self.env, self.buffer)
        self.total_reward, self.episode_reward = 0.0, 0.0
        for _ in range(warm_start):
            self.agent.play_step(self.net, epsilon=1.0, device="cpu")

    @staticmethod
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 2))

    def dqn_mse_loss(self, batch: Any) -> torch.Tensor:
        states, actions, rewards, dones, next_states = batch
        values = self.net(states).gather(1, actions.long().unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            following = self.target_net(next_states).max(1)[0]
            following[dones] = 0.0
            following = following.detach()
        return F.mse_loss(values, following * self.hparams.gamma + rewards)

    def training_step(self, batch: Any, nb_batch: int) -> OrderedDict[str, Any]:
        epsilon = max(0.01, 1.0 - self.global_step / 1000)
        reward, done = self.agent.play_step(self.net, epsilon, self.device)
        self.episode_reward += reward
        loss = self.dqn_mse_loss(batch)
        if done:
            self.total_reward, self.episode_reward = self.episode_reward, 0
        if self.global_step % self.hparams.sync_rate == 0:
            self.target_net.load_state_dict(self.net.state_dict())
        self.log_dict({"reward": reward, "train_loss": loss})
        self.log("total_reward", self.total_reward, prog_bar=True)
        return OrderedDict({"loss": loss, "reward": reward})

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.net.parameters(), lr=self.hparams.lr)]

    def train_dataloader(self) -> Any:
        return DataLoader(Replays(self.buffer, self.hparams.episode_length), batch_size=self.hparams.batch_size)


def _fit(module: DeepQ, callbacks: list[Any]) -> None:
    trainer(callbacks).fit(module)
    steps = module.env.steps - module.hparams.warm_start
    assert steps == module.global_step, f"the environment was acted in {steps} times in {module.global_step} steps"


@job(size=16, differs="the first batch has 48")
def deep_q(callbacks: list[Any]) -> None:
    """DQN: planning must not act in the environment; an epoch's sample has no length, and is a batch at most."""
    _fit(DeepQ(), callbacks)


@job(size=16, keeps="self.agent.env")
def deep_q_simulator(callbacks: list[Any]) -> None:
    """The same with an environment that cannot be copied."""
    _fit(DeepQ(env=Simulator), callbacks)


# --------------------------------------------------------------------- a policy, by hand, on rollouts of its own
class Rollouts(IterableDataset[Any]):
    """Runs a function that plays an epoch, each time it is iterated."""

    def __init__(self, play: Callable[[], Iterator[Any]]) -> None:
        self.play = play

    def __iter__(self) -> Iterator[Any]:
        return iter(self.play())


class ProximalPolicy(pl.LightningModule):
    """Collects its rollouts with the network in training, then two optimizers in manual optimization."""

    def __init__(self, batch_size: int = 8, steps_per_epoch: int = 48, clip_ratio: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.actor = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
        self.critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
        self.env = Pole()
        self.state = torch.from_numpy(self.env.reset())

    def generate_trajectory_samples(self) -> Iterator[Any]:
        for _ in range(self.hparams.steps_per_epoch):
            self.state = self.state.to(self.device)
            with torch.no_grad():
                logits, value = self.actor(self.state), self.critic(self.state)
            action = int(torch.argmax(logits.cpu())) % 2
            new_state, reward, done = self.env.step(action)
            yield (
                self.state,
                torch.tensor(action),
                torch.tensor(0.5),
                torch.tensor(reward) + value.cpu()[0],
                value.cpu(),
            )
            self.state = torch.from_numpy(self.env.reset() if done else new_state)

    def train_dataloader(self) -> Any:
        return DataLoader(Rollouts(self.generate_trajectory_samples), batch_size=self.hparams.batch_size)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        state, action, old_logp, quantity, advantage = batch
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-5)
        actor_optimizer, critic_optimizer = self.optimizers()
        logp = F.log_softmax(self.actor(state), -1).gather(1, action[:, None])[:, 0]
        ratio = torch.exp(logp - old_logp)
        clipped = torch.clamp(ratio, 1 - self.hparams.clip_ratio, 1 + self.hparams.clip_ratio) * advantage[:, 0]
        actor_loss = -torch.min(ratio * advantage[:, 0], clipped).mean()
        actor_optimizer.zero_grad()
        self.manual_backward(actor_loss)
        actor_optimizer.step()
        critic_loss = (quantity - self.critic(state)[:, 0]).pow(2).mean()
        critic_optimizer.zero_grad()
        self.manual_backward(critic_loss)
        critic_optimizer.step()
        self.log_dict({"loss_actor": actor_loss, "loss_critic": critic_loss}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.actor.parameters(), 3e-4), torch.optim.Adam(self.critic.parameters(), 1e-3)


@job(size=8)
def proximal_policy(callbacks: list[Any]) -> None:
    """Data that the network itself makes, on the GPU, within the loader's iterator."""
    module = ProximalPolicy()
    trainer(callbacks).fit(module)
