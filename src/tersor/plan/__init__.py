"""Planning: a budget, what each choice costs, and the one verb that meets the budget."""

from tersor.methods.allocate import allocate
from tersor.plan.budget import Budget, Limit
from tersor.plan.compress import Result, compress

__all__ = ["Budget", "Limit", "Result", "allocate", "compress"]
