"""Rows that share weights: they join, draw a token each per step, and leave.

Shapes: n rows in use, m rows that join, V vocabulary, C columns; `columns.py` draws the layout. Column `cursor`
holds the token that each row drew last and that the model has not seen; keys and values end before it.

What is small and per row lives in numpy on the host, where an operation costs a microsecond; keys, values, logits
and the tokens to feed next stay on the device. Nothing is done per row in Python but when rows join or leave.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from asyncrl.sampling.embedded.columns import ColumnCache, States
from asyncrl.sampling.embedded.draw import DrawParams, draw, uniforms
from asyncrl.sampling.embedded.prefixes import Past, PrefixStore
from asyncrl.sampling.embedded.versions import LiveModel
from asyncrl.types import Completion, FinishReason, SamplingParams

_ROUND = 64
"""Columns are allocated in multiples of this."""
_PADDING = 64
"""Rows share a prefill if the shorter is padded by no more than this, or by no more than it has itself."""
_HOLES = 8
"""Rows that left are closed up once they are 1/8 of the batch: moving keys costs less than decoding for nobody."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One request and its way through the engine."""

    prompt: np.ndarray
    """[P] int64, at least one token."""
    params: SamplingParams
    max_tokens: int
    """What was asked for, within the context."""
    stream: np.uint64
    """Where its uniform numbers come from."""
    version: int | None
    """Weights it is pinned to; None follows the newest."""
    reply: Future[Completion]
    """Belongs to the event loop: only `deliver` may touch it."""
    session: str = ""
    """What it has seen is kept for the next request of the same session."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """(version, number of tokens drawn before it)."""
    mixed: bool = False
    """Its keys and values come from more than one model."""
    batch: DecodeBatch | None = None
    row: int = -1


@dataclass(frozen=True, slots=True)
class Finished:
    """A request and what it drew."""

    ticket: Ticket
    completion: Completion


class DecodeBatch:
    """Owns the cache and every per-row array of the rows that are drawn from one model."""

    def __init__(self, model: LiveModel, prefixes: PrefixStore, *, max_rows: int, prefill_tokens: int) -> None:
        self.model = model
        self._prefixes = prefixes
        self.tickets: list[Ticket | None] = []
        """[n]; None is a row that left and was not closed up yet."""
        self.running = 0
        self.cursor = 0
        self._max_rows = max_rows
        self._prefill_tokens = prefill_tokens
        self._cache = ColumnCache(model.layers)
        self._first = 0  # the lowest column that a live row uses
        self._rows = _RowTable(0, 0)
        self._pending = torch.empty(0, dtype=torch.int64, device=model.device)  # [R] the tokens at `cursor`
        self._starts: Tensor | None = None  # [n, 1] device twin of _rows.start, rebuilt when rows change
        self._params: DrawParams | None = None  # as above

    def join(self, tickets: Sequence[Ticket]) -> list[Finished]:
        """Prefill what the prompts have new and draw their first tokens. Equal prompts are computed once."""
        self._close_up()
        self._make_room(tickets)
        begin = len(self.tickets)
        pasts = {ticket: self._prefixes.find(self.model, ticket.session, ticket.prompt) for ticket in tickets}
        ordered = sorted(tickets, key=lambda ticket: pasts[ticket][1] - len(ticket.prompt))  # most that is new first
        computed = {ticket.prompt.tobytes(): ticket for ticket in ordered}
        source = {ticket: computed[ticket.prompt.tobytes()] for ticket in ordered}
        leaders = [ticket for ticket in ordered if source[ticket] is ticket]
        twins = [ticket for ticket in ordered if source[ticket] is not ticket]
        for ticket in (*leaders, *twins):
            self._place(ticket)
        self._rows_changed()
        for ticket in leaders:
            self._recall(ticket, *pasts[ticket])
        chunks = self._chunks(begin, begin + len(leaders), even=True)
        logits = torch.cat([self._prefill(first, last) for first, last in chunks])  # [leaders, V]
        if twins:
            sources = [source[ticket].row for ticket in twins]
            self._cache.move_rows(sources, [ticket.row for ticket in twins], self._first, self.cursor)
            logits = torch.cat([logits, logits[[row - begin for row in sources]]])  # [m, V]
        return self._draw(begin, len(self.tickets), logits)

    def step(self) -> list[Finished]:
        """One forward for all rows, one token for each."""
        if (len(self.tickets) - self.running) * _HOLES >= len(self.tickets):
            self._close_up()
        if self.cursor + 2 > self._rows.columns:
            self._relocate(len(self._pending), self.cursor - self._first)
        rows, starts = len(self.tickets), self._device_starts()
        self._cache.look(slice(0, rows), self._first, self.cursor)
        logits = self.model.last_logits(
            self._pending[:rows, None],
            mask=self._mask(0, rows, self._first, self.cursor + 1),
            positions=self.cursor - starts,
            cache=self._cache,
        )
        self.cursor += 1
        return self._draw(0, rows, logits)

    def leave(self, ticket: Ticket) -> None:
        """Forget a row. The next join closes its place up, or a step, once enough have left."""
        assert self.tickets[ticket.row] is ticket
        self.tickets[ticket.row] = None
        self._rows.alive[ticket.row] = False
        self.running -= 1
        ticket.row = -1

    def swap(self, model: LiveModel, *, recompute: bool) -> None:
        """Go on with other weights: over the old keys and values, or with all of the past computed again."""
        self._close_up()
        self.model = model
        for ticket in self.tickets:
            assert ticket is not None
            ticket.spans.append((model.version, int(self.cursor - self._rows.drawn_from[ticket.row]) + 1))
            ticket.mixed = not recompute
        if recompute:
            self._rows.seen[:] = self._rows.start
            for begin, end in self._chunks(0, len(self.tickets)):
                self._prefill(begin, end)

    # What sessions have seen

    def _recall(self, ticket: Ticket, states: States, seen: int) -> None:
        """Take the first `seen` tokens of the prompt from what its session left."""
        if seen:
            start = int(self._rows.start[ticket.row])
            self._cache.write(ticket.row, start, states, seen)
            self._rows.seen[ticket.row] = start + seen

    def _remember(self, ticket: Ticket) -> None:
        """Leave prompt and answer to the session's next request."""
        if ticket.session and not ticket.mixed and self._prefixes.wants_more():
            row, seen = ticket.row, slice(int(self._rows.start[ticket.row]), self.cursor)
            states = self._cache.read(row, seen.start, seen.stop)
            self._prefixes.keep(self.model, ticket.session, Past(self._rows.text[row, seen].copy(), states))

    # Rows and room

    def _place(self, ticket: Ticket) -> None:
        ticket.batch, ticket.row = self, len(self.tickets)
        ticket.spans.append((self.model.version, 0))
        self.tickets.append(ticket)
        self.running += 1
        self._rows.place(ticket, self.cursor)

    def _make_room(self, tickets: Sequence[Ticket]) -> None:
        """So that the joining prompts fit before the cursor, and some tokens behind it."""
        longest = max(len(ticket.prompt) for ticket in tickets)
        slack = min(256, max(ticket.max_tokens for ticket in tickets))
        if not self.running:
            self.cursor = self._first = longest
        rows, allocated = len(self.tickets) + len(tickets), len(self._pending)
        fits = longest <= self.cursor and self.cursor + 2 <= self._rows.columns
        if rows > allocated or not fits:
            room = allocated if rows <= allocated else min(self._max_rows, max(rows, 2 * allocated))
            self._relocate(room, max(longest, self.cursor - self._first), slack)

    def _relocate(self, rows: int, cursor: int, slack: int = 0) -> None:
        """Reallocate with the columns in use moved so that they end at `cursor`. Twice as wide, so it is rare."""
        columns = -(-max(cursor + slack + 2, 2 * (self.cursor - self._first)) // _ROUND) * _ROUND
        used, shift = len(self.tickets), cursor - self.cursor
        self._cache.reallocate(
            rows, columns, keep_rows=used, first=self._first, end=self.cursor, to=self._first + shift
        )
        self._rows = self._rows.moved(rows, columns, used, self._first, self.cursor + 1, shift)
        pending = self._pending.new_zeros(rows)
        pending[:used] = self._pending[:used]
        self._pending = pending
        self._first += shift
        self.cursor = cursor
        self._rows_changed()

    def _close_up(self) -> None:
        """Move the last rows into the places of those that left."""
        if self.running == len(self.tickets):
            return
        targets = [row for row in range(self.running) if self.tickets[row] is None]
        sources = [row for row in range(self.running, len(self.tickets)) if self.tickets[row] is not None]
        if targets:
            self._cache.move_rows(sources, targets, self._first, self.cursor)
            self._pending[targets] = self._pending[sources]
            self._rows.move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            ticket = self.tickets[source]
            assert ticket is not None
            self.tickets[target], ticket.row = ticket, target
        del self.tickets[self.running :]
        self._rows_changed()

    def _rows_changed(self) -> None:
        self._starts = self._params = None
        if self.tickets:
            self._first = int(self._rows.start[: len(self.tickets)].min())

    def _chunks(self, begin: int, end: int, *, even: bool = False) -> list[tuple[int, int]]:
        """Ranges of rows whose padded prefill stays within `prefill_tokens`; `even`: with little padding, if sorted."""
        chunks = []
        while begin < end:
            new = self.cursor - self._rows.seen[begin:end]
            width = np.maximum.accumulate(new)
            fits = width * np.arange(1, end - begin + 1) <= self._prefill_tokens
            if even:
                fits &= width - new <= np.maximum(new, _PADDING)
            count = max(1, int(fits.sum()))
            chunks.append((begin, begin + count))
            begin += count
        return chunks

    # Forward and draw

    def _prefill(self, begin: int, end: int) -> Tensor:
        """Compute the keys and values before the cursor that are not there yet; logits [end - begin, V] of the last."""
        first, seen = int(self._rows.start[begin:end].min()), int(self._rows.seen[begin:end].min())
        device = self._pending.device
        ids = torch.from_numpy(self._rows.text[begin:end, seen : self.cursor]).to(device)  # [m, Q]
        positions = torch.arange(seen, self.cursor, device=device) - self._device_starts()[begin:end]  # [m, Q]
        self._cache.look(slice(begin, end), first, seen)
        return self.model.last_logits(
            ids, mask=self._mask(begin, end, first, self.cursor), positions=positions.clamp_(0), cache=self._cache
        )

    def _draw(self, begin: int, end: int, logits: Tensor) -> list[Finished]:
        """Draw the tokens of column `cursor` for a range of rows, and let go of the rows that end with them."""
        rows, whole = self._rows, (begin, end) == (0, len(self.tickets))
        params = self._params if whole else None
        if params is None:
            params = rows.draw_params(begin, end, logits)
            if whole:
                self._params = params
        drawn = draw(logits, params, uniforms(rows.stream[begin:end], self.cursor - rows.drawn_from[begin:end]))
        self._pending[begin:end] = drawn.tokens
        tokens = drawn.tokens.cpu().numpy()  # [n]
        rows.text[begin:end, self.cursor] = tokens
        rows.logprobs[begin:end, self.cursor] = drawn.logprobs.cpu().numpy()
        stopped = (tokens[:, None] == rows.stops[begin:end]).any(1)
        ended = (stopped | (rows.last[begin:end] == self.cursor)) & rows.alive[begin:end]
        if not ended.any():
            return []
        done = [(self.tickets[begin + i], bool(stopped[i])) for i in np.flatnonzero(ended)]
        finished = [self._finish(ticket, "stop" if stop else "length") for ticket, stop in done if ticket is not None]
        for item in finished:
            self._remember(item.ticket)
            self.leave(item.ticket)
        return finished

    def _finish(self, ticket: Ticket, reason: FinishReason) -> Finished:
        drawn = slice(int(self._rows.drawn_from[ticket.row]), self.cursor + 1)
        ends = [begin for _, begin in ticket.spans[1:]] + [drawn.stop - drawn.start]
        versions = [v for (v, begin), end in zip(ticket.spans, ends, strict=True) for _ in range(begin, end)]
        return Finished(
            ticket,
            Completion(
                tokens=self._rows.text[ticket.row, drawn].tolist(),
                logprobs=self._rows.logprobs[ticket.row, drawn].tolist(),
                versions=versions,
                finish_reason=reason,
            ),
        )

    def _mask(self, begin: int, end: int, first: int, stop: int) -> Tensor | None:
        """[rows, columns] bool, True where a row has a token; None where all have, which kernels like best."""
        if int(self._rows.start[begin:end].max()) <= first:
            return None
        return torch.arange(first, stop, device=self._pending.device) >= self._device_starts()[begin:end]

    def _device_starts(self) -> Tensor:
        if self._starts is None:
            self._starts = torch.tensor(self._rows.start[: len(self.tickets), None], device=self._pending.device)
        return self._starts


class _RowTable:
    """The per-row arrays of a batch, [R] or [R, ...], on the host."""

    def __init__(self, rows: int, columns: int, stops: int = 1) -> None:
        self.columns = columns
        self.alive = np.zeros(rows, dtype=bool)
        self.start = np.zeros(rows, dtype=np.int64)  # column of the first prompt token
        self.seen = np.zeros(rows, dtype=np.int64)  # column of the first token that a prefill must compute
        self.drawn_from = np.zeros(rows, dtype=np.int64)  # column of the first drawn token
        self.last = np.zeros(rows, dtype=np.int64)  # column of the last token that may be drawn
        self.stream = np.zeros(rows, dtype=np.uint64)
        self.temperature = np.ones(rows, dtype=np.float32)
        self.top_k = np.zeros(rows, dtype=np.int64)
        self.top_p = np.ones(rows, dtype=np.float32)
        self.stops = np.full((rows, stops), -1, dtype=np.int64)
        self.text = np.zeros((rows, columns), dtype=np.int64)  # prompt and drawn tokens
        self.logprobs = np.zeros((rows, columns), dtype=np.float32)

    def place(self, ticket: Ticket, cursor: int) -> None:
        row, params = ticket.row, ticket.params
        self.alive[row] = True
        self.start[row] = self.seen[row] = cursor - len(ticket.prompt)
        self.drawn_from[row] = cursor
        self.last[row] = cursor + ticket.max_tokens - 1
        self.stream[row] = ticket.stream
        self.temperature[row] = params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.text[row, self.start[row] : cursor] = ticket.prompt
        if len(params.stop_token_ids) > self.stops.shape[1]:
            wider = len(params.stop_token_ids) - self.stops.shape[1]
            self.stops = np.pad(self.stops, ((0, 0), (0, wider)), constant_values=-1)
        self.stops[row] = -1
        self.stops[row, : len(params.stop_token_ids)] = params.stop_token_ids

    def move(self, sources: list[int], targets: list[int]) -> None:
        for array in self._arrays():
            array[targets] = array[sources]

    def moved(self, rows: int, columns: int, keep_rows: int, first: int, end: int, shift: int) -> _RowTable:
        """A larger table with the first rows of this one, all their columns shifted."""
        table = _RowTable(rows, columns, self.stops.shape[1])
        if not keep_rows:
            return table
        for new, old in zip(table._arrays(), self._arrays(), strict=True):
            if new is table.text or new is table.logprobs:
                new[:keep_rows, first + shift : end + shift] = old[:keep_rows, first:end]
            else:
                new[:keep_rows] = old[:keep_rows]
        for array in (table.start, table.seen, table.drawn_from, table.last):
            array[:keep_rows] += shift
        return table

    def draw_params(self, begin: int, end: int, logits: Tensor) -> DrawParams:
        """As tensors beside `logits` [end - begin, V]."""
        device, vocabulary = logits.device, logits.shape[-1]
        greedy = self.temperature[begin:end] == 0
        top_k, top_p = self.top_k[begin:end, None], self.top_p[begin:end, None]
        top_k = np.where(top_k == 0, vocabulary, top_k)
        temperature = np.where(greedy, 1, self.temperature[begin:end])[:, None].astype(np.float32)
        return DrawParams(
            temperature=torch.from_numpy(temperature).to(device),
            greedy=torch.from_numpy(greedy).to(device) if greedy.any() else None,
            top_k=torch.from_numpy(top_k).to(device) if (top_k < vocabulary).any() else None,
            top_p=torch.tensor(top_p, device=device) if (top_p < 1).any() else None,
        )

    def _arrays(self) -> list[np.ndarray]:
        return [
            self.alive,
            self.start,
            self.seen,
            self.drawn_from,
            self.last,
            self.stream,
            self.temperature,
            self.top_k,
            self.top_p,
            self.stops,
            self.text,
            self.logprobs,
        ]
