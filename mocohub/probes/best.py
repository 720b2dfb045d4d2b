"""The k best of each of many queries, of similarities that come tile by tile.

Of a tile nearly all are below the k-th best that a query has already, its floor. So the tile is reduced to
the largest of each group of columns, and only groups that reach above the floor are looked at. What is found
waits beside the k best until there is no room for more; only then are they sorted.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

Exact = Callable[[Tensor, Tensor], Tensor]  # queries and columns of a tile, (P,) each, to similarities (P,)

_GROUP = 32  # columns of a tile that are reduced to their largest at most
_HITS = 1 << 23  # values that are looked at together: of features that are all alike, a whole tile is above


def filled(num_rows: int) -> int:
    """Return the columns of a tile of so many rows: the next multiple of a group."""
    return -(-num_rows // _GROUP) * _GROUP


class Best:
    """The k best of each of some queries so far, and candidates that wait beside them.

    Attributes:
        values: (num_queries, at least k), -inf where there is none; the k best in order after `settle`.
        rows: Those of the values, likewise, int64.
    """

    def __init__(self, num_queries: int, k: int, like: Tensor) -> None:
        """Begin with none, of the type and on the device of `like`."""
        self.k, self.num_seen = k, 0
        self.values = like.new_full((num_queries, k + max(2 * k, 32)), -torch.inf)
        self.rows = torch.zeros_like(self.values, dtype=torch.int64)
        self.counts = torch.zeros(num_queries, dtype=torch.int64, device=like.device)
        self.floors = like.new_full((num_queries, 1), -torch.inf)  # the k best are above them

    def take(self, scores: Tensor, first_row: int, unsure: float, exact: Exact) -> None:
        """Look through a tile of similarities.

        Args:
            scores: (num_queries, M), M one of `filled`; -inf where there is no row.
            first_row: The row of the first column.
            unsure: How far scores may be from the similarities, at most.
            exact: What gives these; asked only if scores are unsure.
        """
        if self.num_seen < self.k <= scores.shape[1]:
            self._estimate_floors(scores, unsure)
        for query, column, value in _above(scores, self.floors - unsure):
            if unsure:
                value = exact(query, column)
                better = (value > self.floors[query, 0]).nonzero()[:, 0]
                query, column, value = query[better], column[better], value[better]
            if len(query):
                self._keep(query, value, column + first_row)
        self.num_seen += scores.shape[1]

    def _estimate_floors(self, scores: Tensor, unsure: float) -> None:
        """Raise the floors to just below what k similarities of the first tile reach."""
        size = 4 if 16 * self.k <= scores.shape[1] else 1  # of k groups each has such a similarity
        largest = scores.view(len(scores), size, -1).amax(1)
        kth = largest.topk(self.k, dim=1, sorted=False).values.amin(1, keepdim=True)
        kth = kth.to(self.floors.dtype) - unsure
        self.floors = torch.maximum(self.floors, kth.nextafter(kth.new_tensor(-torch.inf)))

    def _keep(self, query: Tensor, value: Tensor, row: Tensor) -> None:
        """Add candidates, in the order of their queries."""
        arrivals = torch.bincount(query, minlength=len(self.counts))
        room = self.values.shape[1]
        if int((self.counts + arrivals).max()) > room:
            self.settle()
            missing = max(0, int((self.counts + arrivals).max()) - room)
            self.values = F.pad(self.values, (0, missing), value=-torch.inf)
            self.rows = F.pad(self.rows, (0, missing))
        width = self.values.shape[1]
        starts = torch.arange(len(arrivals), device=query.device) * width + self.counts
        starts -= arrivals.cumsum(0) - arrivals
        places = starts.index_select(0, query)
        places += torch.arange(len(query), device=query.device)
        self.values.view(-1).scatter_(0, places, value.to(self.values.dtype))
        self.rows.view(-1).scatter_(0, places, row)
        self.counts += arrivals
        if width > room:
            self.settle()
            self.values, self.rows = self.values[:, :room].contiguous(), self.rows[:, :room].contiguous()

    def settle(self) -> None:
        """Sort, keep the k best and raise the floors."""
        self.values[:, : self.k], self.rows[:, : self.k] = top_k(self.values, self.rows, self.k)
        self.values[:, self.k :] = -torch.inf
        self.floors = torch.maximum(self.floors, self.values[:, self.k - 1 : self.k])
        self.counts.clamp_(max=self.k)


def _above(scores: Tensor, limits: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield query, column and value of what is above the limits (n, 1) of `scores` (n, M), row by row."""
    num_groups = scores.shape[1] // _GROUP
    groups = scores.view(-1, _GROUP)
    largest = scores.view(-1, num_groups, _GROUP).amax(2)
    for group in (largest > limits).view(-1).nonzero()[:, 0].split(max(1, _HITS // _GROUP)):
        query = group // num_groups
        members = groups.index_select(0, group)  # (P, _GROUP)
        hits = (members > limits.index_select(0, query)).view(-1).nonzero()[:, 0]
        hit_group = hits // _GROUP
        column = (group - query * num_groups - torch.arange(len(group), device=group.device)) * _GROUP
        column = column.index_select(0, hit_group) + hits
        yield query.index_select(0, hit_group), column, members.view(-1).index_select(0, hits)


def top_k(values: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row of `values` and what `rows` says of them, of equals the lower first.

    Args:
        values: (n, M), M at least k.
        rows: (n, M) int64.
        k: How many.

    Returns:
        Values and rows, (n, k), largest value first.
    """
    top, place = values.topk(min(k + 1, values.shape[1]), dim=1)
    tied = (top[:, 1:] == top[:, :-1]).any(dim=1).nonzero()[:, 0]  # here topk's own order would show
    top, found = top[:, :k].contiguous(), rows.gather(1, place[:, :k])
    if len(tied):
        by_row = rows[tied].argsort(dim=1)
        of_tied = values[tied].gather(1, by_row)
        by_value = of_tied.argsort(dim=1, descending=True, stable=True)[:, :k]
        top[tied] = of_tied.gather(1, by_value)
        found[tied] = rows[tied].gather(1, by_row).gather(1, by_value)
    return top, found
