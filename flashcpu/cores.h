/* The cores of the threads of a call, for _engine.pyx. */
#ifndef FLASHCPU_CORES_H
#define FLASHCPU_CORES_H

#if defined(__linux__) && !defined(_GNU_SOURCE)
#error "Python.h first, or _GNU_SOURCE: for sched_getcpu and CPU_SET"
#endif

#include <stdint.h>

/* In a loop that looks: leaves the core to the other thread of it, if it has two. */
static inline void fc_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#ifdef __linux__
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

/* The cores that threads of a call have, a bit each. */
struct fc_cores {
    uint64_t taken[CPU_SETSIZE / 64];
};

/* Takes the core that this thread runs on; tells whether another one had. */
static inline int fc_shares_core(struct fc_cores *cores) {
    const int core = sched_getcpu();
    if (core < 0 || core >= CPU_SETSIZE) {
        return 0;
    }
    const uint64_t bit = (uint64_t)1 << core % 64;
    return (__atomic_fetch_or(&cores->taken[core / 64], bit, __ATOMIC_RELAXED) & bit) != 0;
}

/* How many threads of the machine run or could; very many if nobody says. In a container these are
 * those of the host. */
static inline int fc_runnable(void) {
    char text[64] = {0};
    int count = INT_MAX;
    const int file = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    if (file >= 0) {
        if (read(file, text, sizeof(text) - 1) <= 0 ||
            sscanf(text, "%*s %*s %*s %d", &count) != 1) {
            count = INT_MAX;
        }
        close(file);
    }
    return count;
}

/* Moves this thread to one of the cores that it may run on and none of the call has, where each of
 * `threads` is to have one; tells whether it did. A filter of system calls may end who asks. What
 * the thread may run on is as it was before; only cores that the process is given later are not
 * among it. */
static inline int fc_leave_core(const struct fc_cores *cores, int threads) {
    cpu_set_t all, left;
    if (prctl(PR_GET_SECCOMP, 0, 0, 0, 0) != 0 || sched_getaffinity(0, sizeof(all), &all) != 0 ||
        CPU_COUNT(&all) != threads) {
        return 0;
    }
    left = all;
    for (int core = 0; core < CPU_SETSIZE; core++) {
        if (__atomic_load_n(&cores->taken[core / 64], __ATOMIC_RELAXED) >> core % 64 & 1) {
            CPU_CLR(core, &left);
        }
    }
    if (CPU_COUNT(&left) == 0 || sched_setaffinity(0, sizeof(left), &left) != 0) {
        return 0;
    }
    if (sched_setaffinity(0, sizeof(all), &all) != 0) { /* taken away meanwhile: what there is */
        memset(&all, 0xff, sizeof(all));
        sched_setaffinity(0, sizeof(all), &all);
    }
    return 1;
}

/* Tells whether this thread has a core that none of the `threads` of the call has, and sees that it
 * has, where nobody else is runnable. Linux (6.18, two virtual cores) at times woke the other
 * thread on the core of the caller, call after call, though its own was idle; then one of the two
 * waits until the other has done all (12 heads of 197 rows and keys, 1 ms apart, 1267 us, so 704;
 * with one thread 1251; 9 heads over 3, 8 queries, 4096 keys 835, so 470). A core that another
 * library's threads wait in a loop on is left to them: beside those of a BLAS it got its turn at
 * once or after 4 ms, in the mean no sooner than with one thread. */
static inline int fc_take_core(struct fc_cores *cores, int threads) {
    while (fc_shares_core(cores)) {
        if (fc_runnable() > threads || !fc_leave_core(cores, threads)) {
            return 0;
        }
    }
    return 1;
}
#else
struct fc_cores {
    int none;
};
static inline int fc_shares_core(struct fc_cores *cores) { return (void)cores, 0; }
static inline int fc_runnable(void) { return 0; }
static inline int fc_take_core(struct fc_cores *cores, int threads) {
    (void)cores;
    (void)threads;
    return 1;
}
#endif

#endif
