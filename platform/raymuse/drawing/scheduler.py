"""Pictures drawn as they are asked for: a row whose picture is done takes the next in, while its neighbours go on.

    waiting -> rows of the base -> decoded -> between -> rows of the super-resolution -> decoded -> done

Scheduling by the step is Orca's (Yu et al., OSDI 2022: iteration-level scheduling), here by the sampling step. Whatever
is done for a picture is done in calls of a fixed number of rows, so that the picture does not depend on its neighbours.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymuse.drawing.attention import attention_by
from raymuse.drawing.networks import Networks
from raymuse.drawing.parts import Parts
from raymuse.drawing.sampler import Rows, TokenTransformer, rows_at_once
from raymuse.drawing.tasks import UNKNOWN, Ids, Request, Stage
from raymuse.masking import CHOICE, CONFIDENCE, HIGH_CHOICE, HIGH_CONFIDENCE
from raymuse.models.vqgan import Vqgan, to_bytes

MOST_LANES = 4  # shapes that are drawn at a time: each holds the tables and conditions of `batch_size` rows
REMEMBERED = 64  # prompts whose text states are kept: the empty one comes again and again


@dataclass(frozen=True)
class Picture:
    """One drawn picture, uint8 (H, W, 3) with its ids (h, w), and the base's own where a cascade drew it."""

    pixels: NDArray[np.uint8]
    base_pixels: NDArray[np.uint8]
    ids: Ids
    base_ids: Ids


@dataclass(eq=False)
class Ticket:
    """A picture that is asked for.

    Attributes:
        urgent: it is begun before those that are not.
        on_step: told of the base's ids (h, w) after each of the picture's steps, the mask id where still unknown.
        cancelled: nothing more is done for it. May be set at any time, by any thread.
    """

    request: Request
    urgent: bool = False
    on_step: Callable[[Ids], None] | None = None
    cancelled: bool = False


class Scheduler:
    """Draws what is submitted, up to `networks.batch_size` pictures of a shape at a time. It belongs to one thread.

    Of more shapes than `MOST_LANES` the rest waits, in its order, so that clients who ask for many do not fill the
    memory; while it does, nobody is let in before it.
    """

    def __init__(self, networks: Networks) -> None:
        self.networks = networks
        self._texts, self._parts = _Texts(networks), _AllParts()
        self._lanes: OrderedDict[tuple[object, ...], _Lane] = OrderedDict()
        self._idle: OrderedDict[tuple[object, ...], _Lane] = OrderedDict()  # whose CUDA graphs are worth keeping
        self._outside = _Queue()

    def submit(self, ticket: Ticket) -> None:
        """Have a picture drawn by the calls of `advance` that follow. Raises what keeps its shape from being drawn."""
        self._outside.put(ticket)
        for _, error in self._let_in():
            raise error

    @property
    def busy(self) -> bool:
        """Whether `advance` has anything to do."""
        return bool(self._lanes)

    @torch.no_grad()
    def advance(self) -> list[tuple[Ticket, Picture | Exception]]:
        """One step of all pictures of one shape, the shapes in turn.

        Returns those that it finished; where it fails, all pictures of the shape with the reason.
        """
        if not self._lanes:
            return []
        shape, lane = self._lanes.popitem(last=False)
        try:
            with attention_by(self.networks.attention):
                done = lane.advance()
        except Exception as error:
            return [*((ticket, error) for ticket in lane.open), *self._let_in()]
        ended = {ticket for ticket, _ in done}
        lane.open = {ticket: None for ticket in lane.open if not (ticket.cancelled or ticket in ended)}
        if lane.busy:
            self._lanes[shape] = lane
        elif self.networks.cuda_graphs:
            self._idle[shape] = lane
            self._keep_idle(MOST_LANES - len(self._lanes))
        return [*done, *self._let_in()]

    def _let_in(self) -> list[tuple[Ticket, Exception]]:
        """Those that wait outside, in their order, until one of them has a shape that there is no lane for.

        Returns those whose lane cannot be made, e.g. for lack of memory, with the reason.
        """
        failed: list[tuple[Ticket, Exception]] = []
        while (ticket := self._outside.next()) is not None:
            shape = ticket.request.shape
            if shape not in self._lanes and len(self._lanes) >= MOST_LANES:
                break
            self._outside.take(1)
            if shape not in self._lanes:
                idle = self._idle.pop(shape, None)
                self._keep_idle(MOST_LANES - len(self._lanes) - 1)
                try:
                    self._lanes[shape] = idle or _Lane(self.networks, self._texts, self._parts, ticket.request)
                except Exception as error:
                    failed.append((ticket, error))
                    continue
            self._lanes[shape].put(ticket)
        return failed

    def _keep_idle(self, most: int) -> None:
        """Only the last ones: with those that are drawn they are `MOST_LANES`."""
        while len(self._idle) > most:
            self._idle.popitem(last=False)


@dataclass(eq=False)
class _Begun:
    """A picture on its way: what its stages need of each other."""

    ticket: Ticket
    states: Tensor
    free_states: Tensor | None
    base_ids: Tensor | None = None
    base_means: Tensor | None = None  # of what the super-resolution reads ids as
    base_pixels: NDArray[np.uint8] | None = None


class _Lane:
    """The pictures of one shape."""

    def __init__(self, networks: Networks, texts: "_Texts", parts: "_AllParts", like: Request) -> None:
        self.networks, self.texts = networks, texts
        self.open: dict[Ticket, None] = {}  # asked for and not done
        self.waiting, self.between = _Queue(), deque[_Begun]()
        self.critic = networks.critic if like.base.draws.order == "critic" else None
        vectors = [networks.vqgan.codebook]
        if networks.superres is not None:
            vectors.append(networks.superres.low_embed.weight[: networks.vqgan.codes])
        self.base = _Seats(
            _rows(networks, networks.base, like.base, (CHOICE, CONFIDENCE), self.critic, parts, "step", vectors),
            networks.vqgan,
            networks.group,
            parts,
            tells=True,
        )
        self.high = None
        if like.high is not None and networks.superres is not None and networks.superres_vqgan is not None:
            streams, name = (HIGH_CHOICE, HIGH_CONFIDENCE), "super-resolution step"
            own = networks.superres_vqgan
            high = _rows(networks, networks.superres, like.high, streams, None, parts, name, [own.codebook])
            self.high = _Seats(high, own, networks.group, parts, tells=False)
        self.micro = _micro(networks, like.base.ids.shape)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.between or self.base.taken or (self.high and self.high.taken))

    def put(self, ticket: Ticket) -> None:
        self.open[ticket] = None
        self.waiting.put(ticket)

    def advance(self) -> list[tuple[Ticket, Picture]]:
        """One step of the super-resolution's rows, and one of the base's. Returns what is done."""
        done = []
        if self.high is not None:
            for rows in self.high.free():
                self._begin_high(self.high, rows)
            for begun, ids, _, pixels in self.high.step():
                done.append((begun.ticket, _picture(begun, ids, pixels)))
        for rows in self.base.free():
            self._begin_base(rows)
        for begun, ids, means, pixels in self.base.step():
            begun.base_ids, begun.base_means, begun.base_pixels = ids, means, pixels
            if self.high is None:
                done.append((begun.ticket, _picture(begun, ids, pixels)))
            else:
                self.between.append(begun)
        return done

    def _begin_base(self, rows: list[int]) -> None:
        """Those that wait take free rows."""
        if not (tickets := self.waiting.take(len(rows))):
            return
        requests = [ticket.request for ticket in tickets]
        states, pooled = self.texts([request.prompt for request in requests])
        free_states = free = None
        if any(stage.course.guided for request in requests for stage in (request.base, request.high) if stage):
            free_states, free_pooled = self.texts([request.negative for request in requests])
            free = self.networks.base.condition(free_states, free_pooled, self.micro)
        begun = [
            _Begun(ticket, states[row], None if free_states is None else free_states[row])
            for row, ticket in enumerate(tickets)
        ]
        self.base.begin(
            rows,
            begun,
            [request.base for request in requests],
            self.networks.base.condition(states, pooled, self.micro),
            free,
            None if self.critic is None else self.critic.condition(states, pooled, self.micro),
        )

    def _begin_high(self, high: "_Seats", rows: list[int]) -> None:
        """Those that the base is done with take free rows."""
        begun = [self.between.popleft() for _ in rows[: len(self.between)]]
        if not (begun := [one for one in begun if not one.ticket.cancelled]):
            return
        superres = self.networks.superres
        assert superres is not None
        stages = [one.ticket.request.high for one in begun if one.ticket.request.high is not None]
        states, low = self._group([one.states for one in begun]), self._group([one.base_ids for one in begun])
        means = None if begun[0].base_means is None else self._group([one.base_means for one in begun])
        conditional, free = superres.condition(states, low, means), None
        if any(stage.course.guided for stage in stages):
            free = superres.retold(conditional, self._group([one.free_states for one in begun]))
        high.begin(rows, begun, stages, conditional, free)

    def _group(self, given: Sequence[Tensor | None]) -> Tensor:
        """A whole group of rows, with one of those that are given in place of any that is missing."""
        some = next(row for row in given if row is not None)
        missing = [None] * (self.networks.group - len(given))
        return torch.stack([some if row is None else row for row in (*given, *missing)])


class _Seats:
    """The rows of one network, and whose picture is in each."""

    def __init__(self, rows: Rows, vqgan: Vqgan, group: int, parts: "_AllParts", tells: bool) -> None:
        self.rows, self.vqgan, self.group, self.tells = rows, vqgan, group, tells
        self.parts = parts[f"decoding {rows.ids.shape[1]} x {rows.ids.shape[2]} ids"]
        self.begun: list[_Begun | None] = [None] * len(rows.ids)

    @property
    def taken(self) -> bool:
        return any(begun is not None for begun in self.begun)

    def free(self) -> Iterator[list[int]]:
        """Free rows by whole groups: beginning one picture, and decoding one, costs as much as a group."""
        for row, begun in enumerate(self.begun):
            if begun is not None and begun.ticket.cancelled:
                self.begun[row] = None
                self.rows.clear(row)
        rows = [row for row, begun in enumerate(self.begun) if begun is None]
        taken = Counter(row // self.rows.at_once for row, begun in enumerate(self.begun) if begun is not None)
        rows.sort(key=lambda row: -taken[row // self.rows.at_once])  # those of passes that are made anyway
        return (rows[first : first + self.group] for first in range(0, len(rows) - self.group + 1, self.group))

    def begin(
        self,
        rows: list[int],
        begun: list[_Begun],
        stages: list[Stage],
        conditional: Any,
        free: Any | None,
        judged: Any | None = None,
    ) -> None:
        rows = rows[: len(begun)]
        ids = torch.from_numpy(np.stack([stage.ids for stage in stages])).to(self.rows.ids.device)
        self.rows.admit(
            rows,
            conditional,
            free,
            judged,
            ids=torch.where(ids == UNKNOWN, int(self.rows.network.config.mask_id), ids),
            seeds=[one.ticket.request.seed for one in begun],
            courses=[stage.course for stage in stages],
        )
        for row, one in zip(rows, begun, strict=True):
            self.begun[row] = one

    def step(self) -> Iterator[tuple[_Begun, Tensor, Tensor | None, NDArray[np.uint8]]]:
        """One step. Those whose course ended with it leave their rows, with their ids (h, w) and pixels.

        Between these, where means are decoded, those (h, w, V - D) of the vectors beside the codes.
        """
        held = [(row, begun) for row, begun in enumerate(self.begun) if begun is not None]
        if going := [(row, begun) for row, begun in held if not self.rows.ended(row)]:
            self.rows.step()
        for row, begun in going:
            if self.tells and begun.ticket.on_step is not None:
                begun.ticket.on_step(self.rows.ids[row].cpu().numpy().copy())
        ended = [(row, begun) for row, begun in held if self.rows.ended(row)]
        for first in range(0, len(ended), self.group):
            some = ended[first : first + self.group]
            rows = [row for row, _ in some]
            group = [*rows, *rows[:1] * (self.group - len(rows))]
            ids = self.rows.ids[group]
            self.rows.require_finite(rows)
            codes, means = self.vqgan.codebook[ids], None
            if self.rows.means is not None:
                kept = self.rows.means.values[group].view(*ids.shape, -1)
                codes, means = kept.tensor_split([codes.shape[-1]], dim=-1)
            pixels = to_bytes(self.parts.run(len(ids), partial(self._decoded, codes)))
            for row in rows:
                self.begun[row] = None
            for place, (_, begun) in enumerate(some):
                yield begun, ids[place], None if means is None else means[place], pixels[place]

    def _decoded(self, codes: Tensor, part: slice) -> Tensor:
        return self.vqgan.decode_codes(codes[part])


class _AllParts(dict[str, Parts]):
    """In how many parts each kind of work is done, by its name; what was found out holds for lanes to come."""

    def __missing__(self, name: str) -> Parts:
        self[name] = Parts(name)
        return self[name]


def _rows(
    networks: Networks,
    network: TokenTransformer,
    like: Stage,
    streams: tuple[int, int],
    critic: TokenTransformer | None,
    parts: dict[str, Parts],
    name: str,
    vectors: Sequence[Tensor],
) -> Rows:
    """Rows of a stage's shape.

    Args:
        name: what its step is called where it does not fit into memory.
        vectors: what an id stands for, side by side, where their means are wanted.
    """
    count, device, (height, width) = networks.batch_size, networks.vqgan.network.device, like.ids.shape
    at_once, known = rows_at_once(count, like.ids.size, device), parts[f"a {name} of {height} x {width} ids"]
    shape, graphs = (count, height, width), networks.cuda_graphs
    told = torch.cat([each.float() for each in vectors], dim=1) if like.draws.decode == "mean" else None
    return Rows(network, shape, like.draws, streams, critic, device, at_once, known, graphs, told)


class _Queue:
    """Tickets in their order, the urgent ones first."""

    def __init__(self) -> None:
        self.urgent, self.other = deque[Ticket](), deque[Ticket]()

    def __bool__(self) -> bool:
        return bool(self.urgent or self.other)

    def put(self, ticket: Ticket) -> None:
        (self.urgent if ticket.urgent else self.other).append(ticket)

    def next(self) -> Ticket | None:
        """The first one that was not cancelled; it stays."""
        while self:
            if not (first := self.urgent or self.other)[0].cancelled:
                return first[0]
            first.popleft()
        return None

    def take(self, most: int) -> list[Ticket]:
        """The next ones, without those that were cancelled."""
        taken: list[Ticket] = []
        while len(taken) < most and (ticket := self.next()) is not None:
            (self.urgent or self.other).popleft()
            taken.append(ticket)
        return taken


class _Texts:
    """What prompts say to the networks; each is encoded once, and remembered for a while."""

    def __init__(self, networks: Networks) -> None:
        self.networks = networks
        self.known: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (G, T, E) and pooled vectors (G, P) of a group of up to G prompts, the rest empty ones."""
        group = self.networks.group
        prompts = [*prompts, *[""] * (group - len(prompts))]
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]:
            states, pooled = self.networks.text([*new, *[""] * (group - len(new))])
            self.known |= {prompt: (states[row], pooled[row]) for row, prompt in enumerate(new)}
        for prompt in prompts:
            self.known.move_to_end(prompt)
        said = [self.known[prompt] for prompt in prompts]
        while len(self.known) > REMEMBERED:
            self.known.popitem(last=False)
        return torch.stack([states for states, _ in said]), torch.stack([pooled for _, pooled in said])


def _micro(networks: Networks, grid: tuple[int, ...]) -> Tensor:
    """Micro-conditions (G, 5): the model's own, with width and height in proportion to the size that is drawn."""
    width, height, top, left, aesthetic = networks.settings.micro_conditioning
    side = networks.settings.base_size // networks.vqgan.factor
    row = [width * grid[1] / side, height * grid[0] / side, top, left, aesthetic]
    return torch.tensor([row] * networks.group, device=networks.vqgan.network.device)


def _picture(begun: _Begun, ids: Tensor, pixels: NDArray[np.uint8]) -> Picture:
    """The end of a picture: what lies outside a mask that it came with is its own again."""
    assert begun.base_ids is not None
    assert begun.base_pixels is not None
    if begun.ticket.request.paste is not None:
        own, mask = begun.ticket.request.paste
        pixels = np.where(mask[:, :, None], pixels, own)
    return Picture(pixels, begun.base_pixels, ids.cpu().numpy(), begun.base_ids.cpu().numpy())
