"""Public single-file models, retyped from knowledge: their ways of writing, in lines of our own.

Each keeps what is peculiar to its original: names of arguments and parameters, what it returns,
closures, tensors kept as plain attributes, buffers, tied weights, in-place writes.
"""

HIDDEN, HEADS, LAYERS = 32, 4, 2
VOCAB, SEQ = 96, 16
BLOCK_SIZE = 24  # positions a model has, more than a batch uses
