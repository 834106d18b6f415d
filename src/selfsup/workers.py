"""Work that falls into shards, spread over this machine's processes or over a Ray cluster.

A shard is a function of its arguments that leaves a file or folder behind and gives nothing back.
One that fails, or whose process dies, is named at once and tried a second time after the others.
"""

import logging
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from selfsup import console
from selfsup.errors import ConfigError, SelfsupError, StorageError

Shards = Mapping[str, tuple]
Work = Callable[..., None]
Ended = Iterator[tuple[str, Exception | None]]  # the name of a shard, and what it failed of
Engine = Literal["local", "ray"]
ENGINES = ("local", "ray")


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

    def run(self, work: Work, shards: Shards, title: str) -> None:
        """Calls `work(*shards[name])` for every shard, in any order.

        Args:
            work: a function of a module, called with what can be sent to another process.
            shards: the arguments by name; names are for messages.
            title: for the progress display.

        Raises:
            SelfsupError: shards failed twice, of the kind of the first one; the others are done.
            StorageError: there is no room for any; at once.
            ConfigError: Ray is missing.
        """
        left = dict(shards)
        with console.progress(title, len(shards)) as progress:
            for tries_left in (1, 0):
                failed: dict[str, Exception] = {}
                for name, error in self._ended(work, left):
                    if error is None:
                        progress.advance(1, name)
                        continue
                    if isinstance(error, StorageError):
                        raise error
                    failed[name] = error
                    again = "it is tried again at the end" if tries_left else "that was its last"
                    console.warn(f"{name}: {error}; {again}")
                left = {name: left[name] for name in failed}
                if not left:
                    return
        name, error = next(iter(failed.items()))
        names = ", ".join(list(failed)[:5]) + (", ..." if len(failed) > 5 else "")
        kind = type(error) if isinstance(error, SelfsupError) else SelfsupError
        raise kind(
            f"{len(failed)} of {len(shards)} shards failed twice: {names}; the others are kept. "
            f"{name}: {error}. Mend it and run the same command again."
        ) from error

    def _ended(self, work: Work, shards: Shards) -> Ended:
        if self.engine == "ray":
            return _on_ray(work, shards)
        return _here(work, shards) if self.jobs == 1 else _processes(work, shards, self.jobs)


def _here(work: Work, shards: Shards) -> Ended:
    for name, arguments in shards.items():
        try:
            with console.quiet():
                work(*arguments)
        except SelfsupError as error:
            yield name, error
        else:
            yield name, None


# This machine's processes: one for each shard, so that a death has a name


def _processes(work: Work, shards: Shards, jobs: int) -> Ended:
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting = list(shards.items())[::-1]
    running: dict[Connection, tuple[str, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, arguments = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_child, args=(theirs, threads, work, arguments), daemon=True
                )
                process.start()
                theirs.close()  # so that its death ends the pipe
                running[ours] = name, process
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                name, process = running.pop(connection)
                try:
                    error = connection.recv()
                except EOFError:
                    process.join()
                    error = SelfsupError(_death(process.pid, process.exitcode))
                connection.close()
                process.join()
                yield name, error
    finally:
        for _, process in running.values():
            process.terminate()


def _child(connection: Connection, threads: int, work: Work, arguments: tuple) -> None:
    connection.send(_outcome(threads, work, arguments))
    connection.close()


def _outcome(threads: int, work: Work, arguments: tuple) -> Exception | None:
    """What the work failed of, in a form that can be sent."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # those of the tokenizer
    try:
        with console.silent():
            work(*arguments)
    except SelfsupError as error:
        return error
    except Exception:
        return SelfsupError(traceback.format_exc().strip())
    return None


def _death(process: int, code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process {process} was killed by signal {-code} (9 is often too little memory)"
    return f"its process {process} ended without a word, with exit code {code}"


# Ray


def _on_ray(work: Work, shards: Shards) -> Ended:
    try:
        import ray
    except ImportError as missing:
        raise ConfigError("engine ray needs the package: pip install 'selfsup[ray]'") from missing
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        task = ray.remote(num_cpus=1, max_retries=0)(_outcome)
        running = {task.remote(1, work, arguments): name for name, arguments in shards.items()}
        while running:
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                try:
                    error = ray.get(reference)
                except ray.exceptions.RayError as lost:  # its process or its node died
                    error = SelfsupError(f"{type(lost).__name__}: {_first_line(lost)}")
                yield running.pop(reference), error
    finally:
        if ours:
            ray.shutdown()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]
