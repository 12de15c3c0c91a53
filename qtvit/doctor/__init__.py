"""Which operations of a model overflow or lose precision in fp16, bf16 and int8: ``qtvit doctor``."""

from .examine import examine
from .report import Operation, Report, Run

__all__ = ["Operation", "Report", "Run", "examine"]
