"""Work that falls into shards, spread over this machine's processes or over a Ray cluster.

A shard is a function of its arguments that leaves a file or folder behind and gives nothing back.
One that fails, or whose process dies, is named at once and tried a second time after the others.
Shards are taken when somebody is free: what gives them may read more than memory holds.
"""

import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Literal

from selfsup import console
from selfsup.cores import cores
from selfsup.errors import ConfigError, SelfsupError, StorageError

Shard = tuple[str, tuple]  # its name, and the arguments of the work
Work = Callable[..., None]
Ended = Iterator[tuple[Shard, Exception | None]]  # and what it failed of
Outcome = tuple[Exception | None, list[str]]
Engine = Literal["local", "ray"]
ENGINES = ("local", "ray")
HELD = 16  # failed shards that wait for their second try; with so many, no other is begun
NUMBER = "SELFSUP_WORKER"  # the variable that tells this machine's workers apart: 0, 1, ...


@dataclass(frozen=True)
class Workers:
    """Who works.

    Attributes:
        jobs: processes side by side on this machine; 1: this process itself.
        engine: "ray" gives every shard to one processor of a Ray cluster: that of RAY_ADDRESS, or
            the one that `ray start` joined this machine to, or else one of this machine alone.
    """

    jobs: int = 1
    engine: Engine = "local"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"engine must be local or ray, got {self.engine!r}")
        if self.jobs < 1:
            raise ConfigError(f"jobs must be at least 1, got {self.jobs}")

    def run(self, work: Work, shards: Iterable[Shard], title: str, *, gpu: bool = False) -> None:
        """Calls `work(*arguments)` for every shard, in any order.

        Args:
            work: a function of a module, called with what can be sent to another process.
            shards: names, for messages, and arguments.
            title: for the progress display.
            gpu: on a Ray cluster that has GPUs, each shard has one of them to itself.

        Raises:
            SelfsupError: shards failed twice, of the kind of the first one; the others are done,
                or not begun where many failed.
            StorageError: there is no room for any; at once.
            ConfigError: wrong use, which no second try mends, or Ray is missing; at once.
        """
        left, tried = iter(shards), 0
        with console.progress(title, len(shards) if isinstance(shards, Sized) else None) as shown:

            def failures(some: Iterator[Shard], then: str) -> Iterator[tuple[Shard, Exception]]:
                nonlocal tried
                for shard, error in self._ended(work, some, gpu):
                    tried += 1
                    if error is None:
                        shown.advance(1, shard[0])
                    elif isinstance(error, StorageError | ConfigError):
                        raise error
                    else:
                        console.warn(f"{shard[0]}: {error}; {then}")
                        yield shard, error

            while True:
                failed: list[Shard] = []
                for shard, _ in failures(_while_few(failed, left), "it is tried again at the end"):
                    failed.append(shard)
                if not failed:
                    return
                tried -= len(failed)
                lost = list(failures(iter(failed), "that was its last"))
                if lost:
                    break
        (name, _), error = lost[0]
        names = ", ".join(name for (name, _), _ in lost[:5]) + (", ..." if len(lost) > 5 else "")
        kind = type(error) if isinstance(error, SelfsupError) else SelfsupError
        raise kind(
            f"{len(lost)} of {tried} shards failed twice: {names}; what was made is kept. "
            f"{name}: {error}. Mend it and run the same command again."
        ) from error

    def _ended(self, work: Work, shards: Iterator[Shard], gpu: bool) -> Ended:
        if self.engine == "ray":
            return _on_ray(work, shards, gpu)
        return _here(work, shards) if self.jobs == 1 else _processes(work, shards, self.jobs)


def _while_few(failed: list[Shard], shards: Iterator[Shard]) -> Iterator[Shard]:
    while len(failed) < HELD and (shard := next(shards, None)) is not None:
        yield shard


def _here(work: Work, shards: Iterator[Shard]) -> Ended:
    for shard in shards:
        try:
            with console.quiet():
                work(*shard[1])
        except SelfsupError as error:
            yield shard, error
        else:
            yield shard, None


# This machine's processes: each does one shard at a time, so that a death has a name


def _processes(work: Work, shards: Iterator[Shard], jobs: int) -> Ended:
    said = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, (int(said) if said.isdecimal() else cores()) // jobs)
    started: dict[int, tuple[Connection, SpawnProcess]] = {}
    idle = list(range(jobs))[::-1]
    busy: dict[Connection, tuple[int, Shard]] = {}
    try:
        while True:
            while idle and (shard := next(shards, None)) is not None:
                number = idle.pop()
                if number not in started:
                    started[number] = _start(number, threads)
                connection, process = started[number]
                with suppress(OSError):  # of one that is dead, which shows below
                    connection.send((work, shard[1]))
                busy[connection] = number, shard
            if not busy:
                return
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                number, shard = busy.pop(ready)
                try:
                    error = _repeated(shard, ready.recv())
                except (EOFError, OSError):
                    _, process = started.pop(number)
                    process.join()
                    error = SelfsupError(_death(process.pid, process.exitcode))
                    ready.close()
                idle.append(number)
                yield shard, error
    finally:
        for connection, process in started.values():
            process.terminate()
            process.join()
            connection.close()


def _start(number: int, threads: int) -> tuple[Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker, args=(theirs, number, threads), daemon=True)
    process.start()
    theirs.close()  # so that its death ends the pipe
    return ours, process


def _worker(connection: Connection, number: int, threads: int) -> None:
    """Works until its parent ends it, or has ended itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is its parent's matter
    os.environ[NUMBER] = str(number)
    _limit(threads)
    with suppress(EOFError, ConnectionError):
        while True:
            work, arguments = connection.recv()
            connection.send(_outcome(work, arguments))


def _limit(threads: int) -> None:
    """Those of torch, of BLAS and of the tokenizer."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    if "torch" in sys.modules:  # too late for the variable
        sys.modules["torch"].set_num_threads(threads)


def _outcome(work: Work, arguments: tuple) -> Outcome:
    """What the work failed of, in a form that can be sent, and its warnings."""
    with console.overheard() as warnings:
        try:
            work(*arguments)
        except SelfsupError as error:
            return error, warnings
        except Exception:
            return SelfsupError(traceback.format_exc().strip()), warnings
    return None, warnings


def _repeated(shard: Shard, outcome: Outcome) -> Exception | None:
    """What it failed of; its warnings are given here."""
    error, warnings = outcome
    for text in warnings:
        console.warn(f"{shard[0]}: {text}")
    return error


def _death(process: int | None, code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process {process} was killed by signal {-code} (9 is often too little memory)"
    return f"its process {process} ended without a word, with exit code {code}"


# Ray


def _on_ray(work: Work, shards: Iterator[Shard], gpu: bool) -> Ended:
    try:
        import ray
    except ImportError as missing:
        raise ConfigError("engine ray needs the package: pip install 'selfsup[ray]'") from missing
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    running: dict[Any, Shard] = {}
    try:
        kind = "GPU" if gpu and ray.cluster_resources().get("GPU") else "CPU"
        gpus = int(kind == "GPU")
        # max_calls: else a process with a GPU ends after one shard, and its model with it
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, max_calls=0)(_on_node)
        while True:
            # One more for each processor, so that none waits for its next shard
            wanted = 2 * max(1, int(ray.cluster_resources().get(kind, 1)))
            while len(running) < wanted and (shard := next(shards, None)) is not None:
                running[task.remote(os.getcwd(), work, shard[1])] = shard
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                shard = running.pop(reference)
                try:
                    error = _repeated(shard, ray.get(reference))
                except ray.exceptions.RayError as lost:  # its process or its node died
                    error = SelfsupError(f"{type(lost).__name__}: {_first_line(lost)}")
                yield shard, error
    finally:
        for reference in running:  # none, unless the work was stopped
            ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()


def _on_node(folder: str, work: Work, arguments: tuple) -> Outcome:
    with suppress(OSError):  # then names of files must be absolute
        os.chdir(folder)
    _limit(1)
    return _outcome(work, arguments)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]
