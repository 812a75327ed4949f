"""Per-token fake quantisation of activations, against a hand computation, and where the forward pass does it."""

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.models import forward, open_model
from optrot_edge.models.activations import InputQuantizer, fake_quantize_tokens, rounding_error, token_grid
from tests.tiny_models import random_tokens


def test_by_hand():
    # 2 bits: levels 0..3. Range -1..2: step 1, zero-point 1. Range 0..3 (the smallest entry is above zero): step 1.
    x = torch.tensor([[-1.0, 0.4, 0.6, 2.0], [1.4, 1.6, 3.0, 2.4], [-6.0, -2.9, -3.1, -0.5], [0.0, 0.0, 0.0, 0.0]])
    want = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [1.0, 2.0, 3.0, 2.0], [-6.0, -2.0, -4.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(fake_quantize_tokens(x, 2), want)
    step, zero = token_grid(x, 2)
    assert step.flatten().tolist() == [1, 1, 2, 1] and zero.flatten().tolist() == [1, 0, 3, 0]
    assert torch.equal(rounding_error(x, 2), want - x)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_are_within_a_step_and_zero_stays(bits):
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 3] = 0
    y = fake_quantize_tokens(x, bits)
    step, _ = token_grid(x, bits)
    assert bool(((y - x).abs() <= step * (1 + 1e-12)).all())  # the zero-point's rounding may clip half a step
    assert float(((y - x).abs() <= step / 2).double().mean()) > 0.98
    assert bool((y[:, 3] == 0).all()) and all(len(row.unique()) <= 2**bits for row in y)


def test_gradient_through_the_range():
    """With codes held fixed the error moves with the step alone: finite differences of that."""
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.randn(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    at = x.clone().requires_grad_()
    (rounding_error(at, 4, through_range=True) * weights).sum().backward()
    units = rounding_error(x, 4) / token_grid(x, 4)[0]
    for row in range(6):
        for place in (int(x[row].argmax()), int(x[row].argmin()), 5):
            moved = [x.clone() for _ in range(2)]
            moved[0][row, place] += 1e-6
            moved[1][row, place] -= 1e-6
            up, down = (float((units * token_grid(m, 4)[0] * weights).sum()) for m in moved)
            assert float(at.grad[row, place]) == pytest.approx((up - down) / 2e-6, abs=1e-7)
    assert not rounding_error(at, 4).requires_grad


def by_hand(source, tokens, bits):
    """The decoder once more, with the inputs of all linears rounded."""
    config = source.config
    rope = forward.rope_tables(config, tokens.shape[1], dtype=torch.float64)
    x = torch.nn.functional.embedding(tokens, source.embedding(torch.float64))
    for index in range(config.num_hidden_layers):
        layer = source.layer(index, torch.float64)
        normed = fake_quantize_tokens(forward.rms_norm(x, layer["attn_norm.weight"], config.rms_norm_eps), bits)
        context = fake_quantize_tokens(forward.attention_context(normed, layer, config, rope), bits)
        x = x + forward.linear(context, layer, "o_proj")
        normed = fake_quantize_tokens(forward.rms_norm(x, layer["mlp_norm.weight"], config.rms_norm_eps), bits)
        hidden = fake_quantize_tokens(forward.mlp_hidden(normed, layer), bits)
        x = x + forward.linear(hidden, layer, "down_proj")
    head = source.lm_head(torch.float64)
    head = source.embedding(torch.float64) if head is None else head
    return forward.rms_norm(x, source.final_norm(torch.float64), config.rms_norm_eps) @ head.T


@pytest.mark.parametrize("case", ["smollm2", "qwen2", "qwen3", "llama_bias"])
def test_the_forward_pass(tiny, case):
    source, tokens = open_model(tiny(case)), random_tokens()
    for bits in (8, 4):
        got = forward.logits(source, tokens, dtype=torch.float64, activations=bits)
        torch.testing.assert_close(got, by_hand(source, tokens, bits), rtol=0, atol=1e-10)
    plain = forward.logits(source, tokens, dtype=torch.float64)
    assert torch.equal(plain, forward.logits(source, tokens, dtype=torch.float64, activations=16))
    errors = [float((forward.logits(source, tokens, dtype=torch.float64, activations=b) - plain).norm())
              for b in (8, 4)]
    assert 0 < 8 * errors[0] < errors[1]


class Doubled:
    """A transform that the quantiser has to undo."""

    def apply(self, x):
        return 2 * x.flip(-1) + 1

    def undo(self, y):
        return ((y - 1) / 2).flip(-1)


def test_transforms_by_kind():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    quantise = InputQuantizer(4, {"down": Doubled()})
    assert torch.equal(quantise("attn", x), fake_quantize_tokens(x, 4))
    want = ((fake_quantize_tokens(2 * x.flip(-1) + 1, 4) - 1) / 2).flip(-1)
    assert torch.equal(quantise("down", x), want) and not torch.equal(want, fake_quantize_tokens(x, 4))


@pytest.mark.parametrize("bits", [0, 1, 9, 32])
def test_other_bits_are_refused(bits):
    with pytest.raises(InputError, match=f"activations of {bits} bits"):
        InputQuantizer(bits)
