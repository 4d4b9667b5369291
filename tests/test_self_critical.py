"""Self-critical learning: recorded values, both ways of sampling, words a step; and what a step costs."""
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from as_published import as_published, sample_with_gradient
from expnet.data.vocabulary import Vocab
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.score.reward import spoken
from expnet.tools import seed_all
from expnet.train.self_critical import advantage, log_policy, policy_gradient, say, say_coupled, score_words, self_critical
from toy import Cheap

GOLDEN = Path(__file__).parent / "golden"
SPECIALS = ["EOS", "PAD", "SOS", "UNK"]
VOCAB = Vocab([*SPECIALS, *(f"w{i}" for i in range(12))])
measured = pytest.mark.skipif(not os.environ.get("EXPNET_MEASURE"), reason="set EXPNET_MEASURE=1 to measure time and memory")


class Length:
    "A reward that needs no references: the number of words before EOS."
    signature = "length"
    def __call__(self, ids, tokens): return (spoken(tokens, VOCAB).sum(-1)).numpy().astype(float)


def net(K: int = 1, dropout: float = 0.0) -> ExpansionNet:
    seed_all(1)
    config = ExpansionNetConfig(6, 32, 2, 64, 1, 2, (4, 8), 4, max_len=13, dropout=dropout, K=K)
    model = ExpansionNet(config, VOCAB)
    model.head.weight.data *= 3
    return model


def test_baseline_and_loss_of_the_published_code():
    wanted = json.loads((GOLDEN / "reference_a.json").read_text())["reward"]
    rewards = torch.tensor(wanted["reward"], dtype=torch.float64)
    better = advantage(rewards)
    assert (rewards - better - torch.tensor(wanted["baseline"], dtype=torch.float64)).abs().max() < 1e-9
    logp = torch.tensor(wanted["logp"])                                                       # recorded without zeros behind the end
    loss = policy_gradient(logp, torch.ones_like(logp, dtype=torch.bool), better)
    assert abs(loss.item() - wanted["loss"]) < 1e-5


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("coupled", [False, True])
def test_words_behind_the_end_get_no_gradient(K, coupled):
    model = net(K)
    model.head.weight.data /= 3
    model.head.bias.data[VOCAB.eos] += 1                                                      # so that most samples end early
    memory = model.encode(torch.randn(3, 4, 6))
    if coupled: tokens, every = say_coupled(model, memory, 4, 9)
    else:
        tokens = say(model, memory, 4, 9)
        every = score_words(model, memory, tokens)
    every.retain_grad()
    said = spoken(tokens, VOCAB)
    assert said.any() and not said.all() and (tokens[~said] == VOCAB.pad).all() and tokens.shape[-1] <= 9
    policy_gradient(every.gather(-1, tokens[..., None])[..., 0], said, advantage(torch.rand(3, 4))).backward()
    assert (every.grad[~said] == 0).all() and (every.grad[said].abs().sum(-1) > 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_critic_is_asked_word_by_word_and_its_values_come_back():
    "Advantage = return - value at every said word; the value is a constant for the actor, and has its gradient for its own loss."
    model, worth = net().eval(), torch.nn.Parameter(torch.tensor(0.25))
    memory = model.encode(torch.randn(3, 4, 6))
    values = lambda memory, tokens, rewards: worth.expand(tokens.shape)
    torch.manual_seed(0)
    learnt = self_critical(model, memory, ["a", "b", "c"], Length(), n=2, max_len=8, baseline=values, discount=0.5)
    said = spoken(learnt.tokens, VOCAB)
    lengths = said.sum(-1)
    for b, i in [(b, i) for b in range(3) for i in range(2)]:
        T = int(lengths[b, i])
        wanted = torch.tensor([0.5**(T - 1 - t) * float(learnt.rewards[b, i]) for t in range(T)])
        assert (learnt.returns[b, i, :T] - wanted).abs().max() < 1e-6
    assert (learnt.advantage - (learnt.returns - 0.25).masked_fill(~said, 0)).abs().max() < 1e-6
    assert torch.autograd.grad(learnt.loss, worth, retain_graph=True, allow_unused=True)[0] is None
    (slope,) = torch.autograd.grad((learnt.values[said] - learnt.returns[said]).square().mean(), worth)
    assert abs(slope - 2 * (0.25 - learnt.returns[said].mean())) < 1e-5


def test_a_discount_keeps_the_baseline_whole():
    "With siblings as baseline only the score is discounted: a baseline times a power of the length to come would depend on later words."
    model = net().eval()
    memory = model.encode(torch.randn(3, 4, 6))
    torch.manual_seed(0)
    learnt = self_critical(model, memory, ["a", "b", "c"], Length(), n=3, max_len=8, discount=0.9)
    said, base = spoken(learnt.tokens, VOCAB), learnt.rewards - advantage(learnt.rewards)
    assert (learnt.advantage - (learnt.returns - base[..., None])).masked_fill(~said, 0).abs().max() < 1e-5


@pytest.mark.parametrize("K", [1, 2, 3])
def test_both_ways_give_the_same_probabilities_without_dropout(K):
    model = net(K).eval()
    memory = model.encode(torch.randn(3, 4, 6))
    tokens, every = say_coupled(model, memory, 4, 9)
    said, again = spoken(tokens, VOCAB), score_words(model, memory, tokens)
    assert (every[said].exp() - again[said].exp()).abs().max() < 1e-5
    assert (every[said].exp().sum(-1) - 1).abs().max() < 1e-5


def test_samples_follow_the_policy():
    "First words of many samples against the probabilities that are learned: chi-square."
    model = net().eval()
    with torch.no_grad():
        memory = model.encode(torch.randn(1, 4, 6))
        p = log_policy(model(memory, torch.full((1, 1), VOCAB.sos)), VOCAB).exp()[0, 0]
        seed_all(5)
        for first in (say(model, memory, 4000, 1), say_coupled(model, memory, 4000, 1)[0]):
            expected = 4000 * p[p > 0]
            seen = torch.bincount(first.flatten(), minlength=len(VOCAB))[p > 0]
            assert float(((seen - expected) ** 2 / expected).sum()) < 40                       # 13 degrees of freedom: above with p < 0.001


@pytest.mark.parametrize("options", [{}, {"baseline": "greedy"}, {"baseline": "batch_mean"}, {"bonus": 0.01}, {"per": "word"}, {"coupled": True},
                                     {"temperature": 0.7}, {"baseline": lambda memory, tokens, rewards: torch.zeros(tokens.shape)}])
def test_a_reward_for_length_makes_sentences_longer(options):
    model = net(dropout=0.1)
    model.head.bias.data[VOCAB.eos] += 3
    x, ids = torch.randn(4, 4, 6), list("abcd")
    optimiser, lengths = torch.optim.Adam(model.parameters(), 1e-3), []
    for _ in range(20):
        learnt = self_critical(model, model.encode(x), ids, Length(), max_len=8, **options)
        optimiser.zero_grad(); learnt.loss.backward(); optimiser.step()
        lengths.append(float(learnt.rewards.mean()))
    assert learnt.logp.shape == learnt.tokens.shape and not learnt.logp.requires_grad and learnt.rewards.shape == (4, 5)
    assert lengths[0] < 6.5 and np.mean(lengths[-5:]) > 7.5
    assert model.training and all(m.training for m in model.modules())


# --- what it costs (EXPNET_MEASURE=1)

X = torch.randn(8, 144, 1536, generator=torch.Generator().manual_seed(0))
IDS = [str(i) for i in range(8)]


def full_size() -> ExpansionNet:
    "The published sizes and dropout of the RL phases; its samples never end early (random weights say EOS once in 10,000 words)."
    seed_all(0)
    return ExpansionNet(ExpansionNetConfig(dropout=0.1), Vocab([*SPECIALS, *(f"w{i}" for i in range(9_996))]))


def step_here(model: ExpansionNet, coupled: bool = False) -> None:
    "One step of this package, with its gradient."
    model.zero_grad()
    self_critical(model, model.encode(X), IDS, Cheap(), 5, 20, coupled=coupled).loss.backward()


def step_published(model: ExpansionNet) -> None:
    "One step the published way: sampling with gradient, the whole decoder for every word, on five copies of the regions."
    model.zero_grad()
    memory = model.encode(X)
    tokens, logp = sample_with_gradient(model, memory, 5, 20)
    better = advantage(torch.as_tensor(Cheap()(IDS, tokens.view(8, 5, -1))))
    policy_gradient(logp.view(8, 5, -1), torch.ones(8, 5, 20, dtype=torch.bool), better).backward()


def cpu(step, *given) -> float:
    start = time.process_time()
    step(*given)
    return time.process_time() - start


def peak_gb() -> float:
    "The most memory this process has held (`ru_maxrss` would count that of the process which started it)."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM"))


def report(what: str) -> None:
    "In a process of its own: CPU seconds a step, and the highest memory, as JSON."
    torch.set_num_threads(1)
    ours, theirs = full_size(), as_published(full_size()) if what == "all" else None
    found = {"here": [], "coupled": [], "published": []}
    cpu(step_here, ours)
    for _ in range(3):
        found["here"].append(cpu(step_here, ours))
        if what == "all" and not found["published"]:                                          # half a minute each: once is enough
            found["published"].append(cpu(step_published, theirs))
            found["coupled"].append(cpu(step_here, ours, True))
    seconds = {name: statistics.median(values) for name, values in found.items() if values}
    print(json.dumps({"seconds": seconds, "peak_gb": peak_gb()}))


@measured
def test_cost_of_a_step():
    "Ten gigabytes are needed for the published way."
    one, both = (json.loads(subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, check=True).stdout)
                 for what in ("here", "all"))
    print("here alone:", one, "interleaved:", both)
    assert one["peak_gb"] <= 2.2
    assert both["seconds"]["published"] / both["seconds"]["here"] >= 6


if __name__ == "__main__": report(sys.argv[1])
