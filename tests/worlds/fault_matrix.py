"""The fault matrix: each call that a stage makes to what lies outside its process x each way in which it can fail.

The rows are made from the interfaces of `headrace/contract/interfaces`: a method that is added there is a row without
anyone remembering. A stage joins the matrix with a `StageWorld`: its interfaces, a way to start a process of it, and
checkers that stand outside. A cell is run so:

1. One process of the stage works, and one call of it meets one fault. It ends its work, or it stops loudly, or it dies.
   One that does neither within the virtual time in which every bound has passed, waits for ever: that is a failure.
   Where it is a call that only a process makes which goes on from a stored state, another one was killed before it.
2. A process that ended its work must have done all of it: the checkers look at once.
3. Another process begins from what is stored and ends the work, without help; the checkers look again.

Threads are turns of the loop and sleeps are turns too, under a virtual clock: a cell takes milliseconds, and nothing
but the cell says what happens.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from headrace.backends.clock import VirtualClock
from headrace.contract import interfaces
from headrace.contract.errors import Overloaded, Unavailable
from headrace.process.call_watch import ANSWER_MAX_S, CallWatch
from headrace.process.watchdog import STILL_MAX_S, Watchdog

BEFORE_STEPS = 6
"""Steps of the process that is killed before: some of its work is stored then."""
STEP_S = 0.05
LATER_STEP_S = 2.0
QUICK_STEPS, STEPS_MAX = 300, 600
"""300 steps of 0.05 s are the work; 300 of 2 s are longer than every bound together."""
RECEIPT = ".delivered"


class Fault(Enum):
    """A way in which one call fails."""

    UNAVAILABLE = "raises Unavailable"
    UNEXPECTED = "raises RuntimeError"
    MEMORY = "raises MemoryError"
    BARE = "raises Exception"
    AWAY = "raises Unavailable from then on"
    FULL = "raises Overloaded from then on"
    NEVER = "never returns"
    NEVER_LATE = "never returns, takes effect while the next process works"
    NEVER_DONE = "takes effect and never returns"
    DONE_UNAVAILABLE = "takes effect, then raises Unavailable"
    DONE_UNEXPECTED = "takes effect, then raises RuntimeError"
    DIES_BEFORE = "the process dies before it"
    DIES_IN = "the process dies in it, it takes effect"
    DIES_AFTER = "the process dies after it"


RAISES: dict[Fault, Callable[[], Exception]] = {
    Fault.UNAVAILABLE: lambda: Unavailable("injected"),
    Fault.UNEXPECTED: lambda: RuntimeError("injected"),
    Fault.MEMORY: lambda: MemoryError("injected"),
    Fault.BARE: lambda: Exception("injected"),
    Fault.AWAY: lambda: Unavailable("injected"),
    Fault.FULL: lambda: Overloaded("injected"),
    Fault.DONE_UNAVAILABLE: lambda: Unavailable("injected"),
    Fault.DONE_UNEXPECTED: lambda: RuntimeError("injected"),
}
LASTING = (Fault.AWAY, Fault.FULL)
EFFECT_FIRST = (Fault.DONE_UNAVAILABLE, Fault.DONE_UNEXPECTED, Fault.NEVER_DONE, Fault.DIES_IN)
HANGS = (Fault.NEVER, Fault.NEVER_LATE, Fault.NEVER_DONE)
RECEIPT_FAULTS = (
    Fault.UNAVAILABLE,
    Fault.AWAY,
    Fault.DONE_UNAVAILABLE,
    Fault.NEVER,
    Fault.NEVER_DONE,
    Fault.DIES_BEFORE,
    Fault.DIES_AFTER,
)
"""A receipt says that a record was refused, or says so of one that was taken, or does not come."""


@dataclass(frozen=True)
class Call:
    """A row: a method of an interface, or the receipt that it promises."""

    interface: type
    method: str

    def __str__(self) -> str:
        return f"{self.interface.__name__}.{self.method}"


@dataclass(frozen=True)
class Cell:
    """One call of a row, counted from 0 in its process, and how it fails."""

    call: Call
    fault: Fault
    number: int
    goes_on: bool = False
    """The process goes on from what another one stored."""

    def __str__(self) -> str:
        going_on = ", going on from a stored state" if self.goes_on else ""
        return f"{self.call} {self.fault.value}, call {self.number}{going_on}"


def calls_of(interface: type) -> list[Call]:
    """Return the rows of an interface: its methods, and a receipt for each method that promises one."""
    rows = []
    for name, member in vars(interface).items():
        if name.startswith("_") or not inspect.isfunction(member):
            continue
        rows.append(Call(interface, name))
        if "delivered" in inspect.signature(member).parameters:
            rows.append(Call(interface, name + RECEIPT))
    return rows


def faults_of(call: Call) -> tuple[Fault, ...]:
    """Return all ways in which a row can fail; `Overloaded` is for what says that it may raise it."""
    if call.method.endswith(RECEIPT):
        return RECEIPT_FAULTS
    may_be_full = "Overloaded" in (getattr(call.interface, call.method).__doc__ or "")
    return tuple(fault for fault in Fault if fault is not Fault.FULL or may_be_full)


def contract_interfaces() -> list[type]:
    """Return every interface of `headrace/contract/interfaces`."""
    found = []
    for module in pkgutil.iter_modules(interfaces.__path__):
        named = importlib.import_module(f"{interfaces.__name__}.{module.name}")
        found += [
            member
            for member in vars(named).values()
            if inspect.isclass(member) and Protocol in member.__bases__ and member.__module__ == named.__name__
        ]
    return found


class Killed(BaseException):
    """The process died here: nothing that it had in memory remains."""


class Hangs(BaseException):
    """The call, in a thread of its own, does not return."""


class StandsStill(AssertionError):
    """The stage neither works, nor stops."""


@dataclass
class Process:
    """What the calls of one process go through; `cell` is the fault that it meets, None for none."""

    clock: VirtualClock
    cell: Cell | None = None
    outage_s: float = float("inf")
    is_dead: bool = False
    met: bool = False
    met_s: float | None = None
    in_thread: bool = False
    is_starting: bool = False
    """Its loop does not turn yet, and nobody looks whether it does: the watch of the calls alone ends the process."""
    called: Counter[Call] = field(default_factory=Counter)
    late: list[Callable[[], Any]] = field(default_factory=list)
    """What takes effect only after the process ended."""
    refused: list[Callable[[], Any]] = field(default_factory=list)
    """Receipts of records that the log did not take; they come with the next call of the interface."""
    hung: list[asyncio.Future[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watchdog = Watchdog(self.clock.monotonic, self._end)
        self.calls = CallWatch(self.clock.monotonic, self._end, by_itself=False)

    def wrap(self, interface: type, inner: Any) -> Any:
        """Return `inner` behind the process's faults."""
        return _Faulty(self, interface, inner)

    def call(self, call: Call, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do what one outside call does here."""
        if self.is_dead:
            raise Killed
        while self.refused and call.method == "poll":
            self.refused.pop(0)()
            if self.is_dead:
                raise Killed
        fault = self._fault(call)
        if kwargs.get("delivered") is not None and fault is None:
            receipt = self._fault(Call(call.interface, call.method + RECEIPT))
            if receipt is not None:
                target = self._with_receipt(receipt, target, kwargs["delivered"])
        if fault is None:
            return target(*args, **kwargs)
        if fault is Fault.DIES_BEFORE:
            self.is_dead = True
            raise Killed
        if fault is Fault.NEVER_LATE:
            self.late.append(lambda: target(*args, **kwargs))
        if fault in EFFECT_FIRST or fault is Fault.DIES_AFTER:
            result = target(*args, **kwargs)
        if fault is Fault.DIES_AFTER:
            self.is_dead = True
            return result
        if fault is Fault.DIES_IN:
            self.is_dead = True
            raise Killed
        if fault in HANGS:
            self._hang()
        raise RAISES[fault]()

    def _fault(self, call: Call) -> Fault | None:
        number = self.called[call]
        self.called[call] += 1
        cell = self.cell
        if cell is None or cell.call != call or number < cell.number:
            return None
        if number > cell.number and cell.fault not in LASTING:
            return None
        now_s = self.clock.monotonic()
        self.met_s = now_s if self.met_s is None else self.met_s
        if now_s - self.met_s > self.outage_s:
            return None
        self.met = True
        return cell.fault

    def _with_receipt(self, fault: Fault, send: Callable[..., Any], told: Callable[..., None]) -> Callable[..., Any]:
        """Return a `send` whose receipt is the fault: of a record that is taken, or of one that is not."""

        def tell(error: Exception | None = None, offset: int = -1) -> None:
            if fault in HANGS:
                return
            if fault in RAISES:
                told(RAISES[fault](), -1)
            if fault is Fault.DIES_AFTER:
                told(error, offset)
            self.is_dead = fault in (Fault.DIES_BEFORE, Fault.DIES_AFTER)

        def sent(*args: Any, **kwargs: Any) -> None:
            if fault in (*EFFECT_FIRST, Fault.DIES_AFTER):
                send(*args, **{**kwargs, "delivered": tell})
            else:
                self.refused.append(tell)

        return sent

    def _hang(self) -> None:
        if self.in_thread:
            raise Hangs
        # Nobody is left to see it but who looks from outside.
        watch, bound_s = (self.calls, ANSWER_MAX_S) if self.is_starting else (self.watchdog, STILL_MAX_S)
        self.clock.advance(bound_s + 1.0)
        watch.look()
        if not self.is_dead:
            raise StandsStill("a call does not return and nobody ends the process")
        raise Killed

    def _end(self, _why: str) -> None:
        self.is_dead = True


class _Faulty:
    def __init__(self, process: Process, interface: type, inner: Any) -> None:
        self._process, self._inner = process, inner
        self._rows = {call.method: call for call in calls_of(interface)}

    def __getattr__(self, name: str) -> Any:
        target = getattr(self._inner, name)
        if not callable(target) or name.startswith("_"):
            return target
        if name not in self._rows:
            raise AssertionError(f"{type(self._inner).__name__}.{name} is called and has no row in the matrix")
        return lambda *args, **kwargs: self._process.call(self._rows[name], target, *args, **kwargs)


class Stage(Protocol):
    """One process's stage, as the world drives it."""

    async def work(self) -> None:
        """Take the next few records, beginning with partitions that were not begun."""

    async def tick(self) -> None:
        """Let the stage do what is due. Raises what stops it."""

    async def finish(self) -> None:
        """Let the stage end."""

    def is_busy(self) -> bool:
        """Say whether there is something left to read, or something under way."""


class StageWorld(Protocol):
    """What outlives a stage's processes."""

    clock: VirtualClock

    def start(self, process: Process) -> Stage:
        """Start a process, all of whose outside calls go through `process`. Raises what ends it at its start."""

    def trouble(self) -> str:
        """Return what the checkers find once all work is done, "" when all is as it should be."""

    def close(self) -> None:
        """Remove what was stored."""


@dataclass(frozen=True)
class StageRow:
    """A stage in the matrix."""

    name: str
    interfaces: Sequence[type]
    world: Callable[[], StageWorld]
    not_called: dict[str, str]
    """Methods of its interfaces that the stage itself never calls, by "Interface.method", and who does."""
    outage_s: float = float("inf")
    """A fault from then on ends after this long: for a stage that waits for what is away, and never stops for it."""
    share: int = 3
    """One in how many cells is run in every test run."""

    def rows(self) -> Iterator[Call]:
        """Yield the calls that this stage makes."""
        for interface in self.interfaces:
            yield from (call for call in calls_of(interface) if str(call) not in self.not_called)


async def _live(
    world: StageWorld, process: Process, *, late: Sequence[Callable[[], Any]] = (), killed_at: int = STEPS_MAX
) -> BaseException | None:
    """Run a process to its end; return None when it ended its work, `Killed` when it died, or what stopped it."""

    process.is_starting = True
    try:
        stage = world.start(process)
    except (Exception, Killed) as error:
        return Killed() if process.is_dead else error
    finally:
        process.is_starting = False
    pace = asyncio.Event()

    async def read() -> None:
        while True:
            await pace.wait()
            pace.clear()
            await stage.work()

    def failed() -> BaseException | None:
        if process.is_dead:
            return Killed()
        return reading.exception() if reading.done() else None

    reading = asyncio.ensure_future(read())
    quiet = 0
    try:
        for step in range(STEPS_MAX):
            process.is_dead |= step == killed_at
            process.clock.advance(STEP_S if step < QUICK_STEPS else LATER_STEP_S)
            pace.set()
            for _ in range(6):
                await asyncio.sleep(0)
            process.watchdog.beat()
            if (error := failed()) is not None:
                return error
            try:
                await stage.tick()
            except BaseException as error:
                return Killed() if process.is_dead else error
            if step == 4:
                for effect in late:
                    _try(effect)
            quiet = 0 if stage.is_busy() else quiet + 1
            if quiet == 10:
                return await _finish(stage, process)
        raise StandsStill(f"after {process.clock.monotonic():.0f} s the stage still waits")
    finally:
        # What it left under way ends with the process.
        process.is_dead = True
        reading.cancel()
        await asyncio.wait([reading])


async def _finish(stage: Stage, process: Process) -> BaseException | None:
    """End the stage as the engine does: within a bound, after which the process ends anyway."""
    finishing = asyncio.ensure_future(stage.finish())
    for _ in range(200):
        await asyncio.sleep(0)
        if finishing.done() or process.is_dead:
            break
    if process.is_dead or not finishing.done():
        finishing.cancel()
        await asyncio.wait([finishing])
        return Killed() if process.is_dead else None
    return finishing.exception()


def _try(effect: Callable[[], Any]) -> None:
    """Let a call take effect whose process is gone: the store may refuse it, and nobody hears of its receipts."""
    try:
        effect()
    except (Exception, Killed):
        return


def check_cell(row: StageRow, cell: Cell) -> bool:
    """Run one cell; return whether its call was reached. Raises `AssertionError` with what is wrong."""

    world = row.world()

    async def run() -> bool:
        if cell.goes_on:
            before = CURRENT.process = Process(world.clock)
            await _live(world, before, killed_at=BEFORE_STEPS)
        process = CURRENT.process = Process(world.clock, cell, row.outage_s)
        ended = await _live(world, process)
        if isinstance(ended, AssertionError):
            raise ended
        if ended is None and (found := world.trouble()):
            raise AssertionError(f"{row.name}, {cell}: the stage ran on past a hole: {found}")
        if not process.met:
            return False
        following = CURRENT.process = Process(world.clock)
        again = await _live(world, following, late=process.late)
        if again is not None:
            raise AssertionError(f"{row.name}, {cell}: ended with {ended!r}; a restart ended with {again!r}")
        if found := world.trouble():
            raise AssertionError(f"{row.name}, {cell}: ended with {ended!r}; after a restart: {found}")
        return True

    try:
        return asyncio.run(run())
    except StandsStill as error:
        raise StandsStill(f"{row.name}, {cell}: {error}") from None
    finally:
        world.close()


def calls_made(row: StageRow, *, goes_on: bool = False) -> Counter[Call]:
    """Return how often an undisturbed process makes each call, one that begins or one that goes on."""
    world = row.world()

    async def run() -> Counter[Call]:
        if goes_on:
            before = CURRENT.process = Process(world.clock)
            await _live(world, before, killed_at=BEFORE_STEPS)
        process = CURRENT.process = Process(world.clock)
        ended = await _live(world, process)
        if (found := world.trouble()) or ended is not None:
            raise AssertionError(f"{row.name}, undisturbed: ended with {ended!r}; {found}")
        return process.called

    try:
        return asyncio.run(run())
    finally:
        world.close()


_MADE: dict[tuple[str, bool], Counter[Call]] = {}


def _made(row: StageRow, goes_on: bool) -> Counter[Call]:
    """Return `calls_made`, found out once."""
    if (row.name, goes_on) not in _MADE:
        _MADE[row.name, goes_on] = calls_made(row, goes_on=goes_on)
    return _MADE[row.name, goes_on]


def cells_of(row: StageRow, call: Call, which: Callable[[int], Sequence[int]]) -> Iterator[Cell]:
    """Yield a row's cells: all faults of the calls that `which` names, of so many that are made."""
    begins = _made(row, False)
    goes_on = not begins[call]
    made = _made(row, True)[call] if goes_on else begins[call]
    if not made:
        raise AssertionError(
            f"{row.name} never calls {call}: give its world a reason to, or say in not_called who does"
        )
    for fault in faults_of(call):
        for number in which(made):
            yield Cell(call, fault, number, goes_on)


class _Current:
    process: Process


CURRENT = _Current()


async def in_thread(_what: str, work: Callable[[], Any]) -> Any:
    """Do the work a turn of the loop later, in place of a thread; one that hangs never answers."""
    await asyncio.sleep(0)
    process = CURRENT.process
    process.in_thread = True
    try:
        return work()
    except Hangs:
        pass
    finally:
        process.in_thread = False
    process.hung.append(asyncio.get_running_loop().create_future())
    return await process.hung[-1]
