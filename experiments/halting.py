"""Halting, an arm of author_next.toml: blocks are paid by confidence for what they add to the block before.

A token stops at block j with probability p_m, its confidence there. Of what has not stopped, block j is given its
cross-entropy, less that of the block before, times its confidence: it should be sure where it improved the prediction,
and unsure where it spoiled it. The draws are replaced by their expectation, so that no noise is added.
"""

from torch.nn.functional import cross_entropy


def halting(hidden_states, tokens, targets, read):
    """Each token's sum over blocks (B, T), in nats; hidden_states are h_0..h_L (B, T, C)."""
    total, left, before = 0.0, 1.0, None
    for h in hidden_states:
        logits = read(h)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        if before is not None:  # h_0 is only what block 1 is compared with
            confidence = logits.softmax(-1).amax(-1)
            total = total + left * confidence * (loss - before)
            left = left * (1 - confidence.detach())
        before = loss.detach()
    return total
