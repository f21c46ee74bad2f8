"""How many threads a call may use, and how to use them in a process that was forked."""

import contextlib
import math
import os
import threading
from functools import cache
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def waiting_asleep():
    """While libgomp is being loaded: tell it to let threads sleep soon when there is no work.

    Of itself it lets them turn 300,000 times, up to 20 ms, as if nobody else needed the cores. But
    NumPy's BLAS has threads that wait in a loop too, and each product and each attention then waits
    until the system takes the core from the other's. Two cores, a row of 576 by 576 x 2304 and 9
    heads over 3 against 2048 keys in turn, us: 300,000 turns 4000 and 3900, 10,000 158 and 1030,
    1000 145 and 250, 100 148 and 205, with one thread 190. Calls right after each other take the
    same from 100 turns on, but after a pause they wait until a thread is awake, 50 us or more in a
    virtual machine. Whoever says OMP_WAIT_POLICY or GOMP_SPINCOUNT is left alone. It holds for all
    libraries that share this libgomp, and not where one of them loaded it before.

    At the end of a call its threads wait for each other awake for up to 0.2 ms all the same, unless
    OMP_WAIT_POLICY is passive (_engine.pyx).
    """
    name = "GOMP_SPINCOUNT"
    if name in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ[name] = "100"
    try:
        yield
    finally:
        os.environ.pop(name, None)


with waiting_asleep():
    from flashcpu import _engine

_forked = False


def _after_fork_in_child():
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def usable_cores():
    """Cores of this process: its affinity, within the quota of its cgroup."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(cores, cgroup_quota()))


@cache
def cgroup_quota():
    """Whole cores that the cgroup pays for, rounded up; very many where nothing limits them."""
    fewest = 1 << 30
    for folder in _cgroups():
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            if quota.strip() not in ("max", "-1"):
                fewest = min(fewest, math.ceil(int(quota) / int(period)))
    return fewest


def _cgroups():
    """Folders of this process's cgroup and those around it, versions 2 and 1."""
    roots = {"": Path("/sys/fs/cgroup"), "cpu": Path("/sys/fs/cgroup/cpu")}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                if controller in roots:
                    inner = Path(path.lstrip("/"))
                    for outer in (inner, *inner.parents):
                        yield roots[controller] / outer
    yield from roots.values()


def limit(threads):
    """The largest number of threads for a call: the caller's, or what OpenMP says now.

    omp_get_max_threads() is asked at every call, so that threadpoolctl and OMP_NUM_THREADS work.
    Inside another parallel region it is one.
    """
    if _engine.in_parallel():
        return 1
    return threads or min(_engine.omp_threads(), usable_cores())


def run(call, arguments, threads):
    """call(*arguments), on a thread that libgomp does not know when this process was forked.

    There it also gets an array of one flag: stop when it is set.

    libgomp keeps its pool of threads with the thread that made it; in a forked child that pool is
    dead and the next parallel region waits for it for ever. A new thread starts with a new pool.
    """
    if not _forked or threads == 1:
        return call(*arguments)
    stop = np.zeros(1, np.int32)
    errors = []

    def on_new_thread():
        try:
            call(*arguments, stop)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=on_new_thread, name="flashcpu")
    thread.start()
    try:
        thread.join()
    except BaseException:
        # Signals reach the waiting thread: end the call before what it writes to is gone.
        stop[0] = 1
        thread.join()
        raise
    if errors:
        raise errors[0]
