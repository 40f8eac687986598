"""Proof that a patched repository computes what the original did, in processes of their own."""

from chipmunk.verify.report import Check, VerifyError, VerifyReport
from chipmunk.verify.run import VerifyOptions, run

__all__ = ["Check", "VerifyError", "VerifyOptions", "VerifyReport", "run"]
