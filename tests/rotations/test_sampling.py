"""Inclusion probabilities and systematic samples."""

import pytest
import torch

from optrot_edge.rotations.sampling import RowSampler, batches, systematic_sample


@pytest.mark.parametrize("count", [1, 7.5, 60, 99.9])
def test_scale_gives_the_expected_count(count):
    mass = torch.cat([torch.randn(100, generator=torch.Generator().manual_seed(0)).exp() ** 3, torch.zeros(5)])
    scale = RowSampler(mass.view(5, 21)).scale(count)
    assert float((mass.double() * scale).clamp(max=1).sum()) == pytest.approx(count, rel=1e-5)


def test_scale_for_as_many_as_there_are_takes_all():
    mass = torch.tensor([1e-6, 1.0, 0.0])
    for count in (2, 3, 1e9):
        assert (mass * RowSampler(mass).scale(count)).clamp(max=1).tolist() == [1, 1, 0]


def test_without_mass_nothing_is_drawn():
    assert len(systematic_sample(torch.zeros(4) * RowSampler(torch.zeros(4)).scale(2), [0])) == 0
    assert len(systematic_sample(torch.zeros(0), [0])) == 0


def test_systematic_samples_have_their_probabilities():
    p = torch.rand(50, generator=torch.Generator().manual_seed(0))
    p[10:15] = 1
    p[20:25] = 0
    counts, draws = torch.zeros(50), 4000
    for draw in range(draws):
        found = systematic_sample(p, [1, draw])
        counts[found] += 1  # an index drawn twice would count once
        assert abs(len(found) - float(p.sum())) < 1.001
    assert (counts[10:15] == draws).all() and not counts[20:25].any()
    assert float((counts / draws - p).abs().max()) < 4.5 * 0.5 / draws**0.5


def test_the_key_decides():
    p = torch.full((1000,), 0.1)
    same = systematic_sample(p, [3, 1, 4])
    assert torch.equal(same, systematic_sample(p, [3, 1, 4]))
    assert any(not torch.equal(same, systematic_sample(p, [3, 1, other])) for other in range(4))


@pytest.mark.parametrize(("count", "size"), [(10, 3), (7, 7), (5, 9), (8, 1)])
def test_batches_bring_each_once_before_any_again(count, size):
    drawn, size = batches(count, size, torch.Generator().manual_seed(0)), min(size, count)
    parts = [next(drawn) for _ in range(count)]
    assert all(len(part) == size for part in parts)
    rounds = torch.cat(parts).view(size, count)
    assert (rounds.sort().values == torch.arange(count)).all()
    assert not torch.equal(rounds[0], torch.arange(count)) and (size == 1 or not torch.equal(rounds[0], rounds[1]))
