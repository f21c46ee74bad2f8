"""The reference ladder: exact attention, from three passes over a vector to one pass over tiles.

NumPy and plain Python, float64, made to be read. Nothing here is fast; the product follows the
last step with other means, and its tests compare it with what stands here. Walk it in this order,
a file a step; `python -m flashcpu.reference` runs it and prints what every step differs and costs.

Rung one, the softmax of a vector: p[j] = exp(s[j]) / sum_j exp(s[j]).

    softmax_safe.py       safe_softmax          maximum, sum, quotient: three passes, no overflow
    softmax_ref.py        ref_softmax           the same passes, one NumPy call each
    softmax_online.py     safe_online_softmax   maximum and sum in one pass, by rescaling the sum

Rung two, one element of the output: a query row, all keys, one column of the values.

    element_naive.py      single_element_naive  keeps the scores S and the probabilities P
    element_v0.py         single_element_V0     P is gone
    element_v1.py         single_element_V1     the pass for the maximum is gone
    element_v2.py         single_element_V2     S is gone: three numbers, one pass (flash attention)

Rung three, whole attention: out = softmax(scale * q k^T) v.

    attention_naive.py    naive_attention       S and P at full size again
    state.py              merge_states          joins what two sets of keys leave
    attention_flash.py    flash_attention       tiles, each merged into the rest
    attention_flash_algorithmic.py
                          flash_attention_algorithmic
                                                tiles, rescale and stream

Beside the ladder stand tiles.py, which cuts a length into pieces of which the last may be short,
and attention_oracle.py, whose `oracle` has masks and grouped heads and is what the tests of the
package compare with.

The letters are those of the papers and mean only themselves: s scores, p probabilities, m running
maximum, l running sum, o accumulator, alpha rescale factor.

A row that sees no key, because there is none or because all its scores are -inf, gives 0. Its
maximum is -inf, and -inf - (-inf) would be NaN, so every step subtracts 0 in place of a maximum of
-inf: all exponentials are then 0, and so is their sum. A row that does see a key has a sum of at
least exp(m - m) = 1. So "the sum is 0" says exactly "no key was seen", and nothing else needs to be
remembered. A NaN among the scores makes the sum NaN and so the row; a score of +inf does the same
by way of inf - inf.
"""

from .attention_flash import flash_attention
from .attention_flash_algorithmic import flash_attention_algorithmic
from .attention_naive import naive_attention
from .attention_oracle import oracle, visible_keys
from .element_naive import single_element_naive
from .element_v0 import single_element_V0
from .element_v1 import single_element_V1
from .element_v2 import single_element_V2
from .softmax_online import safe_online_softmax
from .softmax_ref import ref_softmax
from .softmax_safe import safe_softmax
from .state import empty_state, finish_state, merge_states, partial_state

__all__ = [
    "empty_state",
    "finish_state",
    "flash_attention",
    "flash_attention_algorithmic",
    "merge_states",
    "naive_attention",
    "oracle",
    "partial_state",
    "ref_softmax",
    "safe_online_softmax",
    "safe_softmax",
    "single_element_V0",
    "single_element_V1",
    "single_element_V2",
    "single_element_naive",
    "visible_keys",
]
