"""The Transformer for any K: parallel equals unrolled, nothing leaks, searches end, recipes learn; and what K gains."""
import os
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import process_time

import pytest
import torch

from expnet.classics.distillation import distil
from expnet.classics.semi_autoregressive import Transformer, TransformerConfig
from expnet.data.vocabulary import Vocab
from expnet.decode.groups import words_a_step
from expnet.decode.sampling import Sample
from expnet.decode.search import Beam, Greedy, decode
from expnet.models.backbone import make_backbone
from expnet.models.captioner import teacher_forcing, unroll
from expnet.score.evaluate import evaluate
from expnet.score.reward import CiderDReward, References
from expnet.tools import UserError, seed_all
from expnet.train.checkpoints import load
from expnet.train.loop import Run
from expnet.train.recipes import evaluate_split, extract, open_data, prepare, prepare_world, recipe, train
from expnet.train.self_critical import say
from toy import captions

measured = pytest.mark.skipif(not os.environ.get("EXPNET_MEASURE"), reason="set EXPNET_MEASURE=1 to train and measure for minutes")
vocab = Vocab(["EOS", "PAD", "SOS", "UNK", *(f"w{i:02}" for i in range(20))])
SIZES = TransformerConfig(features=12, dim=32, heads=4, feed_forward=64, encoder_layers=1, decoder_layers=2, max_len=16, dropout=0.0, input_dropout=0.0)


def model(K: int, dtype=torch.float64) -> Transformer:
    """A seeded model whose sentences end at different lengths."""
    seed_all(3)
    net = Transformer(replace(SIZES, K=K), vocab).to(dtype).eval()
    net.head.weight.data *= 3
    net.head.bias.data[vocab.eos] += 1
    return net


@pytest.mark.parametrize("longest", [13, 14, 15])                           # with and without a partial last group
@pytest.mark.parametrize("K", [1, 2, 3, 4, 5, 6])
@torch.no_grad()
def test_parallel_equals_unrolled(K, longest):
    x, mask = torch.randn(4, 5, 12), torch.rand(4, 5) < 0.7
    mask[0], mask[1] = True, False                                          # all regions, and none
    inputs, targets = teacher_forcing(captions(vocab, 8, longest), vocab, K)
    for dtype, most in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        net = model(K, dtype)
        memory = net.encode(x.to(dtype), mask)
        gap = (net(memory, inputs).log_softmax(-1) - unroll(net, memory, inputs)).abs()
        assert gap[targets != vocab.pad].max() < most


@pytest.mark.parametrize("K", [1, 2, 3, 4, 6])
def test_nothing_leaks_to_an_earlier_group(K):
    net = model(K)
    inputs, _ = teacher_forcing(captions(vocab, 1, 13), vocab, K)
    words = net.words(inputs).detach().requires_grad_()
    net.words.forward = lambda tokens, first=0: words
    logits = net(net.encode(torch.randn(1, 5, 12).double()), inputs)[0]
    for t in range(inputs.shape[1]):
        gradient, = torch.autograd.grad(logits[t].square().sum(), words, retain_graph=True)
        reached, end = gradient[0].norm(dim=-1) > 0, (t // K + 1) * K
        assert not reached[end:].any() and reached[:end].all()


@pytest.mark.parametrize("K", [1, 2, 3, 4, 6])
@torch.no_grad()
def test_searches_end_and_rows_are_independent(K):
    net, x = model(K), torch.randn(6, 5, 12).double()
    for how in (Greedy(), Beam(3, n_best=3), Sample(2, seed=0)):
        hyps = decode(net, net.encode(x), how)
        assert hyps.tokens.shape[-1] <= SIZES.max_len - 1 and hyps.score.isfinite().all()
        for row in hyps.tokens.flatten(0, 1).tolist():
            if vocab.eos in row: assert set(row[row.index(vocab.eos) + 1:]) <= {vocab.pad}
    alone, together = (decode(net, net.encode(part), Beam(3)).tokens for part in (x[2:3], x))
    assert torch.equal(alone[0], together[2, :, :alone.shape[-1]])


@torch.no_grad()
def test_maps_are_what_is_left_when_a_region_or_a_word_is_taken_away():
    net, x = model(2), torch.randn(1, 5, 12).double()
    memory = net.encode(x)
    state = net.step(memory, net.start(memory), torch.full((1, 2), vocab.sos)).state
    aux = net.step(memory, state, torch.tensor([[5, 6]]), look=True).aux
    assert aux["attention"].shape == (1, 2, 5) and aux["words"].shape == (1, 2, 4)
    for map in aux.values(): assert (map.sum(-1) - 1).abs().max() < 1e-9
    masked = net.encode(x, torch.tensor([[True, True, False, True, True]]))
    look = net.step(masked, net.step(masked, net.start(masked), torch.full((1, 2), vocab.sos)).state, torch.tensor([[5, 6]]), look=True)
    assert (look.aux["attention"][..., 2] == 0).all()


@torch.no_grad()
def test_maps_are_the_shares_of_both_attentions():
    net, x, tokens = model(2), torch.randn(1, 5, 12).double(), torch.tensor([[vocab.sos, vocab.sos, 5, 6]])
    memory, layer = net.encode(x), net.decoder[-1]
    state = net.step(memory, net.start(memory), tokens[:, :2]).state
    aux = net.step(memory, state, tokens[:, 2:], look=True).aux

    def shares(attention, asks, looked_at):
        "Softmax of queries times keys, head by head; their mean."
        q, k = (part.chunk(attention.heads, -1) for part in (attention.query(asks), attention.remember(looked_at).chunk(2, -1)[0]))
        return torch.stack([(a @ b.mT / a.shape[-1]**0.5).softmax(-1) for a, b in zip(q, k)]).mean(0)

    groups = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    y = net.words(tokens)
    for below, kept in zip(net.decoder[:-1], memory.cache): y = below(y, groups, kept, torch.ones(1, 1, 1, 5, dtype=torch.bool))
    z = layer.norm1(y)
    heard = layer.norm2(y + layer.attention(z, layer.attention.remember(z), groups))
    assert (aux["words"] - shares(layer.attention, z, z)[:, 2:]).abs().max() < 1e-9
    assert (aux["attention"] - shares(layer.cross, heard, memory.x)[:, 2:]).abs().max() < 1e-9


@pytest.mark.parametrize("K", [2, 4, 6])
def test_a_teacher_lends_all_of_its_weights(K):
    teacher = model(1, torch.float32)
    student = words_a_step(teacher, K)
    assert student.K == student.config.K == K and len(student.words.places) % K == 0
    assert all(torch.equal(w, teacher.state_dict()[name]) for name, w in student.state_dict().items())
    student.head.weight.data += 1
    assert not torch.equal(student.head.weight, teacher.head.weight)        # a copy, not the same tensors


# --- learning

@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    """Eight drawn training pictures with one caption each, and one picture to validate on."""
    folder = tmp_path_factory.mktemp("eight")
    prepare_world(folder, 8, 1, 1, 1, 1)
    extract(folder, make_backbone("shapes"))
    prepare(folder, [replace(item, captions=item.captions[:1]) for item in open_data(folder).items], min_count=1)
    return folder


@pytest.mark.parametrize("K", [1, 4])
def test_the_recipe_learns_eight_pictures_by_heart(eight, tmp_path, K):
    how = recipe("tiny", "Transformer").change(epochs=60, keep_every=60, batch=8, warmup=10, validate=1, smoothing=0.0, lr=1e-3)
    began = process_time()
    train(eight, tmp_path, replace(how, K=K), "cpu", only=["xe"])
    seconds, data, learnt = process_time() - began, open_data(eight), load(tmp_path / "xe" / "epoch_060")
    reached = evaluate_split(learnt, data, "train", Greedy())[1].totals["CIDEr-D"]
    best = evaluate({item.id: item.captions[0] for item in data.of("train")}, data.of("train")).totals["CIDEr-D"]
    assert learnt.K == K and reached > 0.95 * best > 7 and seconds < 60


def test_rewards_of_a_student_compare_with_people(eight, tmp_path):
    teacher = tmp_path / "teacher"
    how = recipe("tiny", "Transformer").change(epochs=1, batch=4, warmup=1, validate=1, log_every=1)
    train(eight, teacher, how, "cpu", only=["xe"])
    distil(load(teacher), eight, tmp_path / "taught", beam=2)
    before, after = open_data(eight), open_data(tmp_path / "taught")
    assert [i.captions for i in after.references] == [i.captions for i in before.of("train")]
    run = Run(load(teacher), after, how.phases[2], tmp_path / "run", "cpu")
    people = CiderDReward(References.build(before.of("train"), before.vocab))
    ids, tokens = [item.id for item in before.of("train")[:3]], captions(vocab, 3, 9)[:, None, 1:]
    assert (run.learner.objective.reward(ids, tokens) == people(ids, tokens)).all()
    history = train(tmp_path / "taught", tmp_path / "student", replace(how, K=2), "cpu", start=teacher)
    assert load(tmp_path / "student").K == 2 and [row["reward"] for row in history if "reward" in row]
    with pytest.raises(UserError, match="says one word a step"):
        train(eight, tmp_path / "x", replace(how, kind="ShowTell", K=2), "cpu", only=["xe"])


# --- what it gains (EXPNET_MEASURE=1)

@measured
@torch.no_grad()
def test_words_a_step_save_time_for_a_single_picture():
    "The sizes of the recipe tiny, greedy, captions of 15 tokens (the mean of the drawn world), one thread; about ten CPU seconds."
    torch.set_num_threads(1)
    seed_all(0)
    teacher = Transformer(TransformerConfig.preset("tiny", 128), Vocab(["EOS", "PAD", "SOS", "UNK", *(f"w{i:02}" for i in range(77))])).eval()
    teacher.head.bias.data[teacher.vocab.eos] = -99.
    models, x = {K: words_a_step(teacher, K) for K in (1, 2, 4, 6)}, torch.randn(1, 64, 128)

    def seconds(net) -> float:
        began = process_time()
        decode(net, net.encode(x), Greedy(), max_len=16)
        return process_time() - began

    runs = [{K: seconds(net) for K, net in models.items()} for _ in range(31)]
    spent = {K: median(run[K] for run in runs) for K in models}
    print({K: f"{1000 * s:.1f} ms, {spent[1] / s:.2f} x" for K, s in spent.items()})
    assert spent[1] / spent[2] >= 1.6 and spent[1] / spent[4] >= 2.4


@measured
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rewards_rise_above_cross_entropy(tmp_path_factory, seed):
    "K = 2 on 200 drawn pictures: the mean reward of samples before and after the second phase; about 40 CPU seconds a seed."
    home = tmp_path_factory.mktemp("rewards")
    prepare_world(home / "world", 200, 20, 20, 2, 2)
    extract(home / "world", make_backbone("shapes"))
    how = recipe("tiny", "Transformer").change(seed=seed, validate=20, keep_every=6)
    xe, rl = (replace(phase, epochs=epochs) for phase, epochs in zip(how.phases[1:], (12, 6)))
    train(home / "world", home / "model", replace(how, phases=(how.phases[0], xe, rl), K=2), "cpu")
    data = open_data(home / "world")
    reward, ids = CiderDReward(References.build(data.of("train"), data.vocab)), [item.id for item in data.of("train")[:200]]
    x, mask = (torch.from_numpy(a) for a in data.store.read(ids))
    means = []
    for folder in (home / "model" / "xe", home / "model" / "scst" / "epoch_006"):
        net = load(folder)
        seed_all(0)
        with torch.no_grad(): means.append(float(reward(ids, say(net, net.encode(x, mask))).mean()))
    print(seed, means)
    assert means[1] > 1.05 * means[0]
