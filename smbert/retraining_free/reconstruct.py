"""Exact least squares on what an output projection reads: which units it can do without, and how the others make up for them.

An attention head or a neuron reaches the rest of the model only through its own columns of an output projection. So all that is
needed to prune a sub-layer is second moments of that projection's inputs over real tokens, H = X X' + lambda I. Where the
projection has a bias, moments are taken about the mean: the bias then takes up whatever a removed unit adds on average.

- `removal_order`: structured optimal brain surgery (ZipLM, Kurtic et al. 2023): the unit whose removal costs least, with the best
  update of all other columns, goes first, then the next one given that.
- `solve`: the columns that stay, W H[:, K] H[K, K]^-1, in closed form for any set K; better conditioned than the chain of updates.
- `refit`: the columns that stay, for other inputs and targets than the projection's own (K-prune, Park et al. 2024).
- `rescale`: one factor for each unit that stays (Kwon et al. 2022).

Products of a few thousand tokens are summed in float32, and their sums in float64; all that follows is float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Reduce = Callable[[Tensor], Tensor]

FACTORS = (-10.0, 10.0)  # rescaling outside is refused: such factors fit noise (Kwon et al. 2022)
_FLUSH = 128  # columns removed between two full updates of the inverse
_IN_FLOAT32 = 4096  # tokens whose products are summed in it: to add every short batch in float64 is all memory traffic
_BLOCK = 384  # columns of a table of second moments that are made at once, each against those up to itself alone


class Moments:
    """Sums over tokens of an output projection's inputs x (n) and, if asked for, of targets y (m).

    Args:
        n: width of the inputs.
        m: width of the targets; 0 for none.
        device: where the sums are kept.
    """

    def __init__(self, n: int, m: int = 0, device: torch.device | None = None):
        self.tokens = 0.0
        self.x = torch.zeros(n, dtype=torch.float64, device=device)
        self.y = torch.zeros(m, dtype=torch.float64, device=device)
        # Of x with x, on and below the diagonal alone, and of x with y; those of the latest tokens are still to be added.
        self._products = torch.zeros(n, n + m, dtype=torch.float64, device=device)
        self._latest = torch.zeros(n, n + m, device=device)
        self._latest_tokens = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adds tokens: x (tokens, n), y (tokens, m)."""
        n = x.shape[1]
        self.tokens += len(x)
        self.x += x.sum(0, dtype=torch.float64)
        for start in range(0, n, _BLOCK):
            end = min(start + _BLOCK, n)
            self._latest[start:end, :end].addmm_(x[:, start:end].T, x[:, :end])
        if y is not None:
            self.y += y.sum(0, dtype=torch.float64)
            self._latest[:, n:].addmm_(x.T, y)
        self._latest_tokens += len(x)
        if self._latest_tokens >= _IN_FLOAT32:
            self._settle()

    def _settle(self) -> None:
        self._products += self._latest
        self._latest.zero_()
        self._latest_tokens = 0

    def reduced(self, reduce: Reduce | None) -> Moments:
        """The sums over all ranks, in place.

        Raises:
            ValueError: a sum is not finite, so some activation was too large for float32.
        """
        if reduce is not None:
            sums = reduce(torch.cat([t.flatten() for t in (self.x.new_tensor([self.tokens]), *self._sums)]))
            self.tokens, rest = float(sums[0]), sums[1:]
            shapes = [t.shape for t in self._sums]
            parts = rest.split([shape.numel() for shape in shapes])
            self.x, self.y, self._products = (part.reshape(shape) for part, shape in zip(parts, shapes))
        if not all(tensor.isfinite().all() for tensor in self._sums):
            raise ValueError(
                "second moments of the activations must be finite, got NaN or infinity. To resolve, check the weights and the data."
            )
        return self

    @property
    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._latest_tokens:
            self._settle()
        return self.x, self.y, self._products

    @property
    def xx(self) -> Tensor:
        """Sum of x x', (n, n)."""
        lower = self._sums[2][:, : len(self.x)]
        return lower.tril() + lower.tril(-1).T

    @property
    def xy(self) -> Tensor:
        """Sum of x y', (n, m)."""
        return self._sums[2][:, len(self.x) :]

    def second(self, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per token: second moments of x (n, n) and of x with y (n, m), about the means if `centred`; the means, else zeros."""
        count = max(self.tokens, 1.0)
        x, y = (self.x / count, self.y / count) if centred else (torch.zeros_like(self.x), torch.zeros_like(self.y))
        return self.xx / count - x.outer(x), self.xy / count - x.outer(y), x, y


@dataclass(frozen=True)
class Projection:
    """An output projection with the moments of its own inputs, in float64.

    Attributes:
        weight: (hidden, n).
        bias: (hidden,), or None; without one, moments are not centred.
        gram: second moments per token, (n, n).
        mean: mean input, (n,); zeros without a bias.
        damping: added to the diagonal of `gram`, as a share of its mean, wherever it is inverted.
        dim: columns of one unit: head_dim, or 1.
    """

    weight: Tensor
    bias: Tensor | None
    gram: Tensor
    mean: Tensor
    damping: float
    dim: int = 1

    @classmethod
    def of(cls, linear: nn.Module, moments: Moments, damping: float, dim: int = 1) -> Projection:
        """A Linear and what it read."""
        assert isinstance(linear, nn.Linear)  # by construction of the families
        bias = None if linear.bias is None else linear.bias.detach().double()
        gram, _, mean, _ = moments.second(centred=bias is not None)
        return cls(linear.weight.detach().double(), bias, gram, mean, damping, dim)

    @functools.cached_property
    def _products(self) -> Tensor:
        """Second moments of inputs with outputs, (n, hidden)."""
        return self.gram @ self.weight.T

    @property
    def energy(self) -> float:
        """Mean square of the outputs per token, about their mean if there is a bias."""
        return float((self.weight.T * self._products).sum())

    def removal_order(self) -> list[int]:
        """All units, in the order in which they are removed."""
        inverse = torch.cholesky_inverse(_factor(self.gram, damping_of(self.gram, self.damping))[0])
        order = _remove_columns if self.dim == 1 else _remove_groups
        return order(self.weight.clone(), inverse, self.dim)

    def columns(self, kept: Sequence[int]) -> Tensor:
        """Columns of the units `kept`, (units * dim,)."""
        units = torch.tensor(list(kept), dtype=torch.long, device=self.gram.device)
        return (units[:, None] * self.dim + torch.arange(self.dim, device=units.device)).flatten()

    def solve(self, kept: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The best weight (hidden, len(kept) * dim) and bias for the units `kept`."""
        columns = self.columns(kept)
        factor, extra = _factor(self.gram[columns][:, columns], damping_of(self.gram, self.damping))
        weight = torch.cholesky_solve(self._products[columns] + extra * self.weight[:, columns].T, factor).T
        bias = None
        if self.bias is not None:  # with which the mean output stays
            bias = self.bias + self.weight @ self.mean - weight @ self.mean[columns]
        return weight, bias

    def error(self, weight: Tensor, kept: Sequence[int]) -> float:
        """Mean squared error per token of `weight` on the units `kept`, as a share of `energy`."""
        columns = self.columns(kept)
        gram, products = self.gram[columns][:, columns], self._products[columns]
        energy = self.energy
        error = energy + float((weight * (weight @ gram - 2 * products.T)).sum())
        return max(error, 0.0) / energy if energy > 0 else 0.0


def damping_of(gram: Tensor, damping: float) -> float:
    """lambda: a share of the mean diagonal of `gram`, so that dead and duplicated inputs do no harm; one where all are dead."""
    level = float(gram.diagonal().mean()) if len(gram) else 0.0
    return damping * level if level > 0 else 1.0


def _factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """The Cholesky factor of `gram` + damping I, and the damping, raised where rounding has left the matrix indefinite."""
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + damping * one)
        if not failed:
            return factor, damping
        damping *= 10


def refit(weight: Tensor, bias: Tensor | None, moments: Moments, damping: float) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that turn the inputs x of `moments` into its targets y with the least squared error.

    Solves min |W x + b - y|^2 + lambda |W - weight|^2, so that directions without data stay as they are.

    Args:
        weight: (hidden, n), from which to depart.
        bias: (hidden,), or None for a projection without one.
        moments: of x (n) and y (hidden).
        damping: lambda as a share of the mean diagonal of x's second moments.
    """
    gram, cross, x, y = moments.second(centred=bias is not None)
    old = weight.double()
    factor, _ = _factor(gram, damping_of(gram, damping))
    new = old + torch.cholesky_solve(cross - gram @ old.T, factor).T
    return new, None if bias is None else y - new @ x


def rescale(weight: Tensor, bias: Tensor | None, moments: Moments, dim: int, damping: float = 1e-3) -> Tensor | None:
    """One factor for each unit so that the sum of the units' outputs comes closest to y - bias (Kwon et al. 2022).

    Args:
        weight: (hidden, units * dim).
        bias: stays as it is.
        moments: of x (units * dim) and y (hidden).
        dim: columns of one unit.
        damping: towards factors of one, as a share of the mean diagonal of the normal equations.

    Returns:
        (units,); None where a factor would lie outside `FACTORS`, and then nothing should be rescaled.
    """
    old = weight.double()
    units = old.shape[1] // dim
    count = max(moments.tokens, 1.0)
    target = moments.xy / count  # (units * dim, hidden)
    if bias is not None:
        target = target - moments.x.outer(bias.double()) / count
    pairs = ((old.T @ old) * (moments.xx / count)).reshape(units, dim, units, dim).sum((1, 3))  # (units, units)
    wanted = (target * old.T).sum(1).reshape(units, dim).sum(1)
    one = torch.ones_like(wanted)
    factor, _ = _factor(pairs, damping_of(pairs, damping))
    factors = one + torch.cholesky_solve((wanted - pairs @ one)[:, None], factor)[:, 0]
    return factors if bool(((factors >= FACTORS[0]) & (factors <= FACTORS[1])).all()) else None


def _remove_columns(weight: Tensor, inverse: Tensor, dim: int) -> list[int]:
    """Greedy removal of single columns, each given those before it.

    Removing column j costs |W_j|^2 / P_jj with P = H^-1; the update is W -= W_j P_j: / P_jj and P -= P_:j P_j: / P_jj. P itself is
    only brought up to date every `_FLUSH` columns: until then the few rows that are needed are computed from P and the
    vectors removed since. The result is that of one update at a time, at a fraction of the memory traffic.
    """
    order: list[int] = []
    names = torch.arange(weight.shape[1])
    while len(names):
        count = len(names) if len(names) <= _FLUSH else _FLUSH
        removed: list[int] = []
        vectors = inverse.new_empty(count, len(names))  # P_now = inverse - vectors' vectors
        diagonal, squares = inverse.diagonal().clone(), weight.square().sum(0)
        for step in range(count):
            cost = squares.clamp(min=0) / diagonal.clamp(min=torch.finfo(inverse.dtype).tiny)
            cost[removed] = torch.inf
            j = int(cost.argmin())
            row = inverse[j] - vectors[:step, j] @ vectors[:step]
            pivot = row[j].clamp(min=torch.finfo(inverse.dtype).tiny)
            column = weight[:, j].clone()
            part = row / pivot
            squares += part * (part * column.square().sum() - 2 * (column @ weight))
            weight.addr_(column, part, alpha=-1)
            vectors[step] = row / pivot.sqrt()
            diagonal -= vectors[step].square()
            removed.append(j)
        order += names[removed].tolist()
        stay = torch.ones(len(names), dtype=torch.bool)
        stay[removed] = False
        names, place = names[stay], stay.to(inverse.device)
        left = vectors[:, place]
        inverse = inverse[place][:, place].addmm_(left.T, left, alpha=-1)
        weight = weight[:, place]
    return order


def _remove_groups(weight: Tensor, inverse: Tensor, dim: int) -> list[int]:
    """Greedy removal of groups S of `dim` columns: the cost is tr(W_S (P_SS)^-1 W_S'), the updates as for columns."""
    order: list[int] = []
    names = list(range(weight.shape[1] // dim))
    while names:
        groups = len(names)
        blocks = (
            inverse.reshape(groups, dim, groups, dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        )  # (groups, dim, dim)
        own = weight.reshape(-1, groups, dim).permute(1, 2, 0)  # (groups, dim, hidden)
        solved = torch.linalg.solve(blocks, own)
        first = int((own * solved).sum((1, 2)).argmin())
        columns = torch.arange(first * dim, (first + 1) * dim, device=weight.device)
        update = torch.linalg.solve(blocks[first], inverse[columns])  # (dim, groups * dim)
        weight = weight - weight[:, columns] @ update
        inverse = inverse - inverse[:, columns] @ update
        order.append(names.pop(first))
        stay = torch.ones(groups * dim, dtype=torch.bool, device=weight.device)
        stay[columns] = False
        weight, inverse = weight[:, stay], inverse[stay][:, stay]
    return order
