"""The Chipmunk algorithm, stated plainly, hooked at run time onto an unpatched model.

This is what `chipmunk verify` holds the runtime against. It shares no code with it, nor with the operators: everything
here is written from the rules in docs/architecture.md, one batch element, one head and one group of rows at a time,
and nothing in it cares for speed. It lets the model compute every layer densely and then corrects the layer's result
to what the sparse layer would have given, so it needs no change in the model's code.

- `decisions`: which layers stay dense, and which keys and neurons are chosen
- `attention`, `mlp`: one layer of each kind, and what it remembers
- `token_order`, `step_caching`: what concerns the model as a whole
- `hooks`: where all of it takes hold of a model
- `model`: `Oracle`, which the caller sees

Notation: B batch, H heads, N tokens, D head dimension, C hidden size, F MLP hidden size, G groups.
"""

from chipmunk.verify.oracle.model import Oracle

__all__ = ["Oracle"]
