"""An ensemble is the weighted mean of its members' probabilities, for any K and in every search."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from test_search import HOWS
from toy import Toy, pictures

from expnet.classics.show_tell import ShowTell, ShowTellConfig
from expnet.data.vocabulary import SPECIALS, Vocab
from expnet.decode.ensemble import Ensemble
from expnet.decode.search import Beam, decode
from expnet.models.backbone import make_backbone
from expnet.models.captioner import unroll


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.1, 5), min_size=1, max_size=3), K=st.integers(1, 3), T=st.integers(1, 3))
def test_probabilities_are_the_weighted_mean(weights, K, T):
    members = [Toy(8, K, seed=i) for i in range(len(weights))]
    model = Ensemble(members, weights)
    tokens = torch.randint(8, (6, K * T), generator=torch.Generator().manual_seed(0))
    memory = model.encode(pictures(3))
    parts = [unroll(m, m.encode(pictures(3)), tokens).exp() for m in members]
    expected = sum(p * w for p, w in zip(parts, weights)) / sum(weights)
    assert torch.allclose(unroll(model, memory, tokens).exp(), expected, atol=1e-5)
    assert torch.allclose(model(memory, tokens).exp(), expected, atol=1e-5)
    assert torch.allclose(expected.sum(-1), torch.ones(6, K * T), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(how=HOWS, K=st.integers(1, 3))
def test_copies_of_one_model_say_what_it_says(how, K):
    one = Toy(8, K, dtype=torch.float64)
    three = Ensemble([one, one, one], [1, 2, 3])
    a, b = (decode(m, m.encode(pictures(3)), how, look=True) for m in (one, three))
    assert a.tokens.equal(b.tokens) and torch.allclose(a.score, b.score, atol=1e-5)
    assert torch.allclose(a.aux["code"], b.aux["code"])


def test_order_of_members_and_scale_of_weights_do_not_matter():
    a, b = Toy(8, seed=1, dtype=torch.float64), Toy(8, seed=2, dtype=torch.float64)
    left, right = Ensemble([a, b], [1, 3]), Ensemble([b, a], [6, 2])
    x, y = (decode(m, m.encode(pictures(4)), Beam(4, 4)) for m in (left, right))
    assert x.tokens.equal(y.tokens) and torch.allclose(x.score, y.score)


def test_members_may_see_different_pictures():
    """One input a member; maps whose shapes differ are left out."""
    class Other(Toy):
        def step(self, memory, state, previous, look=False):
            step = super().step(memory, state, previous, look)
            return step._replace(aux={**step.aux, "code": step.aux["code"][..., None]} if look else {})
    model = Ensemble([Toy(8), Other(8, seed=1)])
    hyps = decode(model, model.encode([pictures(3), pictures(3, first=5)]), Beam(2), look=True)
    assert set(hyps.aux) == {"said"}
    swapped = decode(model, model.encode([pictures(3), pictures(3)]), Beam(2))
    assert not swapped.score.equal(hyps.score)


def test_it_is_a_module():
    model = Ensemble([Toy(8), Toy(8)], [1, 3])
    assert torch.allclose(model.state_dict()["log_weights"].exp(), torch.tensor([0.25, 0.75])) and not model.eval().members[1].training


@pytest.mark.parametrize("kind", ["Image", "file"])
def test_pictures_are_prepared_for_every_member(kind, tmp_path):
    "Three copies of a captioner say of a picture what one says, and members may want pictures of other sizes."
    torch.manual_seed(0)
    vocab, config = Vocab([*SPECIALS, "a", "disc", "red"]), ShowTellConfig(128, 16, 16)
    small, large = (ShowTell(config, vocab, make_backbone("shapes", size=size)).eval() for size in (None, 96))
    picture = Image.effect_noise((70, 50), 60).convert("RGB")
    picture.save(tmp_path / "p.png")
    given = picture if kind == "Image" else tmp_path / "p.png"
    one, three, mixed = (model.caption([given], beam=2)[0] for model in (small, Ensemble([small] * 3), Ensemble([small, large])))
    assert three.captions == one.captions and three.scores == pytest.approx(one.scores, abs=1e-5)
    assert mixed.captions[0] and mixed.scores[0] != pytest.approx(one.scores[0], abs=1e-7)
