"""A FLUX repository rewritten in many ways, each of which keeps what it computes, and what the tool makes of each.

python -m tests.mutations REPOSITORY [--only NAME ...] [--combinations N] [--verify N]
"""
