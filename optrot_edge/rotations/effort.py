"""What learning the baselines takes, for `optrot_edge.plan`: floating-point operations and bytes; `body` counts the
decoder's weights."""

from __future__ import annotations

from optrot_edge.rotations.baselines import END_TO_END


def end_to_end_effort(config, recipe, body: int) -> tuple[int, int]:
    """Of SpinQuant and OSTQuant: every step there and back, and once more forward where activations are not kept; four
    products of a token with R1 per layer forward and two back; weights that are rounded, as many with R1."""
    from optrot_edge.rotations.distributed import spare_memory

    options, hidden = recipe.end_to_end_options(), config.hidden_size
    head = config.vocab_size * hidden
    rows = body // hidden if options.weights else 0
    products = hidden**2 * (6 * config.num_hidden_layers * options.tokens + 6 * rows)
    step = 6 * options.tokens * (body + head) + 4 * products
    activations = 4 * options.tokens * config.num_hidden_layers * (16 * hidden + 8 * config.intermediate_size)
    return options.steps * step, min(4 * body + activations, spare_memory("cpu")) + 4 * head


def kurtail_effort(config, recipe, body: int) -> tuple[int, int]:
    """Of KurTail: a step's rows times R1, and twice back, after one pass over the text; in memory are the sampled reads
    and values, and a step's rows four times."""
    from optrot_edge.rotations.kurtail import STEP_TOKENS, TOKENS

    hidden, values = config.hidden_size, config.num_key_value_heads * config.head_dim
    rows = 2 * config.num_hidden_layers * STEP_TOKENS
    sampled = config.num_hidden_layers * TOKENS * (2 * hidden + values)
    return 6 * recipe.e2e_steps * rows * hidden**2 + 2 * body * recipe.nsamples * recipe.seqlen, (
        4 * sampled + 16 * rows * hidden)


BASELINE_EFFORTS = {"kurtail": kurtail_effort, **dict.fromkeys(END_TO_END, end_to_end_effort)}
