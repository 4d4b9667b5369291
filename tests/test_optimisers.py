"""Optimisers and schedules: RAdam against torch's and the published rule on a model, schedules at their corners, averages."""
import pytest
import torch
from torch import nn

from expnet.tools import UserError
from expnet.train.optimisers import SCHEDULES, Average, RAdam, groups, learning_rate, make_optimiser, set_rate


def gradients(model: nn.Module, step: int) -> None:
    "Set gradients that depend on the step alone."
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters(): p.grad = torch.randn(p.shape, generator=generator)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def test_radam_stands_still_for_five_steps_then_equals_torch():
    models = net(), net()
    optimisers = [kind(m.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-9) for kind, m in zip((RAdam, torch.optim.RAdam), models)]
    for step in range(12):
        moves = []
        for model, optimiser in zip(models, optimisers):
            before = [p.clone() for p in model.parameters()]
            gradients(model, step)
            optimiser.step()
            moves.append(torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before)]))
        if step < 5: assert (moves[0] == 0).all() and (moves[1] != 0).all()
        else: assert (moves[0] - moves[1]).abs().max() < 1e-7 and (moves[0] != 0).all()
        assert optimisers[0].param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("save_at", [2, 8])
def test_a_stored_optimiser_goes_on_as_if_not_stored(save_at):
    models = net(), net()
    optimisers = [make_optimiser("radam", groups(model, 1e-2)) for model in models]
    for step in range(12):
        if step == save_at:
            fresh = make_optimiser("radam", groups(models[1], 1e-2))
            fresh.load_state_dict(optimisers[1].state_dict())
            optimisers[1] = fresh
        for model, optimiser in zip(models, optimisers):
            gradients(model, step)
            optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(models[0].parameters(), net().parameters()))


def test_a_group_that_joins_late_waits_on_its_own():
    old, new = net(), net()
    optimiser = make_optimiser("radam", groups(old, 1e-2))
    for step in range(8):
        gradients(old, step)
        optimiser.step()
    optimiser.add_param_group(groups(new, 1e-2)[0])
    before = [p.clone() for p in old.parameters()]
    for model in (old, new): gradients(model, 9)
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), net().parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(old.parameters(), before))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 10, 300])
def test_rates_are_positive_finite_and_at_most_lr(schedule, warmup):
    rates = [learning_rate(schedule, step, 25, 100, 1e-3, warmup, 0.8, 2) for step in range(130)]  # also past the end
    low = 0 if schedule == "annealing" else 1e-12
    assert all(low <= rate <= 1e-3 * (1 + 1e-12) for rate in rates)
    if schedule != "annealing" and 0 < warmup < 100: assert rates[warmup] > rates[0] or warmup == 1


def test_published_schedules_by_hand():
    hyperbolic = lambda step, **kw: learning_rate("hyperbolic", step, 100, 800, 1e-4, **{"warmup": 1, "factor": 0.55, "every": 1} | kw)
    assert [hyperbolic(s) for s in (0, 99, 100, 250)] == pytest.approx([1e-4, 1e-4, 0.55e-4, 0.55**2 * 1e-4])
    assert hyperbolic(799, factor=0.1) == 5e-7 and hyperbolic(3, warmup=10) == pytest.approx(1e-4 / 7)
    annealing = lambda step: learning_rate("annealing", step, 100, 800, 1e-4, warmup=50, factor=0.1, every=2)
    assert [annealing(s) for s in (0, 25, 50, 199, 200, 400)] == pytest.approx([0, 5e-5, 1e-4, 1e-4, 0.8e-4, 0.64e-4])


def test_average_leaves_frozen_weights_and_the_model_alone():
    model = net()
    model[0].requires_grad_(False)
    average = Average(model, 0.5)
    assert set(average.weights) == {"1.weight", "1.bias"}
    with torch.no_grad(): model[1].weight += 1
    own = model[1].weight
    average.update(model)
    with pytest.raises(KeyError):
        with average.swapped(model):
            assert not torch.equal(model[1].weight, net()[1].weight)
            raise KeyError
    assert model[1].weight is own and torch.equal(own, net()[1].weight + 1)
    with pytest.raises(UserError, match="other weights"): average.load_state_dict({"steps": 1, "weights": {}})


def test_rates_of_groups_follow_one_share():
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optimiser = make_optimiser("adamw", groups(model, 1.0, 0.1), weight_decay=0.01)
    set_rate(optimiser, 0.25)
    assert [g["lr"] for g in optimiser.param_groups] == [0.25, 0.025]
    fresh = make_optimiser("adamw", groups(model, 1.0, 0.1))
    fresh.load_state_dict(optimiser.state_dict())
    assert [g["peak"] for g in fresh.param_groups] == [1.0, 0.1]
