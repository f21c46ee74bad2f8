/* What the threads of a call share: turns, and cores. For _engine.pyx. */
#ifndef FLASHCPU_THREADS_H
#define FLASHCPU_THREADS_H

#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

static inline int64_t fc_take(int64_t *next) {
    return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
}
static inline int64_t fc_reached(const int64_t *reached) {
    return __atomic_load_n(reached, __ATOMIC_ACQUIRE);
}
static inline void fc_reach(int64_t *reached, int64_t key) {
    __atomic_store_n(reached, key, __ATOMIC_RELEASE);
}

/* The cores that threads of a call run on, a bit each. */
enum { FC_CORES = 1024 };
struct fc_cores {
    uint64_t taken[FC_CORES / 64];
};

#ifdef __linux__
/* Takes the core that this thread runs on; tells whether another one had. */
static inline int fc_shares_core(struct fc_cores *cores) {
    const int core = sched_getcpu();
    if (core < 0 || core >= FC_CORES) {
        return 0;
    }
    const uint64_t bit = (uint64_t)1 << core % 64;
    return (__atomic_fetch_or(&cores->taken[core / 64], bit, __ATOMIC_RELAXED) & bit) != 0;
}

/* How many threads of the machine run or could; very many if nobody says. */
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

/* A core for this thread that none of `threads` of the call has, if it may run on one and nobody
 * else does. Linux (6.18, two virtual cores) at times woke the other thread on the core of the
 * caller, call after call, though its own was idle; then one of the two waits until the other has
 * done all (12 heads of 197 rows and keys, 1 ms apart, 1267 us, so 704; with one thread 1251; 9
 * heads over 3, 8 queries, 4096 keys 835, so 470). A core that another library's threads wait in a
 * loop on is left to them: beside those of a BLAS it got its turn after 3 ms. What the thread may
 * run on is as it was before. Tells whether it has a core. */
static inline int fc_take_core(struct fc_cores *cores, int threads) {
    for (int tries = 0; tries < 4; tries++) {
        cpu_set_t all, left;
        if (!fc_shares_core(cores)) {
            return 1;
        }
        if (fc_runnable() > threads || sched_getaffinity(0, sizeof(all), &all) != 0) {
            return 0;
        }
        left = all;
        for (int core = 0; core < FC_CORES && core < CPU_SETSIZE; core++) {
            if (__atomic_load_n(&cores->taken[core / 64], __ATOMIC_RELAXED) >> core % 64 & 1) {
                CPU_CLR(core, &left);
            }
        }
        if (CPU_COUNT(&left) == 0 || sched_setaffinity(0, sizeof(left), &left) != 0) {
            return 0;
        }
        sched_setaffinity(0, sizeof(all), &all);
    }
    return 0;
}
#else
static inline int fc_take_core(struct fc_cores *cores, int threads) {
    return (void)cores, (void)threads, 1;
}
#endif

#endif
