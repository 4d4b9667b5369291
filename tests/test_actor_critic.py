"""Actor and critic: the contract, who learns from what, faults of the original that must not come back; and what the world says."""
import copy
import os
import statistics
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from expnet.classics.actor_critic import RECIPES, ActorCritic, ActorCriticConfig, Shaped, act, mixed_bleu
from expnet.data.batches import Batch, Batches
from expnet.data.captions import Item
from expnet.data.vocabulary import Vocab
from expnet.decode.caption import caption_stored
from expnet.decode.search import Beam, Greedy, decode
from expnet.models.backbone import make_backbone
from expnet.models.captioner import unroll
from expnet.score.evaluate import evaluate
from expnet.score.reward import References, spoken
from expnet.tools import seed_all
from expnet.train.checkpoints import load, save_model
from expnet.train.recipes import evaluate_split, extract, open_data, prepare_world, train
from expnet.train.self_critical import say, score_words
from expnet.train.step import Learner, Phase, training_mode

SPECIALS = ["EOS", "PAD", "SOS", "UNK"]
VOCAB = Vocab([*SPECIALS, *(f"w{i}" for i in range(12))])
measured = pytest.mark.skipif(not os.environ.get("EXPNET_MEASURE"), reason="set EXPNET_MEASURE=1 to train on the world: 10 CPU-minutes")
PICTURES = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
SCORES = "expnet.classics.actor_critic:A2C"
ITEMS = [Item(id, "", "train", (f"w0 w1 w{k}", f"w{k} w1")) for k, id in enumerate("abc")]
REWARD = mixed_bleu(References.build(ITEMS, VOCAB))


def small(**changes) -> ActorCritic:
    seed_all(3)
    return ActorCritic(ActorCriticConfig(6, words=8, hidden=12, attention=5, critic=16, max_len=13, dropout=0.0, **changes), VOCAB)


def lesson(model: ActorCritic, epoch: int = 0, n: int = 3) -> dict[str, torch.Tensor]:
    "What one lesson, the same each time, says of three pictures."
    torch.manual_seed(5)
    batch = Batch(["a", "b", "c"], PICTURES, torch.ones(3, 4, dtype=torch.bool), torch.empty(0, 0, dtype=torch.long), epoch=epoch)
    return act(model, model.encode(PICTURES), batch, Phase("a2c", SCORES, samples=n, sample_len=8), REWARD)


def test_all_words_at_once_equal_one_after_the_other():
    model = small().eval()
    with torch.no_grad():
        memory = model.encode(PICTURES)
        tokens = torch.randint(0, len(VOCAB), (6, 9))
        assert (model(memory, tokens).log_softmax(-1) - unroll(model, memory, tokens)).abs().max() < 1e-5


def test_the_critic_learns_from_the_actor_and_changes_nothing_in_it():
    "The actor's gradient is the same whatever the critic's error weighs; the critic's comes from that error alone."
    slopes = {}
    for weight in (0.0, 5.0):
        model = small(value=weight)
        lesson(model)["loss"].backward()
        slopes[weight] = {name: p.grad for name, p in model.named_parameters()}
    for name, slope in slopes[0.0].items():
        if name.startswith("critic"): assert not slope.any() and slopes[5.0][name].any(), name
        else: assert slope.equal(slopes[5.0][name]) and slope.any(), name


def test_the_actor_stands_still_while_only_the_critic_learns():
    model = small()
    before = copy.deepcopy(model.state_dict())
    learner = Learner(model, Phase("a2c", SCORES, ("critic",), samples=3, sample_len=8), "cpu", REWARD)
    training_mode(model)
    learner.step(Batch(["a", "b", "c"], PICTURES, torch.ones(3, 4, dtype=torch.bool), torch.empty(0, 0, dtype=torch.long)), 5e-4)
    changed = {name for name, w in model.state_dict().items() if not w.equal(before[name])}
    assert changed == {name for name in before if name.startswith("critic")}


def test_words_behind_the_end_teach_nobody():
    "Whatever the critic thinks of the padding, its error and both gradients stay the same."
    model = small()
    plain = {name: float(value.detach()) for name, value in lesson(model).items()}
    values = type(model).values
    try:
        type(model).values = lambda self, tokens: values(self, tokens) + 100.0 * ~spoken(tokens, VOCAB)
        assert {name: float(value.detach()) for name, value in lesson(model).items()} == pytest.approx(plain, rel=1e-6)
    finally: type(model).values = values


def test_the_critics_error_is_the_square_over_real_words_and_the_mean_over_captions():
    light, heavy = small(value=0.0), small(value=1.0)
    with torch.no_grad():
        without, with_error = lesson(light), lesson(heavy)
        torch.manual_seed(5)                                                    # the same samples once more
        memory = heavy.encode(PICTURES)
        tokens = say(heavy, memory, 3, 8)
        score_words(heavy, memory, tokens)
        values, scores = heavy.values(tokens), torch.as_tensor(REWARD(["a", "b", "c"], tokens)).float()
    lengths = spoken(tokens, VOCAB).sum(-1)
    assert lengths.min() < tokens.shape[-1]                                     # some are over before the longest
    by_hand = [sum((values[b, k, t] - scores[b, k])**2 for t in range(lengths[b, k])) for b in range(3) for k in range(3)]
    assert (with_error["loss"] - without["loss"] - sum(by_hand) / 9).abs() < 1e-5
    assert (with_error["surprise"] - sum(by_hand) / lengths.sum()).abs() < 1e-6


def test_the_bonus_for_entropy_fades_from_epoch_to_epoch():
    with torch.no_grad():
        model = small(entropy=0.5, fade=0.5, floor=0.2, value=0.0)
        losses = [float(lesson(model, epoch)["loss"]) for epoch in (0, 1, 2, 9)]
    falls = [b - a for a, b in zip(losses, losses[1:])]
    assert falls[0] == pytest.approx(falls[1] * 0.25 / 0.05, rel=1e-3) and falls[2] == pytest.approx(0, abs=1e-6) and falls[0] > 0


def test_a_score_is_scaled_then_cut():
    high = Shaped(REWARD, scale=10.0, clip=0.5)
    tokens = torch.tensor([[[4, 5, VOCAB.eos], [9, 9, 9]]])
    plain = REWARD(["a"], tokens)
    assert (high(["a"], tokens) == np.minimum(10 * plain, 0.5)).all() and plain[0, 0] > 0.05 and high.signature != REWARD.signature


def test_a_model_that_was_never_taught_has_a_caption_for_every_beam():
    for seed in range(5):
        model = small().eval()
        torch.manual_seed(seed)
        for w in model.parameters(): torch.nn.init.uniform_(w, -1, 1)
        model.head.bias.data[VOCAB.eos] -= 1e4                                                 # no beam ever ends
        with torch.no_grad(): hyps = decode(model, model.encode(PICTURES), Beam(5, 5), 12)
        assert hyps.tokens.shape == (3, 5, 11) and hyps.score.isfinite().all()


def test_a_stored_model_says_and_expects_the_same(tmp_path):
    model = small().eval()
    again = load(save_model(tmp_path / "m", model))
    tokens = torch.randint(4, len(VOCAB), (3, 2, 8))
    rows = torch.cat([torch.full((6, 1), VOCAB.sos), tokens.flatten(0, 1)[:, :-1]], 1)
    with torch.no_grad():
        said = [decode(m, m.encode(PICTURES), Beam(3), 12).tokens for m in (model, again)]
        for m in (model, again): m(m.encode(PICTURES), rows)
    assert said[0].equal(said[1]) and model.values(tokens).equal(again.values(tokens)) and again.config == model.config


def test_statistics_of_a_frozen_backbone_stand_still_through_all_phases(tmp_path):
    "An epoch of words and one of scores on pictures: the backbone, its batch normalisation included, is bit for bit what it was."
    prepare_world(tmp_path / "world", n_train=12, n_val=2, n_test=2, n_pairs=1, n_counts=1)
    extract(tmp_path / "world", make_backbone("shapes"))
    before = make_backbone("shapes").state_dict()
    how = RECIPES["tiny"].change(epochs=1, batch=4, validate=2)
    train(tmp_path / "world", tmp_path / "m", how, "cpu")
    after = load(tmp_path / "m").backbone.state_dict()
    assert all(after[name].equal(before[name]) for name in before) and any("running_var" in name for name in before)


def test_eight_pictures_are_learned_by_heart(tmp_path):
    "The actor's phase of the recipe, only longer: CIDEr-D of its captions above nine tenths of what the human captions themselves get."
    prepare_world(tmp_path, n_train=8, n_val=2, n_test=2, n_pairs=1, n_counts=1)
    extract(tmp_path, make_backbone("shapes"))
    data = open_data(tmp_path)
    items = [replace(item, captions=item.captions[:1]) for item in data.of("train")]
    vocab = Vocab.build(items, min_count=1)
    seed_all(0)
    model = ActorCritic(ActorCriticConfig.preset("tiny", data.store.dim), vocab)
    learner = Learner(model, replace(RECIPES["tiny"].phases[1], lr=5e-3), "cpu")
    batch = next(Batches(items, vocab, data.store, 8).epoch(0))
    training_mode(model)
    for step in range(200): learner.step(batch, 5e-3 * (1 - step / 200))
    said = [c.captions[0] for c in caption_stored(model.eval(), data.store, [item.id for item in items], Beam(3))]
    reached = evaluate({item.id: text for item, text in zip(items, said)}, items).totals["CIDEr-D"]
    best = evaluate({item.id: item.captions[0] for item in items}, items).totals["CIDEr-D"]
    assert reached > 0.9 * best, (reached, best)


def scores(model, data, seed: int = 0) -> dict[str, float]:
    "The model's own reward on the test split, of greedy captions and of five samples a picture, and CIDEr-D with beam 3."
    items = data.of("test")
    ids, reward = [item.id for item in items], mixed_bleu(References.build(data.items, data.vocab))
    x, mask = (torch.from_numpy(part) for part in data.store.read(ids))
    seed_all(seed)
    with torch.no_grad():
        memory = model.eval().encode(x.float(), mask)
        said = {"greedy": decode(model, memory, Greedy(), 21).tokens, "sampled": say(model, memory, 5)}
    totals = evaluate_split(model, data, "test", Beam(3))[1].totals
    return {name: float(reward(ids, tokens).mean()) for name, tokens in said.items()} | {name: totals[name] for name in ("CIDEr-D", "BLEU-4")}


@measured
def test_acting_raises_its_own_reward_on_the_world(tmp_path):
    "Recipe tiny, three seeds: cross-entropy reaches CIDEr-D 1.6 within four CPU-minutes, and the scores of A2C lie above it."
    prepare_world(tmp_path / "world")
    extract(tmp_path / "world", make_backbone("shapes"))
    data, rows = open_data(tmp_path / "world"), []
    for seed in range(3):
        out, how = tmp_path / f"seed{seed}", RECIPES["tiny"].change(seed=seed)
        for phase in ("xe", "a2c"):
            began = time.process_time()
            history = train(tmp_path / "world", out, how, "cpu", only=[phase])
            rows.append((seed, phase, time.process_time() - began, scores(load(out / phase), data)))
            print(*rows[-1], [row for row in history if "epoch" in row and row.pop("captions")], sep="\n", flush=True)
    for name in ("greedy", "sampled", "CIDEr-D", "BLEU-4", "seconds"):
        for phase in ("xe", "a2c"):
            values = [seconds if name == "seconds" else found[name] for _, p, seconds, found in rows if p == phase]
            print(f"{name:8} {phase:4} {statistics.mean(values):.3f} +- {statistics.stdev(values):.3f}")
    for (_, _, seconds, before), (_, _, _, after) in zip(rows[::2], rows[1::2]):
        assert before["CIDEr-D"] >= 1.6 and seconds < 240
        assert after["sampled"] > before["sampled"] + 0.1 and after["greedy"] > before["greedy"] + 0.02
