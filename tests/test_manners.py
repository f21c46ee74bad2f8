"""Manners of the engine: forks, signals, threads of others, memory, instruction sets at import.

What could hang, or needs a process of its own, runs as a script in another process, with a limit
on its time.
"""

import contextlib
import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from checks import assert_same_bits, misaligned, normal

from flashcpu import api, attention, machine, plan, problem, threads

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and signals as POSIX has them")

# Every script begins with this. `small` is enough work for a parallel region.
PRELUDE = """
import ctypes, hashlib, multiprocessing, os, resource, signal, sys, threading, time
import numpy as np
from flashcpu import attention, machine, plan, threads

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's &

def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((4, length, 24), np.float32) for length in (200, 300, 300)]

def small(n, seed=0):
    out, lse = attention(*arrays(seed), causal=True, threads=n, return_lse=True)
    return hashlib.sha256(out.tobytes() + lse.tobytes()).hexdigest()

assert 4 * 200 * 300 * 48 > plan.SMALL

def long(n):
    # Far more than any machine does in the time of these tests; the result is small.
    one = np.ones((1, 16384, 64), np.float32)
    q = np.broadcast_to(one, (1024, 16384, 64))
    print("ready", flush=True)
    attention(q, q, q[..., :1], threads=n)

def long_chain(n):
    # One head's cache, its keys cut into items that wait for each other. All keys are one.
    q = np.ones((12, 64), np.float32)
    k = np.broadcast_to(q[:1], (1 << 29, 64))
    print("ready", flush=True)
    attention(q, k, k, threads=n)
"""


def process(script, **environment):
    """A Python process; what is None in the environment is not in its own."""
    named = {**os.environ, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        env={name: text for name, text in named.items() if text is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(running):
    """End the process, and its children: one that hangs would keep the pipes open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.communicate()


def run(script, timeout=60, **environment):
    """What the script prints. A hang and an error are failures."""
    running = process(script, **environment)
    try:
        out, err = running.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end within {timeout} s")
    finally:
        end(running)
    assert running.returncode == 0, err
    return out.split()


# Forks


@pytest.mark.parametrize("used_before", [True, False], ids=["after a call", "before any"])
def test_a_forked_child_computes_as_its_parent(used_before):
    """libgomp alone would hang here: its threads stay behind in the parent."""
    digests = run(
        f"""
        if {used_before}:
            small(2)
        def child(pipe):
            pipe.send([small(2), small(1), small(2)])
        parent_end, child_end = multiprocessing.Pipe()
        forked = multiprocessing.get_context("fork").Process(target=child, args=(child_end,))
        forked.start()
        assert parent_end.poll(20), "the child hangs"
        print(*parent_end.recv(), small(2), small(1))
        forked.join()
        """
    )
    assert len(digests) == 5
    assert len(set(digests)) == 1


def test_a_child_of_a_child_and_its_threads_compute_too():
    digests = run(
        """
        def forked(work):
            parent_end, child_end = multiprocessing.Pipe()
            child = multiprocessing.get_context("fork").Process(
                target=lambda: child_end.send(work())
            )
            child.start()
            assert parent_end.poll(20), "the child hangs"
            answer = parent_end.recv()
            child.join()
            return answer
        def in_a_thread():
            answers = [small(2)]
            thread = threading.Thread(target=lambda: answers.append(small(2)))
            thread.start()
            thread.join()
            return answers
        print(small(2), *forked(lambda: [small(2), *forked(in_a_thread), small(2)]), small(2))
        """
    )
    assert len(digests) == 6
    assert len(set(digests)) == 1


def test_an_error_in_a_forked_child_is_the_childs_own():
    (answer,) = run(
        """
        small(2)
        child = os.fork()
        if child == 0:
            try:
                one = np.broadcast_to(np.float32(1), (2**50, 1))
                attention(one, one[:1], one[:1], threads=2)
            except MemoryError:
                os._exit(0 if small(2) == small(1) else 2)
            os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert answer == "0"


# Signals


def ends_soon_after_a_signal(running):
    """Seconds from SIGINT in the middle of a long call to the end of the process."""
    try:
        assert running.stdout.readline() == "ready\n"
        time.sleep(0.4)
        assert running.poll() is None, "the call was too short"
        start = time.monotonic()
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=20)
        return time.monotonic() - start, out, err
    finally:
        end(running)


@pytest.mark.parametrize(("call", "n"), [("long", 1), ("long", 2), ("long_chain", 3)])
def test_ctrl_c_ends_a_long_call(call, n):
    running = process(
        f"""
        small({n})
        try:
            {call}({n})
        except KeyboardInterrupt:
            print("interrupted", small({n}) == small(1), flush=True)
            os._exit(0)
        """
    )
    seconds, out, err = ends_soon_after_a_signal(running)
    assert out == "interrupted True\n", err
    assert seconds < 1


@pytest.mark.parametrize(("call", "n"), [("long", 1), ("long", 2), ("long_chain", 3)])
def test_ctrl_c_ends_a_long_call_of_a_forked_child(call, n):
    running = process(
        f"""
        small(2)
        child = os.fork()
        if child == 0:
            try:
                {call}({n})
            except KeyboardInterrupt:
                print("interrupted", small({n}) == small(1), flush=True)
            os._exit(0)
        signal.signal(signal.SIGINT, lambda *_: os.kill(child, signal.SIGINT))
        os.waitpid(child, 0)
        """
    )
    seconds, out, err = ends_soon_after_a_signal(running)
    assert out == "interrupted True\n", err
    assert seconds < 1


def test_a_signal_whose_handler_returns_changes_nothing():
    first, second, signals = run(
        """
        count = []
        signal.signal(signal.SIGALRM, lambda *_: count.append(1))
        rng = np.random.default_rng(1)
        q = rng.standard_normal((4, 6000, 64), np.float32)
        def digest(n):
            return hashlib.sha256(attention(q, q, q[..., :8], threads=n).tobytes()).hexdigest()
        first = digest(1)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        second = digest(2)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(first, second, len(count))
        """
    )
    assert first == second
    assert int(signals) > 0


def test_an_error_of_a_signal_handler_is_the_error_of_the_call():
    running = process(
        """
        def handler(*_):
            raise LookupError("from the handler")
        signal.signal(signal.SIGINT, handler)
        try:
            long(2)
        except LookupError as error:
            print(error, flush=True)
            os._exit(0)
        """
    )
    _, out, err = ends_soon_after_a_signal(running)
    assert out == "from the handler\n", err


# Threads


def test_inside_another_parallel_region_a_call_runs_on_one_thread():
    """The region is one of libgomp's, begun as a compiled program begins it."""
    answers = run(
        """
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "gomp" in line}
        if not paths:
            print("none")
            sys.exit()
        gomp = ctypes.CDLL(paths.pop())
        inside = []
        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def work(_):
            inside.append((threads.limit(None), threads.limit(5), small(2)))
        gomp.GOMP_parallel(work, None, 2, 0)
        assert len(inside) == 2
        for limit, limit_of_five, digest in inside:
            print(limit, limit_of_five, digest == small(1))
        print(threads.limit(5))
        """
    )
    if answers == ["none"]:
        pytest.skip("no libgomp in this process")
    assert answers == ["1", "1", "True"] * 2 + ["5"]


def test_many_python_threads_may_call_at_once():
    (answer,) = run(
        """
        expected = [small(1, seed) for seed in range(6)]
        wrong = []
        def work(seed):
            for n in (1, 2, 3):
                if small(n, seed) != expected[seed]:
                    wrong.append((seed, n))
        running = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        print(len(wrong))
        """
    )
    assert answer == "0"


def test_the_default_is_what_openmp_says_within_the_cores():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    cores = threads.usable_cores()
    assert 1 <= cores <= (os.cpu_count() or 1)
    for n in (1, 2, 10**4):
        with threadpoolctl.threadpool_limits(n, user_api="openmp"):
            assert threads.limit(None) == min(n, cores)
            assert threads.limit(3) == 3


def test_omp_num_threads_is_read():
    assert run("print(threads.limit(None))", OMP_NUM_THREADS="1") == ["1"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity to set")
def test_the_affinity_is_asked_at_every_call():
    """A pinned process must not start more threads than it has cores."""
    answers = run(
        """
        print(threads.limit(None) == threads.usable_cores())
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(threads.limit(None))
        """,
        OMP_NUM_THREADS="64",
    )
    assert answers == ["True", "1"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
def test_all_threads_may_run_where_they_might_before():
    """One may have left its core for another one (cores.h)."""
    answers = run(
        """
        cores = os.sched_getaffinity(0)
        for turn in range(200):
            small(len(cores))
        tasks = [int(task) for task in os.listdir("/proc/self/task")]
        print(all(os.sched_getaffinity(task) == cores for task in tasks))
        """
    )
    assert answers == ["True"]


def test_as_many_threads_as_asked_for_are_used():
    """Seen from outside: the threads of the pool stay with the process."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc")
    counts = run(
        """
        alive = lambda: len(os.listdir("/proc/self/task"))
        before = alive()
        attention(*(x[:, :16] for x in arrays()), threads=4)
        print(alive() - before)  # small work starts none
        small(1)
        print(alive() - before)
        small(3)
        print(alive() - before)
        """
    )
    assert counts == ["0", "0", "2"]


# Memory


@pytest.mark.parametrize("n", [1, 2])
def test_extra_memory_does_not_grow_with_the_length(n):
    """The matrix of scores would be 1 GiB here. Output, and less than 2 MiB a thread."""
    grown, out_bytes = map(
        int,
        run(
            f"""
            small({n})
            rng = np.random.default_rng(0)
            q, k, v = (rng.standard_normal((16384, 64), np.float32) for _ in range(3))
            peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            before = peak()
            out = attention(q, k, v, threads={n}, causal=True)
            print(peak() - before, out.nbytes)
            """
        ),
    )
    if sys.platform == "darwin":
        grown //= 1024
    assert grown <= out_bytes + n * (2 << 20)


@pytest.mark.parametrize("n", [1, 2])
def test_extra_memory_of_a_decode_step_does_not_grow_with_the_keys(n):
    """One head and a million keys, which are one: less than 1 MiB a thread and 1 MiB more."""
    (grown,) = map(
        int,
        run(
            f"""
            q = np.ones((4, 64), np.float32)
            keys = lambda count: np.broadcast_to(q[:1], (count, 64))
            attention(q, keys(3000), keys(3000), threads={n})
            small({n})
            peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            before = peak()
            out, lse = attention(q, keys(10**6), keys(10**6), threads={n}, return_lse=True)
            print(peak() - before)
            assert (out == 1).all() and abs(lse - 8 - np.log(10**6)).max() < 1e-3
            """
        ),
    )
    if sys.platform == "darwin":
        grown //= 1024
    assert grown <= (n + 1) << 20


@pytest.mark.parametrize("last", [">f4", "<f4"], ids=["other byte order", "reversed"])
def test_a_copy_is_of_what_is_read_and_of_no_repetition(last, rng):
    """40,000 keys of which 10 are asked for; 200 members that share 1000."""
    many = np.ones((40_000, 32), last)[:, :: 1 if last == ">f4" else -1]
    shared = np.broadcast_to(many[:1000], (200, 1000, 32))
    q = np.ones((200, 1, 32), np.float32)
    calls = (
        lambda: attention(q[0], many, many, kv_len=10),
        lambda: attention(q, shared, shared, kv_len=(10, *[1000] * 199)),
        lambda: attention(q, shared, shared),
    )
    for call in calls:
        call()
        tracemalloc.start()
        try:
            out = call()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert (out == 1).all()
        assert peak < 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space as Linux has them")
def test_scratch_that_cannot_be_had_is_a_memory_error():
    """And the next call is right. A workspace is about 1 GiB here; the result takes 64 MiB."""
    answers = run(
        """
        expected = small(1)
        x = np.ones((16, 1 << 20), np.float32)
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
        try:
            attention(x, x, x, threads=1)
        except MemoryError as error:
            print(type(error).__name__, small(1) == expected)
        """
    )
    assert answers == ["MemoryError", "True"]


@pytest.mark.skipif(sys.platform != "linux", reason="mmap and mprotect as Linux has them")
def test_nothing_beside_the_arrays_is_touched():
    """Each array ends, and another time begins, at a page that may be neither read nor written."""
    (answer,) = run(
        """
        import mmap
        page = mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        kept = []
        SHAPES = [(1, 1, 1, 1), (1, 70, 17, 33), (3, 300, 64, 20), (17, 65, 5, 3)]
        SHAPES += [(50, 70, 17, 33), (49, 301, 64, 20), (63, 301, 64, 20), (12, 257, 33, 130)]
        dtypes = [np.float32, np.float64, np.float16]
        try:
            import ml_dtypes
            dtypes.append(ml_dtypes.bfloat16)
        except ImportError:
            pass

        def guarded(x, at_end):
            room = -(-max(x.nbytes, 1) // page) * page
            memory = mmap.mmap(-1, room + 2 * page)
            kept.append(memory)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            for guard in (start, start + page + room):
                assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
            at = page + (room - x.nbytes if at_end else 0)
            view = np.ndarray(x.shape, x.dtype, memory, at)
            view[...] = x
            return view

        for isa in machine.ISAS if not os.environ.get("FLASHCPU_ISA") else [machine.isa()]:
            with machine.use_isa(isa):
                for dtype in dtypes:
                    for Lq, Lkv, D, Dv in SHAPES:
                        rng = np.random.default_rng(0)
                        q, k, v = (
                            rng.standard_normal(shape).astype(dtype)
                            for shape in ((Lq, D), (Lkv, D), (Lkv, Dv))
                        )
                        expected = attention(q, k, v, causal=True)
                        for at_end in (False, True):
                            inputs = [guarded(x, at_end) for x in (q, k, v)]
                            out = guarded(np.zeros((Lq, Dv), dtype), at_end)
                            attention(*inputs, causal=True, out=out)
                            assert (out == expected).all()
                            # Keys from kv_len on may not even be there, also where what the
                            # kernels cannot read is copied.
                            for way in (1, -1):
                                turned = [guarded(x[:, ::way], at_end) for x in (k, v)]
                                longer = [
                                    np.lib.stride_tricks.as_strided(x, (Lkv + 999, x.shape[1]))
                                    for x in turned
                                ]
                                longer = [x[:, ::way] for x in longer]
                                attention(inputs[0], *longer, kv_len=Lkv, causal=True, out=out)
                                assert (out == expected).all()
        print("fine", flush=True)
        os._exit(0)  # the maps have views, and cannot be closed
        """
    )
    assert answer == "fine"


# Instruction sets


@pytest.mark.parametrize("name", machine.ISAS)
def test_every_instruction_set_can_be_chosen_at_import(name):
    chosen, digest, used = run(
        """
        digest = small(1)
        with machine.use_isa(machine.isa()):
            print(machine.isa(), digest, small(1) == digest)
        """,
        FLASHCPU_ISA=name.upper() + " ",
    )
    assert (chosen, used) == (name, "True")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((4, n, 24), np.float32) for n in (200, 300, 300)]
    with machine.use_isa(name):
        out, lse = attention(*arrays, causal=True, return_lse=True)
    assert hashlib.sha256(out.tobytes() + lse.tobytes()).hexdigest() == digest


def test_the_fastest_instruction_set_is_chosen_where_none_is_asked_for():
    """The largest, but for products in pairs where the CPU is slow in them."""
    (chosen,) = run("print(machine.isa())", FLASHCPU_ISA=" ")
    cpu = cpu_facts()
    slow_in_pairs = "GenuineIntel" in cpu.get("vendor_id", "") and (
        {"amx_bf16", "amx_tile", "avx512_fp16"} & set(cpu.get("flags", "").split())
    )
    assert chosen == machine.ISAS[1 if machine.ISAS[0] == "avx512_bf16" and slow_in_pairs else 0]


def cpu_facts():
    """What the Linux kernel tells of the first processor."""
    if not sys.platform.startswith("linux"):
        pytest.skip("no /proc/cpuinfo")
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    facts = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in facts}


def turns_of_a_waiting_thread(**said):
    """What libgomp was told when flashcpu loaded it, by its own account."""
    script = 'assert os.environ.get("GOMP_SPINCOUNT") == os.environ.get("SAID")'
    nothing_said = dict.fromkeys(("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"))
    running = process(script, OMP_DISPLAY_ENV="verbose", **{**nothing_said, **said})
    _, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", err)
    if not found:
        pytest.skip("not libgomp, or one that does not tell")
    return int(found[1])


def test_threads_wait_asleep_unless_told_otherwise():
    """Else NumPy's BLAS waits for them, and they for its threads, some milliseconds a call."""
    assert turns_of_a_waiting_thread() == 100
    assert turns_of_a_waiting_thread(GOMP_SPINCOUNT="77", SAID="77") == 77
    assert turns_of_a_waiting_thread(OMP_WAIT_POLICY="passive") == 0
    assert turns_of_a_waiting_thread(OMP_WAIT_POLICY="active") > 10**6


def test_the_read_bandwidth_is_in_bytes_a_second(monkeypatch):
    """By a clock on which reading takes a second."""
    monkeypatch.setattr(machine, "READ", 3 << 10)
    monkeypatch.setattr(machine.time, "perf_counter", itertools.count().__next__)
    for count in (1, 2):
        assert machine.read_bandwidth(count) == 3 << 10


def test_an_unknown_instruction_set_is_an_import_error():
    running = process("", FLASHCPU_ISA="sse9")
    _, err = running.communicate(timeout=60)
    assert running.returncode != 0
    assert "ImportError: FLASHCPU_ISA='sse9'" in err
    assert all(name in err for name in machine.ISAS)


def test_use_isa_ends_with_its_block():
    before = machine.isa()

    def fail_inside():
        with machine.use_isa("scalar"):
            assert machine.isa() == "scalar"
            raise LookupError

    with pytest.raises(LookupError):
        fail_inside()
    assert machine.isa() == before
    with pytest.raises(ValueError, match="sse9"), machine.use_isa("sse9"):
        pass
    assert machine.isa() == before


def test_an_instruction_set_without_fma_gives_other_bits(rng):
    """So that choosing one is more than a name."""
    if len(machine.ISAS) == 1:
        pytest.skip("one instruction set")
    q, k, v = normal(rng, (50, 24), (300, 24), (300, 24))
    with machine.use_isa("scalar"):
        scalar = attention(q, k, v)
    with machine.use_isa(machine.ISAS[0]):
        best = attention(q, k, v)
        assert_same_bits(attention(q, k, v), best)
    assert (scalar != best).any()


def test_a_question_asked_again_is_not_checked_again(monkeypatch, rng):
    checked = []
    original = problem.operand
    monkeypatch.setattr(problem, "operand", lambda *args: checked.append(args) or original(*args))
    q, k, v = normal(rng, (1, 4, 1, 16), (1, 2, 1000, 16), (1, 2, 1000, 16))
    for length in (999, 1000):
        local = attention(q, k[:, :, :9], v[:, :, :9])  # another kind of layer, between the others
        options = {"kv_len": int(str(length)), "scale": float("0.3")}  # objects of their own
        first = attention(q, k, v, **options)
        checked.clear()
        again = {"kv_len": int(str(length)), "scale": float("0.3")}
        assert_same_bits(attention(q.copy(), k.copy(), v.copy(), **again), first)
        assert_same_bits(attention(q, k[:, :, :9], v[:, :, :9]), local)
        assert not checked
        assert_same_bits(attention(misaligned(q), k, v, **again), first)
        assert checked  # for it must be copied
    checked.clear()
    result = attention(q[..., ::-1], k, v)  # copied, and its result is an array as any other
    attention(q, k, v)
    attention(q, k[:, :, :9], v[:, :, :9])
    for _ in range(api.KINDS):
        attention(q.view(np.memmap), k, v)  # never known again, so nothing is forgotten for it
    checked.clear()
    attention(result, k, v)
    attention(q, k[:, :, :9], v[:, :, :9])
    assert not checked


def test_the_result_has_the_dtype_of_the_queries_itself():
    """Also what only that object has; and each result holds it once."""
    q = np.ones((2, 3, 8), np.dtype(np.float32, metadata={"unit": "m"}))
    for result in (
        *(attention(q, q, q) for _ in range(3)),
        *attention(q, q, q, return_lse=True)[:1],
    ):
        assert result.dtype is q.dtype
    held = sys.getrefcount(q.dtype)
    for _ in range(200):
        attention(q, q, q)
    assert abs(sys.getrefcount(q.dtype) - held) < 100


@pytest.mark.usefixtures("always_threads")
def test_what_is_worth_threads_asks_how_many_at_each_call(monkeypatch, rng):
    """They may be others each time: threadpoolctl, a parallel region around the call."""
    asked, limit = [], threads.limit
    monkeypatch.setattr(threads, "limit", lambda most: asked.append(most) or limit(most))
    q, k, v = normal(rng, (2, 3, 16), (2, 70, 16), (2, 70, 16))
    expected = attention(q, k, v, threads=1)
    asked.clear()
    for most in (None, 2, None, 2):
        assert_same_bits(attention(q, k, v, threads=most), expected)
    assert asked == [None, 2, None, 2]


def test_a_small_question_is_planned_once(monkeypatch, rng):
    """Found again, not made again: a tiny call must not pay for it twice."""

    def plans(q, k, times=2, **options):
        """How many plans these calls made."""
        made = []
        original = plan.cut
        with monkeypatch.context() as patch:
            patch.setattr(plan, "cut", lambda *args: made.append(args) or original(*args))
            results = [attention(q, k, k, **options) for _ in range(times)]
        for again in results:
            np.testing.assert_array_equal(again, results[0])
        return len(made)

    q, k = (rng.standard_normal((1, 2, n, 11)) for n in (17, 100))
    assert plans(q, k) == 1
    assert plans(q, k) == 0
    assert plans(q, k, kv_len=99) == 1  # a growing cache: once for all its layers
    assert plans(q, k, kv_len=98, q_start=3) == 1
    assert plans(q, k, tiles=(1, 1)) == 1
    for other in set(machine.ISAS) - {machine.isa()}:
        with machine.use_isa(other):
            assert plans(q, k) == 1
    few = np.broadcast_to(q, (3, *q.shape[1:])), np.broadcast_to(k, (3, *k.shape[1:]))
    assert plans(*few, kv_len=[100, 50, 7]) == 1
    assert plans(*few, kv_len=np.array([[100, 50, 8]])[0], q_start=(1, 2, 3)) == 1
    # What is large is not kept: many rows, heads, members, keys.
    for shape in ((1, 250, 1, 1), (250, 1, 1, 1)):
        few = np.ones(shape)
        assert plans(few, few) == 2
    assert plans(np.ones((1, 4)), np.broadcast_to(np.ones(4), (plan.REMEMBERED_KEYS, 4))) == 2
    assert plans(np.zeros((1, 1, plan.REMEMBERED, 1)), np.zeros((1, 1, 1, 1))) == 2
