/* The kernels alone: every instruction set of this machine against a plain reference, against each
 * other, and against the edges of their memory; and cores.h. No Python; what the engine does with
 * them is tested elsewhere (tests/). The same program runs on aarch64: aarch64.sh.
 *
 *   tests/kernels/build.sh cc kernels_test
 *   ./kernels_test [--bits] [--all | --brief] [instruction set ...]
 *
 * --bits prints a hash of all outputs for each (dtype_arithmetic, instruction set): those with FMA
 * agree, also across machines. --all looks at every float in [-126, 0] and ten times as many
 * problems. --brief is for emulators: the same bits, but two problems in three are run in one way
 * only.
 *
 * Every problem is run in several ways (`struct how`) that must not change a bit: with the kernels
 * for many query rows and with those for few. Inputs end right before a page that cannot be read,
 * or begin right behind one; what lies between their rows, around the outputs and around the
 * scratch is NaN, and is looked at again afterwards.
 *
 * 16-bit numbers must give the bits of float32 on the same numbers, rounded once. The arithmetic of
 * bf16 pairs has the dot product of the CPU, which is taken as it is: all around it is checked. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* for cores.h */
#endif
#include "../../flashcpu/cores.h"
#include "kernels.h"
#include "probe.h"

#include <float.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof(*(array))))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define LN2 0x1.62e42fefa39efp-1

/* The reference computes in this. The quadruple long double of aarch64 is software, and under
 * emulation too slow; double costs float64 a factor of two in the bounds. Under valgrind, which
 * makes a number of the infinity of an x87 register, build with -DREFERENCE_IN_DOUBLE. */
#if LDBL_MANT_DIG == 64 && !defined(REFERENCE_IN_DOUBLE)
typedef long double wide;
#define WIDE(function) function##l
#else
typedef double wide;
#define WIDE(function) function
#endif

#define REALS(X, isa) X(f32, isa) X(f64, isa)
#define DECLARE(arithmetic, isa) extern const struct probe probe_##arithmetic##_##isa;
#define ENTRY(arithmetic, isa) &probe_##arithmetic##_##isa,
#if defined(__x86_64__)
#define ISAS(X) REALS(X, scalar) REALS(X, avx2) REALS(X, avx512) X(bf16, avx512_bf16)
#elif defined(__aarch64__)
#define ISAS(X) REALS(X, scalar) REALS(X, neon) X(bf16, neon_bf16)
#else
#define ISAS(X) REALS(X, scalar)
#endif
ISAS(DECLARE)
static const struct probe *const probes[] = {ISAS(ENTRY)};

/* A 16-bit type: bits of the mantissa, exponent of the smallest normal number. */
struct format {
    const char *dtype;
    int mantissa, lowest;
};
static const struct format formats[] = {{"f16", 10, -14}, {"bf16", 7, -126}};

/* One (dtype, arithmetic, instruction set) under test. */
struct target {
    const struct fc_kernels *kernels;
    const struct fc_storage *rows, *stored; /* of queries and results, of keys and values */
    const struct format *rows_format, *stored_format; /* NULL: as they are computed */
    const struct probe *probe;
    int has_fma;
    uint64_t bits; /* FNV-1a over all outputs */
    double exp2_error, log_error, bound_used;
};

static int all, brief; /* options */
static long passed, failed;
static char what[256]; /* what is being done, for messages and for the handler of a fault */

__attribute__((format(printf, 2, 3))) static void check(int holds, const char *message, ...) {
    passed += holds != 0;
    failed += holds == 0;
    if (!holds && failed <= 30) {
        va_list values;
        va_start(values, message);
        fprintf(stderr, "FAILED %s: ", what);
        vfprintf(stderr, message, values);
        fprintf(stderr, "\n");
        va_end(values);
    }
}

static void fault(int signal_number) {
    fprintf(stderr, "FAILED %s: %s\n", what, strsignal(signal_number));
    fflush(stderr);
    _exit(2);
}

static void *must(void *p) {
    if (!p) {
        fprintf(stderr, "kernels_test: out of memory\n");
        exit(2);
    }
    return p;
}

/* numbers: the same on every machine, so nothing of libm but sqrt */

static uint64_t random_state;

static uint64_t random_bits(void) { /* splitmix64 */
    uint64_t x = random_state += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

static int random_below(int n) { return (int)(random_bits() % (uint64_t)n); }

/* In [-1, 1), with as many bits as the type holds. */
static double random_value(int size) {
    const int drop = size == 4 ? 40 : 11;
    const double half = (double)((uint64_t)1 << (63 - drop));
    return ((double)(random_bits() >> drop) - half) / half;
}

static double get(const void *p, ptrdiff_t i, int size) {
    return size == 4 ? ((const float *)p)[i] : ((const double *)p)[i];
}

static void put(void *p, ptrdiff_t i, int size, double x) {
    if (size == 4) {
        ((float *)p)[i] = (float)x;
    } else {
        ((double *)p)[i] = x;
    }
}

static const struct format *find_format(const char *dtype) {
    for (int i = 0; i < COUNT(formats); i++) {
        if (strcmp(formats[i].dtype, dtype) == 0) {
            return &formats[i];
        }
    }
    return NULL;
}

/* The 16 bits of x rounded to nearest even, by division: nothing here has seen vec.h. */
static uint16_t narrow(const struct format *f, double x) {
    const int infinite = (1 << 15) - (1 << f->mantissa), sign = signbit(x) ? 0x8000 : 0;
    if (isnan(x)) {
        return (uint16_t)(sign | infinite | 1 << (f->mantissa - 1));
    }
    if (isinf(x)) {
        return (uint16_t)(sign | infinite);
    }
    int exponent;
    frexp(x, &exponent);
    exponent = x == 0 ? f->lowest : MAX(exponent - 1, f->lowest);
    /* Units of the last place, the leading one among them: it adds 1 to the exponent's field. */
    const double units = nearbyint(ldexp(fabs(x), f->mantissa - exponent));
    const double bits = ldexp(exponent - f->lowest, f->mantissa) + units;
    return (uint16_t)(sign | (int)MIN(bits, infinite));
}

static double widen(const struct format *f, uint16_t bits) {
    const int fraction = bits & ((1 << f->mantissa) - 1), field = (bits & 0x7fff) >> f->mantissa;
    const int normal = field > 0, last = (0x7fff >> f->mantissa);
    const double size = field == last && fraction ? NAN
                        : field == last           ? INFINITY
                                                  : ldexp(fraction + (normal << f->mantissa),
                                                          field - normal + f->lowest - f->mantissa);
    return bits & 0x8000 ? -size : size;
}

/* n numbers as they are stored, and back. */
static void store(char *to, const char *from, ptrdiff_t n, int size, const struct format *f) {
    if (!f) {
        memcpy(to, from, (size_t)(n * size));
        return;
    }
    for (ptrdiff_t i = 0; i < n; i++) {
        ((uint16_t *)to)[i] = narrow(f, get(from, i, size));
    }
}

static void load(char *to, const char *from, ptrdiff_t n, int size, const struct format *f) {
    if (!f) {
        memcpy(to, from, (size_t)(n * size));
        return;
    }
    for (ptrdiff_t i = 0; i < n; i++) {
        put(to, i, size, widen(f, ((const uint16_t *)from)[i]));
    }
}

/* n numbers to those that the format has. */
static void round_all(char *numbers, ptrdiff_t n, int size, const struct format *f) {
    for (ptrdiff_t i = 0; f && i < n; i++) {
        put(numbers, i, size, widen(f, narrow(f, get(numbers, i, size))));
    }
}

/* Payloads of NaN are no part of the contract: all NaN are alike. */
static void unify_nan(void *p, ptrdiff_t n, int size) {
    for (ptrdiff_t i = 0; i < n; i++) {
        if (isnan(get(p, i, size))) {
            put(p, i, size, NAN);
        }
    }
}

static void hash(uint64_t *into, const void *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        *into = (*into ^ ((const unsigned char *)bytes)[i]) * 0x100000001b3;
    }
}

static int all_are(const char *bytes, size_t n, char value) {
    for (size_t i = 0; i < n; i++) {
        if (bytes[i] != value) {
            return 0;
        }
    }
    return 1;
}

/* memory: inputs against a forbidden page, scratch between guards */

#define AREA_BYTES ((size_t)1 << 20)
#define NAN_BYTE ((char)0xff) /* a float or double of such bytes is NaN */
enum { AREA_Q, AREA_K, AREA_V, AREA_STAGED_K, AREA_STAGED_V, AREAS };
static char *areas[AREAS];

static void map_areas(void) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < AREAS; i++) {
        char *at = mmap(NULL, AREA_BYTES + 2 * page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED || mprotect(at, page, PROT_NONE) ||
            mprotect(at + page + AREA_BYTES, page, PROT_NONE)) {
            perror("kernels_test: mmap");
            exit(2);
        }
        areas[i] = at + page;
    }
}

/* `bytes` bytes of NaN against one of the two forbidden pages of an area. */
static char *place(int area, size_t bytes, int at_start) {
    if (bytes > AREA_BYTES) {
        fprintf(stderr, "kernels_test: AREA_BYTES is too small for %s\n", what);
        exit(2);
    }
    char *at = areas[area] + (at_start ? 0 : AREA_BYTES - bytes);
    return memset(at, NAN_BYTE, bytes);
}

/* n rows of d elements, ld apart, the last one without what lies between rows. */
static char *place_rows(int area, const char *rows, int n, int d, ptrdiff_t ld, int size,
                        const struct format *format, int at_start) {
    const int stored = format ? 2 : size;
    char *at = place(area, n ? (size_t)((n - 1) * ld + d) * stored : 0, at_start);
    for (int i = 0; i < n; i++) {
        store(at + i * ld * stored, rows + (ptrdiff_t)i * d * size, d, size, format);
    }
    return at;
}

/* Under AddressSanitizer nothing may stand between the scratch and the sanitizer's own guard. */
#ifdef __SANITIZE_ADDRESS__
#define GUARD 0
#else
#define GUARD FC_ALIGN
#endif

struct scratch {
    char *at[16];
    size_t bytes[16];
    int count;
};

static void *take(struct scratch *scratch, size_t bytes) {
    void *at = NULL;
    if (posix_memalign(&at, FC_ALIGN, bytes + 2 * GUARD)) {
        must(NULL);
    }
    memset(at, NAN_BYTE, bytes + 2 * GUARD);
    scratch->at[scratch->count] = at;
    scratch->bytes[scratch->count++] = bytes;
    return (char *)at + GUARD;
}

static void release(struct scratch *scratch) {
    int whole = 1;
    for (int i = 0; i < scratch->count; i++) {
        whole &= all_are(scratch->at[i], GUARD, NAN_BYTE);
        whole &= all_are(scratch->at[i] + GUARD + scratch->bytes[i], GUARD, NAN_BYTE);
        free(scratch->at[i]);
    }
    check(whole, "something was written outside the scratch");
}

/* problems */

enum { ALL_KEYS, CAUSAL, RANDOM_ENDS, SOME_SEE_NOTHING, MASKS };
#define MAX_ROWS 48

struct problem {
    int rows, keys, d, dv, size;
    double scale;
    char *q, *k, *v;             /* dense, as they are computed */
    const struct format *format; /* which has all of these numbers, or NULL */
    int64_t ends[MAX_ROWS];
};

static int ascending(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void fill(char *rows, ptrdiff_t n, int size) {
    for (ptrdiff_t i = 0; i < n; i++) {
        put(rows, i, size, random_value(size));
    }
}

static void round_problem(struct problem *p) {
    round_all(p->q, (ptrdiff_t)p->rows * p->d, p->size, p->format);
    round_all(p->k, (ptrdiff_t)p->keys * p->d, p->size, p->format);
    round_all(p->v, (ptrdiff_t)p->keys * p->dv, p->size, p->format);
}

/* heat: how far scores spread; rising: later keys are longer, so the maximum keeps moving. */
static struct problem make_problem(const struct target *t, int rows, int keys, int d, int dv,
                                   int mask, double heat, int rising) {
    const int size = t->kernels->real_size;
    struct problem p = {rows, keys, d, dv, size, heat / sqrt(d), NULL, NULL, NULL, t->stored_format,
                        {0}};
    p.q = must(malloc((size_t)rows * d * size + 1));
    p.k = must(malloc((size_t)keys * d * size + 1));
    p.v = must(malloc((size_t)keys * dv * size + 1));
    fill(p.q, (ptrdiff_t)rows * d, size);
    fill(p.k, (ptrdiff_t)keys * d, size);
    fill(p.v, (ptrdiff_t)keys * dv, size);
    for (int i = 0; rising && i < keys * d; i++) {
        put(p.k, i, size, get(p.k, i, size) * (1 + i / d / 32.0));
    }
    round_problem(&p);
    const int first = random_below(keys + rows) - rows, blind = random_below(rows + 1);
    for (int i = 0; i < rows; i++) {
        const int64_t drawn = random_below(keys + 1);
        p.ends[i] = mask == CAUSAL             ? MAX(0, MIN(keys, first + i + 1))
                    : mask == RANDOM_ENDS      ? drawn
                    : mask == SOME_SEE_NOTHING ? (i < blind ? 0 : keys)
                                               : keys;
    }
    qsort(p.ends, (size_t)rows, sizeof(*p.ends), ascending);
    return p;
}

static void free_problem(struct problem *p) {
    free(p->q);
    free(p->k);
    free(p->v);
}

/* the loop: attend_item of _engine.pyx, one strip after the other */

/* How a problem is run; none of it may change a bit of the result. */
struct how {
    const char *name;
    int tile;     /* keys at a time, whole blocks */
    int vectors;  /* of a strip, at most */
    int widen;    /* a full strip, however few the rows */
    int ask;      /* compare every key with the ends, also those that all rows see */
    int gap;      /* elements between rows */
    int at_start; /* inputs begin behind a forbidden page rather than end before one */
    int stage;    /* copy K and V tiles, also where that is not needed */
    int few;      /* the kernels for few query rows */
    int fetch;    /* what is read next: 1 in order, as few rows do anyway, 2 in mixed order */
    int one_load; /* as on a CPU that loads one vector of 64 bytes for two products */
};

static const struct how plainly = {.name = "plainly", .tile = 2 * FC_BLOCK, .vectors = FC_NV};
/* clang-format off */
static const struct how ways[] = {
    {"rows apart, blocks alone",        FC_BLOCK,     FC_NV, 0, 0, 5, 1, 0, 0, 0},
    {"staged",                          3 * FC_BLOCK, FC_NV, 0, 0, 0, 0, 1, 0, 0},
    {"staged, rows apart",              FC_SPAN,      2,     0, 0, 3, 0, 1, 0, 0},
    {"every key asked for",             3 * FC_BLOCK, FC_NV, 0, 1, 0, 0, 0, 0, 0},
    {"one vector a strip",              FC_SPAN,      1,     0, 0, 1, 0, 0, 0, 0},
    {"more vectors than rows",          2 * FC_BLOCK, FC_NV, 1, 0, 0, 1, 0, 0, 0},
    {"fetched ahead",                   FC_BLOCK,     FC_NV, 0, 0, 0, 0, 0, 0, 1},
    {"fetched in mixed order",          FC_BLOCK,     FC_NV, 0, 0, 0, 0, 0, 0, 2},
    {"few rows",                        2 * FC_BLOCK, FC_NV, 0, 0, 0, 0, 0, 1, 0},
    {"few rows, spans at a time",       FC_SPAN,      FC_NV, 0, 0, 0, 0, 0, 1, 1},
    {"few rows apart",                  FC_SPAN,      FC_NV, 0, 0, 3, 0, 0, 1, 1},
    {"few rows, in mixed order",        FC_SPAN,      FC_NV, 0, 0, 0, 0, 0, 1, 2},
    {"few rows, every key asked for, in mixed order",
                                        3 * FC_BLOCK, FC_NV, 0, 1, 0, 0, 0, 1, 2},
    {"few rows, every key asked for",   3 * FC_BLOCK, FC_NV, 0, 1, 0, 0, 0, 1, 1},
    {"few rows apart, blocks alone",    FC_BLOCK,     FC_NV, 0, 0, 5, 1, 0, 1, 0},
    {"few rows apart, every key asked for",
                                        3 * FC_BLOCK, FC_NV, 0, 1, 1, 0, 0, 1, 1},
    {"few rows, few loads",             FC_SPAN,      FC_NV, 0, 0, 0, 0, 0, 1, 2, 1},
    {"few rows apart, few loads, every key asked for",
                                        3 * FC_BLOCK, FC_NV, 0, 1, 3, 1, 0, 1, 1, 1},
};
/* clang-format on */

static ptrdiff_t whole(ptrdiff_t n, ptrdiff_t unit) { return (n + unit - 1) / unit * unit; }

/* `ends` of the strip's rows; all_keys can be read. */
static void attend_strip(const struct target *t, const struct problem *p, const struct how *how,
                         struct fc_strip *strip, const int64_t *ends, int64_t all_keys,
                         const char *k, ptrdiff_t ldk, const char *v, ptrdiff_t ldv_rows) {
    const struct fc_kernels *kernels = t->kernels;
    const struct fc_storage *stored = t->stored;
    const int step = kernels->step, size = stored->elem_size, real = kernels->real_size;
    const int foreign = strcmp(stored->dtype, kernels->dtype) != 0;
    const int line = MAX(stored->line, 1), alone = !how->few && !how->stage;
    const int ring_k = alone && strip->nv <= stored->ring_k && p->d > 0 && p->d % line == 0;
    const int ring_v = alone && strip->nv <= stored->ring_v && p->dv > 0 && p->dv % line == 0;
    const int stage_k = !how->few && !ring_k && (how->stage || foreign || p->d % step);
    const int stage_v = !how->few && !ring_v && (how->stage || foreign || step > 1);
    const int64_t key_end = ends[strip->nq - 1];
    struct fc_strip part = *strip;
    part.m = strip->m0, part.l = strip->l0;
    kernels->start_span(&part);
    for (int64_t key = 0, nk; key < key_end; key += nk) {
        const int64_t span_end = MIN((key / FC_SPAN + 1) * FC_SPAN, all_keys);
        nk = MIN(how->tile, span_end - key);
        /* Keys of the tile, which other strips may see; of this strip; of all of its rows. */
        const int there = (int)nk, n = (int)MIN(nk, key_end - key);
        const int full = how->ask ? 0 : (int)MAX(0, MIN(n, ends[0] - key));
        const char *k_tile = k + key * ldk * size, *v_tile = v + key * ldv_rows * size;
        ptrdiff_t ld_k = ldk, ldv = ldv_rows, panel = kernels->panel;
        if (stage_k) {
            const ptrdiff_t row = whole(p->d, step) / step;
            char *staged = place(AREA_STAGED_K, (size_t)(there * row * real), 0);
            stored->stage_rows(staged, k_tile, ldk, there, p->d);
            k_tile = staged, ld_k = row * step;
        }
        if (stage_v) {
            const ptrdiff_t lines = whole(there, step) / step;
            const ptrdiff_t before = (p->dv - 1) / kernels->panel;
            const ptrdiff_t tail = step > 1 ? kernels->panel : p->dv - before * kernels->panel;
            char *staged =
                place(AREA_STAGED_V,
                      (size_t)(((before + 1) * lines - 1) * kernels->panel + tail) * real, 0);
            stored->stage_panels(staged, v_tile, ldv_rows, there, p->dv);
            v_tile = staged, ldv = kernels->panel, panel = lines * kernels->panel;
        }
        part = *strip;
        if (key < FC_SPAN) {
            part.m = strip->m0, part.l = strip->l0, part.o = strip->o0;
        }
        part.fresh = key % FC_SPAN == 0;
        if (part.fresh) {
            kernels->start_span(&part);
        }
        if (full < n) {
            kernels->see(&part, ends, key);
        }
        part.mixes = how->fetch == 2;
        part.cold = key == 0 && how->ask;
        part.rows_left = all_keys - key;
        /* Any address will do, or none. */
        part.next_k = how->ask ? NULL : v, part.next_v = how->ask ? NULL : k;
        if (how->fetch && !how->few) { /* V while K is read, then the next tile's K */
            part.soon = v + key * ldv_rows * size, part.soon_stride = ldv_rows * size;
            part.soon_rows = there, part.soon_bytes = p->dv * size;
        }
        (how->few ? stored->scores_few
         : ring_k ? stored->scores
                  : kernels->scores)(&part, k_tile, ld_k, n, full);
        (how->few ? kernels->softmax_few : kernels->softmax)(&part, n, full);
        if (how->fetch && !how->few) {
            part.soon = k + (key + nk) * ldk * size, part.soon_stride = ldk * size;
            part.soon_rows = (int)MIN(nk, all_keys - key - nk), part.soon_bytes = p->d * size;
        }
        (how->few ? stored->accumulate_few
         : ring_v ? stored->accumulate
                  : kernels->accumulate)(&part, v_tile, ldv, panel, n, full);
        if (key >= FC_SPAN && (key + nk == span_end || key + nk >= key_end)) {
            (how->few ? kernels->merge_few : kernels->merge)(&part);
        }
    }
}

/* Rows first .. first + count - 1 into dense out [rows][dv] and lse [rows] (or NULL). */
static void attend(const struct target *t, const struct problem *p, const struct how *how,
                   int first, int count, char *out, char *lse) {
    const struct fc_kernels *kernels = t->kernels;
    const int size = p->size, lanes = kernels->lanes,
              units = whole(p->d, kernels->step) / kernels->step;
    const int row_size = t->rows->elem_size;
    const int keys = (int)p->ends[first + count - 1]; /* further ones cannot even be read */
    const ptrdiff_t ldq = p->d + how->gap, ldk = p->d + how->gap, ldv = p->dv + how->gap;
    const ptrdiff_t ldo = p->dv + how->gap + 1, ldl = 3;
    const char *q = place_rows(AREA_Q, p->q + (ptrdiff_t)first * p->d * size, count, p->d, ldq,
                               size, t->rows_format, how->at_start);
    const char *k =
        place_rows(AREA_K, p->k, keys, p->d, ldk, size, t->stored_format, how->at_start);
    const char *v =
        place_rows(AREA_V, p->v, keys, p->dv, ldv, size, t->stored_format, how->at_start);
    struct scratch outputs = {{0}, {0}, 0};
    char *out_rows = take(&outputs, (size_t)(count * ldo) * row_size);
    char *lse_rows = take(&outputs, (size_t)(count * ldl) * size);

    for (int row = 0; row < count;) {
        const int vectors = (count - row + lanes - 1) / lanes;
        struct fc_strip strip = {0};
        if (how->few) {
            strip.nq = MIN(FC_NV * lanes, count - row);
            strip.nv = (strip.nq + lanes - 1) / lanes;
        } else {
            strip.nv = how->widen                              ? FC_NV
                       : vectors == 4 && how->vectors == FC_NV ? 2
                                                               : MIN(vectors, how->vectors);
            strip.nq = MIN(strip.nv * lanes, count - row);
        }
        strip.d = p->d;
        strip.dv = p->dv;
        strip.scale = p->scale;
        strip.one_load = how->one_load;
        struct scratch scratch = {{0}, {0}, 0};
        const size_t line = (size_t)strip.nv * lanes * size;
        const size_t tile = (size_t)MAX(1, MIN(MIN(how->tile, FC_SPAN), keys));
        /* Of few rows each is padded to whole vectors, and has room for the scores of a span. */
        const size_t of_rows = (size_t)strip.nq * size;
        const size_t o_bytes =
            how->few ? of_rows * whole(p->dv, t->kernels->step * lanes) : line * p->dv;
        const ptrdiff_t few_units = whole(FC_FEW_COLUMNS(p->d) / t->kernels->step, lanes);
        strip.qt = take(&scratch, how->few ? of_rows * few_units : line * units);
        strip.m = take(&scratch, line);
        strip.l = take(&scratch, line);
        strip.o = take(&scratch, o_bytes);
        strip.m0 = take(&scratch, line);
        strip.l0 = take(&scratch, line);
        strip.o0 = take(&scratch, o_bytes);
        strip.s = take(&scratch, how->few ? strip.nq * FC_FEW_STRIDE((size_t)size) : line * tile);
        strip.alpha = take(&scratch, line * ((tile + FC_BLOCK - 1) / FC_BLOCK));
        strip.end = take(&scratch, line);
        /* Lanes without a row read the last one; what they would write has no address. */
        const void *q_at[MAX_ROWS];
        void *out_at[MAX_ROWS] = {0}, *lse_at[MAX_ROWS] = {0};
        int64_t ends[MAX_ROWS];
        for (int i = 0; i < strip.nv * lanes; i++) {
            const int r = row + MIN(i, strip.nq - 1);
            q_at[i] = q + r * ldq * row_size;
            ends[i] = p->ends[first + r];
            if (i < strip.nq) {
                out_at[i] = out_rows + r * ldo * row_size;
                lse_at[i] = lse_rows + r * ldl * size;
            }
        }
        (how->few ? t->rows->pack_few : t->rows->pack)(&strip, q_at);
        attend_strip(t, p, how, &strip, ends, keys, k, ldk, v, ldv);
        (how->few ? t->rows->finish_few : t->rows->finish)(&strip, out_at, lse ? lse_at : NULL);
        release(&scratch);
        row += strip.nq;
    }

    int untouched = 1;
    for (int row = 0; row < count; row++) {
        const char *from = out_rows + row * ldo * row_size, *lse_from = lse_rows + row * ldl * size;
        load(out + (ptrdiff_t)(first + row) * p->dv * size, from, p->dv, size, t->rows_format);
        untouched &=
            all_are(from + (ptrdiff_t)p->dv * row_size, (size_t)(ldo - p->dv) * row_size, NAN_BYTE);
        if (lse) {
            memcpy(lse + (ptrdiff_t)(first + row) * size, lse_from, (size_t)size);
        }
        untouched &=
            all_are(lse_from + (lse ? size : 0), (size_t)(ldl - (lse != NULL)) * size, NAN_BYTE);
    }
    check(untouched, "something was written between the rows of the output");
    release(&outputs);
    unify_nan(out + (ptrdiff_t)first * p->dv * size, (ptrdiff_t)count * p->dv, size);
    if (lse) {
        unify_nan(lse + (ptrdiff_t)first * size, count, size);
    }
}

/* the reference: one row after the other, three passes */

struct answer {
    double *out, *out_bound, *lse, *lse_bound;
};

/* A priori bounds, first order in u, half a unit in the last place of the type. In units of log2:
 *   score     (d + 3) u sum |c q k|, a chain of d FMAs and the rounding of c q
 *   weight    ln 2 times the errors of score and maximum, 2 u |s - m| for the subtractions here and
 *             in the rescales, 2 u a 2^x: one, and one for each of the `steps` rescales
 *   sums      u for each of n keys and each rescale, in o and in l alike, half a subnormal in o
 * A reference in double adds as much again for float64. In pairs, whose subnormal numbers are 0, a
 * weight is rounded to bf16, in o and in l alike, and so is the result; 2^x errs by 2^-17. The sum
 * of two products may be rounded before it is added, and both times to odd, by up to 2 u: a chain
 * of half as many steps has the same bound. */
static void refer(const struct target *t, const struct problem *p, struct answer *a) {
    const int pairs = t->kernels->step > 1;
    const double u = p->size == 4 ? 0x1p-24 : 0x1p-53, u_weight = pairs ? 0x1p-8 : 0,
                 u_power = pairs ? 0x1p-17 : u;
    const double subnormal = pairs ? 0x1p-126 : p->size == 4 ? 0x1p-149 : 0x1p-1074;
    const double slack = p->size == 8 && sizeof(wide) == 8 ? 2 : 1;
    wide *s = must(malloc(sizeof(wide) * (size_t)(p->keys + 1)));
    wide *error = must(malloc(sizeof(wide) * (size_t)(p->keys + 1)));
    for (int row = 0; row < p->rows; row++) {
        const int n = (int)p->ends[row];
        const double steps = n / FC_BLOCK + n / FC_SPAN + 3;
        wide top = -INFINITY, top_error = 0, l = 0, l_error = 0;
        for (int key = 0; key < n; key++) {
            wide sum = 0, size_of_sum = 0;
            for (int i = 0; i < p->d; i++) {
                const wide product = (wide)p->scale * get(p->q, row * p->d + i, p->size) *
                                     get(p->k, (ptrdiff_t)key * p->d + i, p->size);
                sum += product;
                size_of_sum += WIDE(fabs)(product);
            }
            s[key] = sum;
            error[key] = (p->d + 3) * u * size_of_sum;
            if (sum > top) {
                top = sum;
                top_error = error[key];
            }
        }
        for (int key = 0; key < n; key++) {
            const wide below = top - s[key], weight = s[key] == -INFINITY ? 0 : WIDE(exp2)(-below);
            error[key] = weight == 0 ? 0x1p-100
                                     : LN2 * (error[key] + top_error + 2 * u * below) +
                                           2 * u_power * steps + u_weight;
            s[key] = weight;
            l += weight;
            l_error += weight * error[key];
        }
        for (int i = 0; i < p->dv; i++) {
            wide o = 0, size_of_o = 0, o_error = 0;
            for (int key = 0; key < n; key++) {
                const wide v = get(p->v, (ptrdiff_t)key * p->dv + i, p->size);
                o += s[key] * v;
                size_of_o += s[key] * WIDE(fabs)(v);
                o_error += MAX(s[key], 0x1p-120) * error[key] * WIDE(fabs)(v);
            }
            const int at = row * p->dv + i;
            a->out[at] = a->out_bound[at] = 0;
            if (l > 0) {
                const wide chains = 2 * (n + steps) * u * size_of_o;
                const wide bound = (o_error + chains) / l + WIDE(fabs)(o / l) * l_error / l;
                a->out[at] = (double)(o / l);
                a->out_bound[at] = slack * (double)bound + (n + steps) * subnormal;
                if (t->rows_format) { /* 2^-mantissa is a unit in the last place of 1 */
                    const double high = fabs(a->out[at]) + a->out_bound[at];
                    a->out_bound[at] += ldexp(high, -t->rows_format->mantissa - 1) +
                                        ldexp(1, t->rows_format->lowest - 11);
                }
            }
        }
        a->lse[row] = -INFINITY;
        a->lse_bound[row] = 0;
        if (l > 0) {
            const double lse = (double)(top * (wide)M_LN2 + WIDE(log)(l));
            const double sums = (double)(LN2 * top_error + l_error / l) + (n + steps) * u;
            a->lse[row] = lse;
            a->lse_bound[row] = slack * (sums + 3 * u * (fabs(lse) + fabs((double)top)));
        }
    }
    free(s);
    free(error);
}

static struct answer make_answer(const struct problem *p) {
    const size_t rows = (size_t)p->rows, values = rows * (size_t)p->dv;
    struct answer a = {must(malloc(values * 8)), must(malloc(values * 8)), must(malloc(rows * 8)),
                       must(malloc(rows * 8))};
    return a;
}

static void free_answer(struct answer *a) {
    free(a->out);
    free(a->out_bound);
    free(a->lse);
    free(a->lse_bound);
}

/* The worst |got - want| / bound, infinity where only one of them is NaN or infinite. */
static double worst(const char *got, const double *want, const double *bound, int n, int size) {
    double ratio = 0;
    for (int i = 0; i < n; i++) {
        const double x = get(got, i, size);
        if (x == want[i]) {
            continue;
        }
        const double r = fabs(x - want[i]) / bound[i];
        ratio = isnan(r) ? INFINITY : MAX(ratio, r);
    }
    return ratio;
}

/* the contract: the same roundings in the same order, spelt out for one row */

static double rounded(int size, double x) { return size == 4 ? (float)x : x; }

static double fused(const struct target *t, int size, double a, double b, double c) {
    if (!t->has_fma) {
        return rounded(size, rounded(size, a * b) + c);
    }
    return size == 4 ? fmaf((float)a, (float)b, (float)c) : fma(a, b, c);
}

/* 2^(x - top) as this instruction set has it. */
static double power(const struct target *t, int size, double x, double top) {
    static _Alignas(64) char from[64], to[64];
    put(from, 0, size, rounded(size, x - (top == -INFINITY ? 0 : top)));
    t->probe->exp2(from, to, (size_t)t->kernels->lanes);
    return get(to, 0, size);
}

/* c + a0 b0 + a1 b1 as this CPU has it. */
static double dot(const struct target *t, const double a[2], const double b[2], double c) {
    static _Alignas(64) char units[3][64];
    for (int i = 0; i < 2; i++) {
        ((uint16_t *)units[0])[i] = narrow(t->stored_format, a[i]);
        ((uint16_t *)units[1])[i] = narrow(t->stored_format, b[i]);
    }
    put(units[2], 0, 4, c);
    t->probe->dot(units[0], units[1], units[2], (size_t)t->kernels->lanes);
    return get(units[2], 0, 4);
}

/* sum <- sum + x y, keys or columns first .. first + n - 1 of a chain, in units. */
static double chain(const struct target *t, const struct problem *p, const char *x, ptrdiff_t at,
                    ptrdiff_t apart, const double *y, int n, double sum) {
    for (int i = 0; i < n; i += t->kernels->step) {
        const double first = get(x, at + i * apart, p->size);
        if (t->kernels->step == 1) {
            sum = fused(t, p->size, first, y[i], sum);
        } else {
            const int both = i + 1 < n;
            const double a[2] = {first, both ? get(x, at + (i + 1) * apart, p->size) : 0};
            const double b[2] = {y[i], both ? y[i + 1] : -0.0}; /* as an unseen weight */
            sum = dot(t, a, b, sum);
        }
    }
    return sum;
}

/* A weight as it counts: in pairs it is a bf16 number, subnormal ones are 0. */
static double counted(const struct target *t, double weight) {
    if (t->kernels->step == 1) {
        return weight;
    }
    return weight < 0x1p-126 ? 0 : widen(t->stored_format, narrow(t->stored_format, weight));
}

/* What queries take of the scale: all of it, in pairs a power of two where it is out of the
 * ordinary; scores take the rest. */
static double scale_of_queries(const struct target *t, double scale) {
    int exponent;
    frexp(scale, &exponent);
    const double power = ldexp(scale != 0, MIN(exponent + 23, MAX(0, exponent - 97)));
    return t->kernels->step == 1 ? scale : power;
}

/* A float's product, sum and quotient are right when rounded from those in double, so `double` can
 * stand for either type here. */
static void follow_contract(const struct target *t, const struct problem *p, int row, char *out,
                            char *lse) {
    const int size = p->size, n = (int)p->ends[row], d = p->d, dv = p->dv;
    const double taken = rounded(size, scale_of_queries(t, p->scale));
    const double rest = t->kernels->step == 1 || taken == 0 ? 1 : rounded(size, p->scale / taken);
    double m0 = -INFINITY, l0 = 0, *o0 = must(calloc((size_t)dv, 8)),
           *o = must(calloc((size_t)dv, 8)), *q = must(calloc((size_t)d, 8));
    for (int i = 0; i < d; i++) {
        q[i] = rounded(size, taken * get(p->q, row * d + i, size));
    }
    for (int span = 0; span < n; span += FC_SPAN) {
        double m = -INFINITY, l = 0;
        memset(o, 0, (size_t)dv * 8);
        for (int block = span; block < MIN(span + FC_SPAN, n); block += FC_BLOCK) {
            const int keys = MIN(FC_BLOCK, n - block);
            double s[FC_BLOCK], old = m, sum = 0;
            for (int key = 0; key < keys; key++) {
                s[key] = chain(t, p, p->k, (ptrdiff_t)(block + key) * d, 1, q, d, 0);
                s[key] = rounded(size, rest * s[key]);
                m = MAX(m, s[key]);
            }
            const double alpha = power(t, size, old, m);
            for (int key = 0; key < keys; key++) {
                s[key] = counted(t, power(t, size, s[key], m));
                sum = rounded(size, sum + s[key]);
            }
            l = fused(t, size, l, alpha, sum);
            for (int i = 0; i < dv; i++) {
                o[i] = chain(t, p, p->v, (ptrdiff_t)block * dv + i, dv, s, keys,
                             rounded(size, o[i] * alpha));
            }
        }
        const double top = MAX(m0, m), a0 = power(t, size, m0, top), a = power(t, size, m, top);
        for (int i = 0; i < dv; i++) {
            o0[i] = l == 0    ? o0[i]
                    : l0 == 0 ? o[i]
                              : fused(t, size, o0[i], a0, rounded(size, o[i] * a));
        }
        l0 = l == 0 ? l0 : l0 == 0 ? l : fused(t, size, l0, a0, rounded(size, l * a));
        m0 = top;
    }
    const double one_over = rounded(size, 1 / l0);
    for (int i = 0; i < dv; i++) {
        put(out, i, size, l0 == 0 ? 0 : o0[i] * one_over);
    }
    round_all(out, dv, size, t->rows_format);
    put(lse, 0, size, l0 == 0 ? -INFINITY : fused(t, 8, m0, LN2, t->probe->log_of_sum(l0)));
    free(o0);
    free(o);
    free(q);
}

/* what must hold of a problem */

static int same_rows(const char *a, const char *b, int first, int count, size_t row_bytes) {
    return memcmp(a + first * row_bytes, b + first * row_bytes, count * row_bytes) == 0;
}

static int all_nan(const char *p, ptrdiff_t first, ptrdiff_t count, int size) {
    for (ptrdiff_t i = first; i < first + count; i++) {
        if (!isnan(get(p, i, size))) {
            return 0;
        }
    }
    return 1;
}

/* Every way of running a problem, and one row alone, say the same. */
static void check_ways(struct target *t, const struct problem *p, const char *out, const char *lse,
                       char *out2, char *lse2) {
    const size_t row_bytes = (size_t)p->dv * p->size;
    for (int w = 0; w < COUNT(ways); w++) {
        const int with_lse = w != 0;
        memset(out2, 0x55, p->rows * row_bytes);
        attend(t, p, &ways[w], 0, p->rows, out2, with_lse ? lse2 : NULL);
        check(same_rows(out, out2, 0, p->rows, row_bytes), "%s: out has other bits", ways[w].name);
        check(!with_lse || same_rows(lse, lse2, 0, p->rows, (size_t)p->size),
              "%s: lse has other bits", ways[w].name);
    }
    const int row = random_below(p->rows);
    attend(t, p, &ways[random_below(COUNT(ways))], row, 1, out2, lse2);
    check(same_rows(out, out2, row, 1, row_bytes) && same_rows(lse, lse2, row, 1, (size_t)p->size),
          "row %d alone has other bits", row);
}

/* Garbage in keys and values from one row's end on: rows that do not see it keep their bits, rows
 * that see NaN become NaN, and NaN in one column of one value reaches that column alone. */
static void check_garbage(struct target *t, struct problem *p, const char *out, const char *lse,
                          char *out2, char *lse2) {
    static const double garbage[] = {NAN, INFINITY, -INFINITY, 1e38};
    const size_t row_bytes = (size_t)p->dv * p->size;
    const int row = random_below(p->rows), kind = random_below(COUNT(garbage));
    const int from = (int)p->ends[row];
    int blind = 0; /* rows before this one do not see key `from` */
    while (blind < p->rows && p->ends[blind] <= from) {
        blind++;
    }
    const struct how *how = random_below(2) ? &plainly : &ways[random_below(COUNT(ways))];
    char *k = p->k, *v = p->v, *q = p->q;

    const size_t k_bytes = (size_t)p->keys * p->d * p->size, v_bytes = (size_t)p->keys * row_bytes;
    p->k = memcpy(must(malloc(k_bytes + 1)), k, k_bytes);
    p->v = memcpy(must(malloc(v_bytes + 1)), v, v_bytes);
    for (ptrdiff_t i = (ptrdiff_t)from * p->d; i < (ptrdiff_t)p->keys * p->d; i++) {
        put(p->k, i, p->size, garbage[kind]);
    }
    for (ptrdiff_t i = (ptrdiff_t)from * p->dv; i < (ptrdiff_t)p->keys * p->dv; i++) {
        put(p->v, i, p->size, garbage[(kind + 1) % COUNT(garbage)]);
    }
    attend(t, p, how, 0, p->rows, out2, lse2);
    check(same_rows(out, out2, 0, blind, row_bytes) &&
              same_rows(lse, lse2, 0, blind, (size_t)p->size),
          "%s: %g in keys that are not seen has leaked", how->name, garbage[kind]);
    if (kind == 0) {
        check(all_nan(out2, (ptrdiff_t)blind * p->dv, (ptrdiff_t)(p->rows - blind) * p->dv,
                      p->size) &&
                  all_nan(lse2, blind, p->rows - blind, p->size),
              "%s: NaN in a key that is seen was lost", how->name);
    }

    /* (A score of -inf gives a weight of 0, and a span of such weights is left out.) */
    if (from < p->keys && get(k, (ptrdiff_t)from * p->d, p->size) != -INFINITY) {
        const int column = random_below(p->dv);
        memcpy(p->k, k, k_bytes);
        memcpy(p->v, v, v_bytes);
        put(p->v, (ptrdiff_t)from * p->dv + column, p->size, NAN);
        attend(t, p, how, 0, p->rows, out2, lse2);
        int reached = 1;
        for (int i = blind; i < p->rows; i++) {
            const ptrdiff_t at = (ptrdiff_t)i * p->dv + column;
            reached &= isnan(get(out2, at, p->size));
            put(out2, at, p->size, get(out, at, p->size));
        }
        check(reached, "%s: NaN in a value that is seen was lost", how->name);
        check(same_rows(out, out2, 0, p->rows, row_bytes) &&
                  same_rows(lse, lse2, 0, p->rows, (size_t)p->size),
              "%s: NaN in one value has reached more than its column", how->name);
    }
    free(p->k);
    free(p->v);
    p->k = k;
    p->v = v;

    const size_t q_bytes = (size_t)p->rows * p->d * p->size;
    p->q = memcpy(must(malloc(q_bytes)), q, q_bytes);
    put(p->q, (ptrdiff_t)row * p->d + random_below(p->d), p->size, NAN);
    attend(t, p, how, 0, p->rows, out2, lse2);
    check(from == 0 ? get(lse2, row, p->size) == -INFINITY
                    : all_nan(out2, (ptrdiff_t)row * p->dv, p->dv, p->size) &&
                          isnan(get(lse2, row, p->size)),
          "%s: NaN in a query was lost, or reached a row that sees nothing", how->name);
    check(same_rows(out, out2, 0, row, row_bytes) &&
              same_rows(out, out2, row + 1, p->rows - row - 1, row_bytes),
          "%s: NaN in a query has reached another row", how->name);
    free(p->q);
    p->q = q;
}

/* 16-bit keys and values, which were widened on their way, give the bits of float32; 16-bit results
 * are those rounded once. */
static void check_storage(const struct target *t, const struct problem *p, const char *out,
                          const char *lse, char *out2, char *lse2) {
    const size_t out_bytes = (size_t)p->rows * p->dv * p->size;
    const size_t lse_bytes = (size_t)p->rows * p->size;
    struct target computed = *t, rounding = *t;
    computed.stored = t->rows;
    computed.stored_format = NULL;
    attend(&computed, p, &plainly, 0, p->rows, out2, lse2);
    check(memcmp(out, out2, out_bytes) == 0 && memcmp(lse, lse2, lse_bytes) == 0,
          "other bits than with keys and values of %s", t->kernels->dtype);

    rounding.rows = t->stored;
    rounding.rows_format = t->stored_format;
    char *want = memcpy(must(malloc(out_bytes)), out, out_bytes);
    round_all(want, (ptrdiff_t)p->rows * p->dv, p->size, t->stored_format);
    for (int w = -1; w < COUNT(ways); w++) {
        const struct how *how = w < 0 ? &plainly : &ways[w];
        attend(&rounding, p, how, 0, p->rows, out2, lse2);
        check(memcmp(want, out2, out_bytes) == 0 && memcmp(lse, lse2, lse_bytes) == 0,
              "%s: %s rows are not those of %s, rounded once", how->name, t->stored->dtype,
              t->kernels->dtype);
    }
    free(want);
}

/* All that is asked of one problem on every target; out_fma is what the first one with FMA said. */
static void check_problem(struct target *targets, int count, struct problem *p, const char *name) {
    struct answer want = make_answer(p);
    refer(targets, p, &want);
    const int values = p->rows * p->dv;
    const size_t out_bytes = (size_t)values * p->size, lse_bytes = (size_t)p->rows * p->size;
    const size_t row_bytes = (size_t)p->dv * p->size;
    char *out = must(malloc(out_bytes)), *out2 = must(malloc(out_bytes)), *out_fma = NULL;
    char *lse = must(malloc(lse_bytes)), *lse2 = must(malloc(lse_bytes)), *lse_fma = NULL;
    const uint64_t seed = random_bits();
    for (int i = 0; i < count; i++) {
        struct target *t = &targets[i];
        random_state = seed;
        snprintf(what, sizeof(what), "%s %s, %s: %d rows, %d keys, d %d, dv %d, ends %d .. %d",
                 t->stored->dtype, t->kernels->isa, name, p->rows, p->keys, p->d, p->dv,
                 (int)p->ends[0], (int)p->ends[p->rows - 1]);
        attend(t, p, &plainly, 0, p->rows, out, lse);
        hash(&t->bits, out, out_bytes);
        hash(&t->bits, lse, lse_bytes);

        const double out_ratio = worst(out, want.out, want.out_bound, values, p->size);
        const double lse_ratio = worst(lse, want.lse, want.lse_bound, p->rows, p->size);
        check(out_ratio <= 1, "out is wrong by %.3g times the bound", out_ratio);
        check(lse_ratio <= 1, "lse is wrong by %.3g times the bound", lse_ratio);
        t->bound_used = MAX(t->bound_used, MAX(out_ratio, lse_ratio));

        const int row = random_below(p->rows);
        follow_contract(t, p, row, out2 + row * row_bytes, lse2 + row * p->size);
        check(same_rows(out, out2, row, 1, row_bytes) &&
                  same_rows(lse, lse2, row, 1, (size_t)p->size),
              "row %d has other bits than the contract says", row);
        if (!brief || seed % 3 == 0) {
            check_ways(t, p, out, lse, out2, lse2);
            check_garbage(t, p, out, lse, out2, lse2);
            if (t->stored_format && !t->rows_format) {
                check_storage(t, p, out, lse, out2, lse2);
            }
        }
        if (t->has_fma && !out_fma) {
            out_fma = memcpy(must(malloc(out_bytes)), out, out_bytes);
            lse_fma = memcpy(must(malloc(lse_bytes)), lse, lse_bytes);
        } else if (t->has_fma) {
            check(memcmp(out, out_fma, out_bytes) == 0 && memcmp(lse, lse_fma, lse_bytes) == 0,
                  "other bits than another instruction set with FMA");
        }
    }
    random_state = seed; /* the next problem is the same however this one was looked at */
    free(out);
    free(out2);
    free(out_fma);
    free(lse);
    free(lse2);
    free(lse_fma);
    free_answer(&want);
}

/* Every `each`-th of the problems. */
static void check_tiles(struct target *targets, int count, int each, int turns) {
    static const int lengths[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12,
                                  13, 14, 15, 16, 17, 18, 19, 20, 63, 64, 65, 128};
    static const double heats[] = {2, 0.5, 8, 60};
    const int pairs = COUNT(lengths) * COUNT(lengths);
    random_state = 1;
    for (int i = 0; i < pairs * turns; i += each) {
        /* Every (d, dv); every count of rows and of keys many times, in ever other company. */
        const int rows = 1 + (7 * i + i / pairs) % MAX_ROWS, keys = 1 + (11 * i + i / pairs) % 130;
        const int d = lengths[i % COUNT(lengths)],
                  dv = lengths[i / COUNT(lengths) % COUNT(lengths)];
        const int mask = random_below(MASKS), heat = random_below(COUNT(heats));
        struct problem p = make_problem(targets, rows, keys, d, dv, mask, heats[heat], i % 3 == 0);
        check_problem(targets, count, &p, "tile");
        free_problem(&p);
    }
}

/* Keys longer than what few rows take of them at once. */
static void check_long_keys(struct target *targets, int count, int each, int turns) {
    static const int lengths[] = {127, 128, 129, 192, 255, 256, 257, 385, 513};
    random_state = 5;
    for (int i = 0; i < 3 * COUNT(lengths) * turns; i += each) {
        const int rows = 1 + random_below(20), keys = 1 + random_below(100);
        const int d = lengths[i % COUNT(lengths)], dv = 1 + random_below(5);
        const int mask = random_below(MASKS);
        struct problem p = make_problem(targets, rows, keys, d, dv, mask, 1, random_below(2));
        check_problem(targets, count, &p, "long keys");
        free_problem(&p);
    }
}

/* Without columns there are still sums. */
static void check_no_columns(const struct target *t) {
    for (int i = 0; i < COUNT(ways) * 8; i++) {
        const struct how *how = &ways[i / 8];
        struct problem p = make_problem(t, 1 + i % 13, 1 + 37 * i % 400, 3, 1, i % MASKS, 2, 0);
        const size_t bytes = (size_t)p.rows * p.size;
        char *out = must(malloc(bytes)), *lse = must(malloc(bytes)), *lse2 = must(malloc(bytes));
        attend(t, &p, how, 0, p.rows, out, lse);
        p.dv = 0;
        attend(t, &p, how, 0, p.rows, out, lse2);
        check(memcmp(lse, lse2, bytes) == 0, "%s: other sums without columns", how->name);
        free(out);
        free(lse);
        free(lse2);
        free_problem(&p);
    }
}

static void check_spans(struct target *targets, int count, int each, int turns) {
    enum { S = FC_SPAN };
    static const int keys[] = {0,         S - 1, S,         S + 1,     S + 63, S + 64,    S + 66,
                               2 * S - 1, 2 * S, 2 * S + 1, 3 * S - 9, 4 * S,  5 * S + 28};
    const int size = targets->kernels->real_size;
    random_state = 2;
    for (int i = 0; i < 3 * COUNT(keys) * turns; i += each) {
        /* Few rows of whole pieces of K take ways of their own. */
        const int pieces = i % 3 == 1;
        const int rows = 1 + random_below(pieces ? 6 : 20), dv = 1 + random_below(17);
        const int d = pieces ? 8 + 8 * random_below(5) : 1 + random_below(9);
        const int mask = (i + i / COUNT(keys)) % MASKS;
        struct problem p =
            make_problem(targets, rows, keys[i % COUNT(keys)], d, dv, mask, 1 + i % 5, i % 3 == 0);
        check_problem(targets, count, &p, "spans");

        /* The first keys weigh nothing, up to a border or beyond: empty states that were seen. */
        static const int borders[] = {1, 63, 64, 70, S - 1, S, S + 6, 2 * S, 6 * S};
        const int drawn = borders[random_below(COUNT(borders))], border = MIN(drawn, p.keys);
        for (int row = 0; row < rows; row++) {
            put(p.q, (ptrdiff_t)row * d, size, 1);
        }
        for (int key = 0; key < border; key++) {
            put(p.k, (ptrdiff_t)key * d, size, -INFINITY);
        }
        check_problem(targets, count, &p, "scores of -inf");

        /* Values of a few subnormal steps, or in pairs, which have none, twice the smallest number:
         * sums that round to either zero. */
        const struct format *f = p.format;
        const double steps = targets->kernels->step > 1 ? 0x1p-125
                             : f                        ? ldexp(4, f->lowest - f->mantissa)
                             : size == 4                ? 0x1p-147
                                                        : 0x1p-1072;
        for (int at = 0; at < p.keys * dv; at++) {
            put(p.v, at, size, get(p.v, at, size) * steps);
        }
        round_problem(&p);
        check_problem(targets, count, &p, "subnormal values");
        free_problem(&p);
    }
}

/* Weights about the smallest that count: all ways agree on which are 0. */
static void check_smallest_weights(const struct target *t) {
    const int size = t->kernels->real_size, lowest = size == 4 ? 126 : 1022;
    struct problem p = make_problem(t, 3, 5, 1, 2, ALL_KEYS, 1, 0);
    const size_t bytes = (size_t)p.rows * p.dv * size, lse_bytes = (size_t)p.rows * size;
    char *out = must(malloc(bytes)), *out2 = must(malloc(bytes)), *lse = must(malloc(lse_bytes));
    for (int i = 0; i < p.rows; i++) {
        put(p.q, i, size, 1);
    }
    for (int i = 0; i < p.keys * p.dv; i++) { /* the first key has all the weight, and no value */
        put(p.k, i / p.dv, size, i < p.dv ? 0 : -1);
        put(p.v, i, size, i < p.dv ? 0 : 0x1p100);
    }
    for (int i = -8; i < 64; i++) {
        p.scale = lowest + i / 1024.0;
        attend(t, &p, &plainly, 0, p.rows, out, lse);
        for (int w = 0; w < COUNT(ways); w++) {
            attend(t, &p, &ways[w], 0, p.rows, out2, lse);
            check(memcmp(out, out2, bytes) == 0, "%s: another smallest weight", ways[w].name);
        }
    }
    free(out);
    free(out2);
    free(lse);
    free_problem(&p);
}

/* Products that the scale brings back into the range of float32, and scales at its ends. */
static void check_scales(struct target *targets, int count) {
    static const struct {
        int q, k; /* powers of two */
        double scale;
    } sizes[] = {
        {63, 63, 0x1.4p-123},  {100, 26, -0x1.4p-123},
        {26, 100, 0x1.4p-123}, {0, 120, 0x1.4p-120},
        {120, 0, -0x1.4p-120}, {0, 20, 0x1.4p-24},
        {0, 21, 0x1.4p-25},    {-63, -63, 0x1.4p126},
        {-90, -36, 0x1.4p126}, {-36, -90, -0x1.4p126},
        {-96, 0, 0x1.4p96},    {0, -97, 0x1.4p97},
        {-64, -64, FLT_MAX},   {60, 60, 0},
        {60, 60, 0x1p-1070},   {100, 100, 0x1.4p-101},
    };
    const int size = targets->kernels->real_size;
    random_state = 3;
    for (int i = 0; i < 2 * COUNT(sizes); i++) {
        const int rows = i % 2 ? 1 + random_below(12) : 13 + random_below(MAX_ROWS - 12);
        struct problem p =
            make_problem(targets, rows, 1 + random_below(300), 65, 5, i % MASKS, 1, 0);
        for (int at = 0; at < rows * p.d; at++) {
            put(p.q, at, size, ldexp(get(p.q, at, size), sizes[i / 2].q));
        }
        for (int at = 0; at < p.keys * p.d; at++) {
            put(p.k, at, size, ldexp(get(p.k, at, size), sizes[i / 2].k));
        }
        p.scale = sizes[i / 2].scale;
        check_problem(targets, count, &p, "scale");
        free_problem(&p);
    }
}

/* Ends far away on either side of the tile. */
static void check_see(const struct target *t) {
    enum { S = FC_SPAN };
    const struct fc_kernels *kernels = t->kernels;
    static const int64_t ends[] = {INT64_MIN / 2, -1, 0, 1, S - 1, S, S + 1, INT64_MAX / 2};
    static const double sees[2][8] = {{0, 0, 0, 1, S - 1, S, S, S}, {0, 0, 0, 0, 0, 0, 1, S}};
    int right = 1;
    for (int i = 0; i < 16; i++) {
        struct scratch scratch = {{0}, {0}, 0};
        struct fc_strip strip = {.nq = 1, .nv = 1};
        int64_t row_end[MAX_ROWS];
        strip.end = take(&scratch, (size_t)kernels->lanes * kernels->real_size);
        for (int lane = 0; lane < kernels->lanes; lane++) {
            row_end[lane] = ends[(i + lane) % 8];
        }
        kernels->see(&strip, row_end, i < 8 ? 0 : S);
        for (int lane = 0; lane < kernels->lanes; lane++) {
            right &= get(strip.end, lane, kernels->real_size) == sees[i / 8][(i + lane) % 8];
        }
        release(&scratch);
    }
    check(right, "see: wrong number of keys");
}

/* A state that has seen nothing changes no bit of another one, on either side of a merge; a NaN
 * without weight (a value that was seen, with a score of -inf) goes on. */
static void check_merge(const struct target *t, int few) {
    const struct fc_kernels *kernels = t->kernels;
    const int size = kernels->real_size, dv = 5, lanes = kernels->lanes;
    const int padded = (int)whole(dv, kernels->step * lanes);
    for (int nv = 1; nv <= FC_NV; nv++) {
        struct scratch scratch = {{0}, {0}, 0};
        struct fc_strip strip = {.nq = 1, .nv = nv, .d = 1, .dv = dv};
        const int rows = nv * lanes;
        const int of_row = few ? padded : 1, of_column = few ? 1 : rows;
        const size_t line = (size_t)nv * lanes * size,
                     o_bytes = (size_t)rows * size * (few ? padded : dv);
        strip.nq = few ? rows : 1;
        char *m = strip.m = take(&scratch, line), *m0 = strip.m0 = take(&scratch, line);
        char *l = strip.l = take(&scratch, line), *l0 = strip.l0 = take(&scratch, line);
        char *o = strip.o = take(&scratch, o_bytes), *o0 = strip.o0 = take(&scratch, o_bytes);
        struct fc_strip both = strip;
        both.m = m0, both.l = l0;
        kernels->start_span(&strip);
        kernels->start_span(&both);
        int right = 1;
        for (int i = 0; i < rows; i++) {
            right &= get(m, i, size) == -INFINITY && get(l, i, size) == 0;
            for (int column = 0; column < dv; column++) {
                put(o, column * of_column + i * of_row, size, 0);
                put(o0, column * of_column + i * of_row, size, 0);
            }
            put(i % 3 == 1 ? o0 : o, 2 * of_column + i * of_row, size, NAN);
            if (i % 3) { /* one row in three is empty twice */
                put(i % 3 == 1 ? m : m0, i, size, 10 - i);
                put(i % 3 == 1 ? l : l0, i, size, 1 + i);
                for (int column = 0; column < dv; column++) {
                    put(i % 3 == 1 ? o : o0, column * of_column + i * of_row, size,
                        column ? 1.25 * i : -0.0);
                }
            }
        }
        (few ? kernels->merge_few : kernels->merge)(&strip);
        for (int i = 0; i < rows; i++) {
            right &= get(m0, i, size) == (i % 3 ? 10 - i : -INFINITY);
            right &= get(l0, i, size) == (i % 3 ? 1 + i : 0);
            for (int column = 0; i % 3 && column < dv; column++) {
                const double got = get(o0, column * of_column + i * of_row, size);
                if (column == 2) {
                    right &= isnan(got);
                } else {
                    right &= got == (column ? 1.25 * i : 0) && (column || signbit(got));
                }
            }
        }
        check(right, "merge%s with an empty state, %d vectors", few ? " of few rows" : "", nv);
        release(&scratch);
    }
}

/* 16-bit numbers, every one of them, on each way in and out */

static int is_widened(const struct target *t, uint16_t bits, double got) {
    const double want = widen(t->stored_format, bits);
    return isnan(want) ? isnan(got) : got == want && signbit(got) == signbit(want);
}

/* As rows are staged, in odd lengths. */
static void check_widening(const struct target *t) {
    const int d = 1021;
    int right = 1;
    for (int first = 0; first < 0x10000; first += d) {
        const int n = MIN(d, 0x10000 - first);
        uint16_t *from = (uint16_t *)place(AREA_K, (size_t)n * 2, 0);
        char *to = place(AREA_STAGED_K, (size_t)n * 4, 0);
        for (int i = 0; i < n; i++) {
            from[i] = (uint16_t)(first + i);
        }
        t->stored->stage_rows(to, from, n, 1, n);
        for (int i = 0; i < n; i++) {
            right &= is_widened(t, from[i], get(to, i, 4));
        }
    }
    check(right, "a %s number is not widened exactly when it is staged", t->stored->dtype);
}

/* As scores_few reads them: one number in a key, at each place of a piece of K, with infinity and
 * NaN among the others, for few rows, which turn it over ahead, for all sorts of them, and for
 * more, also on a CPU of few loads; of one key, as rows_left of 0 says, the rows count as rows with
 * gaps. */
static void check_widening_few(const struct target *t) {
    const int lanes = t->kernels->lanes, most = MIN(13, FC_NV * lanes);
    enum { D = 8, FACTOR = 40503 /* odd: each number once */ };
    struct scratch scratch = {{0}, {0}, 0};
    struct fc_strip strip = {.d = D, .dv = 1, .scale = 1};
    strip.qt = take(&scratch, (size_t)(most * whole(D, lanes)) * 4);
    strip.s = take(&scratch, most * FC_FEW_STRIDE((size_t)4));
    const struct {
        int rows, rows_left, one_load;
    } sorts[] = {{1, 0, 0},    {1, FC_SPAN, 0},    {4, FC_SPAN, 0},
                 {most, 0, 0}, {most, FC_SPAN, 0}, {most, FC_SPAN, 1}};
    int right = 1;
    for (int sort = 0; sort < COUNT(sorts); sort++) {
        strip.nq = sorts[sort].rows;
        strip.rows_left = sorts[sort].rows_left;
        strip.one_load = sorts[sort].one_load;
        strip.nv = (strip.nq + lanes - 1) / lanes;
        for (int at = 0; at < D; at++) {
            char q[D * 4] = {0};
            const void *q_at[13];
            for (int r = 0; r < strip.nq; r++) {
                q_at[r] = q;
            }
            put(q, at, 4, 1);
            t->rows->pack_few(&strip, q_at);
            for (int first = 0; first < 0x10000; first += FC_SPAN) {
                uint16_t *k = (uint16_t *)place(AREA_K, FC_SPAN * D * 2, 0);
                memset(k, 0, FC_SPAN * D * 2);
                for (int i = 0; i < FC_SPAN; i++) {
                    k[i * D + at] = (uint16_t)((first + i) * FACTOR);
                }
                t->stored->scores_few(&strip, k, D, FC_SPAN, FC_SPAN);
                const char *last = (char *)strip.s + (strip.nq - 1) * FC_FEW_STRIDE(4);
                for (int i = 0; i < FC_SPAN; i++) {
                    const double want = widen(t->stored_format, k[i * D + at]);
                    const double got = get(last, i, 4);
                    right &= isnan(want) ? isnan(got) : got == want;
                }
            }
        }
    }
    check(right, "a %s number is not widened exactly when it is scored", t->stored->dtype);
    release(&scratch);
}

/* Where a column of a row of few stands: in pairs the 16 bytes of a row of V go to two vectors in
 * turn. */
static int few_column(const struct target *t, int column) {
    const int lanes = t->kernels->lanes, group = t->kernels->step * lanes, at = column % group;
    return t->kernels->step == 1 ? column : column - at + at / 4 % 2 * lanes + at / 8 * 4 + at % 4;
}

/* As results are rounded: all of them, what is half way between two neighbours, and the floats on
 * either side of that. */
static void check_rounding(const struct target *t, int few) {
    const struct format *f = t->stored_format;
    const int lanes = t->kernels->lanes, dv = 1021;
    struct scratch scratch = {{0}, {0}, 0};
    struct fc_strip strip = {.nq = 1, .nv = 1, .d = 1, .dv = dv};
    strip.m0 = take(&scratch, (size_t)lanes * 4);
    strip.l0 = take(&scratch, (size_t)lanes * 4);
    strip.o0 = take(&scratch, (size_t)(few ? whole(dv, t->kernels->step * lanes) : dv * lanes) * 4);
    put(strip.m0, 0, 4, 0);
    put(strip.l0, 0, 4, 1);
    int wrong = 0;
    double at = 0;
    for (int first = 0; first < 4 * 0x10000; first += dv) {
        uint16_t *out = (uint16_t *)place(AREA_V, (size_t)dv * 2, 0);
        void *out_at = out;
        for (int i = 0; i < dv; i++) {
            const int bits = MIN(first + i, 4 * 0x10000 - 1) / 4;
            const double here = widen(f, (uint16_t)bits);
            /* Above the largest there is as much again to infinity. */
            const double next = isinf(widen(f, (uint16_t)(bits + 1)))
                                    ? 2 * here - widen(f, (uint16_t)(bits - 1))
                                    : widen(f, (uint16_t)(bits + 1));
            const float half = (float)((here + next) / 2);
            const double x = (first + i) % 4 == 0   ? here
                             : (first + i) % 4 == 1 ? nextafterf(half, -INFINITY)
                             : (first + i) % 4 == 2 ? half
                                                    : nextafterf(half, INFINITY);
            put(strip.o0, few ? few_column(t, i) : i * lanes, 4, x);
        }
        (few ? t->stored->finish_few : t->stored->finish)(&strip, &out_at, NULL);
        for (int i = 0; i < dv; i++) {
            const double x = get(strip.o0, few ? few_column(t, i) : i * lanes, 4);
            if (isnan(x) ? !isnan(widen(f, out[i])) : out[i] != narrow(f, x)) {
                wrong++;
                at = x;
            }
        }
    }
    check(!wrong, "%d numbers are not rounded to the nearest %s%s, one of them %a", wrong, f->dtype,
          few ? " (few rows)" : "", at);
    release(&scratch);
}

/* 2^x, log, max */

#define CHUNK 16384
static _Alignas(64) char x_chunk[CHUNK * 8], y_chunk[CHUNK * 8], z_chunk[CHUNK * 8];
/* 2^x is high + low; a double is enough for float. */
static double exact_high[CHUNK], exact_low[CHUNK], ulp[CHUNK];

/* One chunk of x in [-126, 0] or [-1022, 0], n of them, against 2^x. */
static void check_exp2_chunk(struct target *targets, int count, int size, int n, int hashed) {
    for (int i = 0; i < n; i++) {
        const double x = get(x_chunk, i, size);
        const long double exact = size == 4 ? 0 : exp2l(x);
        exact_high[i] = size == 4 ? exp2(x) : (double)exact;
        exact_low[i] = size == 4 ? 0 : (double)(exact - exact_high[i]);
        ulp[i] = ldexp(1, (int)floor(x) - (size == 4 ? 23 : 52));
    }
    for (int i = n; i < CHUNK; i++) {
        put(x_chunk, i, size, 0);
    }
    for (int t = 0; t < count; t++) {
        targets[t].probe->exp2(x_chunk, y_chunk, CHUNK);
        double largest = 0;
        int at = 0, above_one = 0;
        for (int i = 0; i < n; i++) {
            const double y = get(y_chunk, i, size);
            const double error = fabs(y - exact_high[i] - exact_low[i]);
            above_one |= !(y <= 1);
            if (!(error <= largest * ulp[i])) {
                largest = error / ulp[i];
                at = i;
            }
        }
        targets[t].exp2_error = MAX(targets[t].exp2_error, largest);
        /* Without FMA each step rounds twice. For weights of bf16 there is a shorter polynomial. */
        const int pairs = targets[t].kernels->step > 1;
        check(largest <= (pairs                ? 128
                          : targets[t].has_fma ? 1
                                               : 1.25),
              "2^x is wrong by %.4g ulp at %a", largest, get(x_chunk, at, size));
        check(!above_one, "2^x above 1");
        if (hashed) {
            hash(&targets[t].bits, y_chunk, (size_t)CHUNK * size);
        }
    }
}

static void check_exp2(struct target *targets, int count, int size) {
    snprintf(what, sizeof(what), "%s 2^x", targets->kernels->dtype);
    random_state = 3;
    if (size == 4) {
        const uint32_t last = 0xc2fc0000, step = all ? 1 : 97; /* -126; -0 is 0x80000000 */
        int n = 0, chunk = 0;
        for (uint32_t bits = 0x80000000; bits <= last; bits += step) {
            memcpy(x_chunk + 4 * n++, &bits, 4);
            if (n == CHUNK || last - bits < step) {
                const int hashed = ++chunk % 10 == 0;
                if (hashed || !brief) {
                    check_exp2_chunk(targets, count, size, n, hashed);
                }
                n = 0;
            }
        }
        return;
    }
    const int chunks = all ? 6400 : brief ? 3 : 64;
    for (int chunk = 0; chunk < chunks; chunk++) {
        for (int i = 0; i < CHUNK; i++) {
            const double random = (random_value(8) - 1) / 2; /* [-1, 0) */
            double x = 1022 * random;
            if (chunk % 3 == 1) {
                x = ldexp(random, random_below(70) - 60);
            } else if (chunk % 3 == 2) {
                x = random_below(2045) * -0.5 * (1 + (random_below(9) - 4) * 0x1p-52);
            }
            put(x_chunk, i, size, MAX(-1022, MIN(x, 0)));
        }
        check_exp2_chunk(targets, count, size, CHUNK, chunk < 3);
    }
}

/* The ends of 2^x: what must be exact, what must vanish, and NaN whatever its payload. */
static void check_exp2_edges(const struct target *t, int size) {
    const int lowest = size == 4 ? -126 : -1022, mantissa = size == 4 ? 23 : 52;
    int n = 0, right = 1;
    for (int i = 0; i >= lowest; i--) {
        put(x_chunk, n++, size, i);
    }
    t->probe->exp2(x_chunk, y_chunk, CHUNK);
    for (int i = 0; i >= lowest; i--) {
        right &= get(y_chunk, -i, size) == ldexp(1, i);
    }
    check(right, "2^n is not exact for every whole n");

    put(x_chunk, 0, size, -0.0);
    put(x_chunk, 1, size, size == 4 ? -0x1p-149 : -0x1p-1074);
    put(x_chunk, 2, size, -INFINITY);
    put(x_chunk, 3, size, size == 4 ? -FLT_MAX : -DBL_MAX);
    put(x_chunk, 4, size, lowest - 1);
    put(x_chunk, 5, size, lowest - 0.500001);
    t->probe->exp2(x_chunk, y_chunk, CHUNK);
    check(get(y_chunk, 0, size) == 1 && get(y_chunk, 1, size) == 1, "2^0 is not 1");
    for (int i = 2; i < 6; i++) {
        const double y = get(y_chunk, i, size);
        check(y == 0 && !signbit(y), "2^%g is %g, not 0", get(x_chunk, i, size), y);
    }

    /* The half step below the smallest normal number: a subnormal number, rounded once, or 0. */
    for (int i = 0; i < CHUNK; i++) {
        put(x_chunk, i, size, lowest - (double)i / CHUNK);
    }
    t->probe->exp2(x_chunk, y_chunk, CHUNK);
    for (int i = right = 0; i < CHUNK; i++) {
        const double x = get(x_chunk, i, size), y = get(y_chunk, i, size);
        const long double error = fabsl((long double)y - exp2l((long double)x));
        right += (y == 0 && x <= lowest - 0.5) ||
                 error <= ldexpl(t->kernels->step > 1 ? 128 : 1, lowest - mantissa);
    }
    check(right == CHUNK, "%d values below 2^%d are wrong", CHUNK - right, lowest);

    /* NaN of either sign, each single payload bit, quiet and signalling, all ones, random. */
    n = 0;
    for (int negative = 0; negative < 2; negative++) {
        for (int i = 0; i < 400; i++) {
            const int width = size * 8;
            const uint64_t exponent = size == 4 ? 0x7f800000 : 0x7ff0000000000000;
            uint64_t payload = i < mantissa ? (uint64_t)1 << i : random_bits();
            payload = (i == mantissa ? ~(uint64_t)0 : payload) & (((uint64_t)1 << mantissa) - 1);
            const uint64_t bits =
                exponent | (payload ? payload : 1) | (uint64_t)negative << (width - 1);
            memcpy(x_chunk + size * n++, &bits, (size_t)size);
        }
    }
    t->probe->exp2(x_chunk, y_chunk, CHUNK);
    check(all_nan(y_chunk, 0, n, size), "2^NaN is not NaN for every payload");
    for (int i = 0; i < n; i++) {
        put(z_chunk, i, size, i % 2 ? -1.5 : -INFINITY);
    }
    t->probe->max(z_chunk, x_chunk, y_chunk, CHUNK);
    check(all_nan(y_chunk, 0, n, size), "v_max loses NaN in its second operand");
}

static void check_max(const struct target *t, int size) {
    static const double values[] = {-INFINITY, -3, -1e-30, 0, 1e-30, 2, INFINITY};
    const int n = COUNT(values);
    for (int i = 0; i < n * n; i++) {
        put(x_chunk, i, size, values[i / n]);
        put(z_chunk, i, size, values[i % n]);
    }
    t->probe->max(x_chunk, z_chunk, y_chunk, CHUNK);
    int right = 1;
    for (int i = 0; i < n * n; i++) {
        right &= get(y_chunk, i, size) == (double)(float)MAX(values[i / n], values[i % n]) ||
                 get(y_chunk, i, size) == MAX(values[i / n], values[i % n]);
    }
    check(right, "v_max is not the larger one");
}

/* log l of sums as they come: 1, near 1, near powers of two and their square roots, large. */
static void check_log(struct target *t, int turns) {
    long double largest = 0;
    double at = 1;
    random_state = 4;
    for (int i = 0; i < turns; i++) {
        const double random = (random_value(8) + 1) / 2;
        double l = 1 + random;
        if (i % 4 == 1) {
            l = 1 + ldexp(random, -random_below(50));
        } else if (i % 4 == 2) {
            l = ldexp(1 + random, random_below(60));
        } else if (i % 4 == 3) {
            l = (i & 4 ? sqrt(2) : 2) * (1 + ldexp(random - 0.5, -random_below(50)));
        }
        const long double true_log = logl((long double)l);
        const double got = t->probe->log_of_sum(l);
        int exponent;
        frexpl(true_log, &exponent);
        const long double error = fabsl((long double)got - true_log) / ldexpl(1, exponent - 53);
        if (true_log != 0 && !(error <= largest)) {
            largest = isnan(got) ? INFINITY : error;
            at = l;
        }
        hash(&t->bits, &got, sizeof(got));
    }
    t->log_error = (double)largest;
    check(largest <= 2.5, "log is wrong by %.4g ulp at %a", (double)largest, at);
    check(t->probe->log_of_sum(1) == 0, "log 1 is not 0");
    check(isnan(t->probe->log_of_sum(NAN)), "log NaN is not NaN");
}

#ifdef __linux__
/* A thread leaves a core that another one of the call has for one that none has, unless somebody
 * else may have that; where it may run is as before. */
static void check_cores(void) {
    cpu_set_t all, after;
    const int core = sched_getcpu();
    if (sched_getaffinity(0, sizeof(all), &all) != 0 || core < 0 || core >= CPU_SETSIZE ||
        CPU_COUNT(&all) < 2 || prctl(PR_GET_SECCOMP, 0, 0, 0, 0) != 0) {
        return;
    }
    int other = 0;
    while (other == core || !CPU_ISSET(other, &all)) {
        other++;
    }
    snprintf(what, sizeof(what), "cores");
    for (int may = 0; may < 2; may++) {
        int took = !may;
        /* The system may have moved it by chance. */
        for (int tries = 0; tries < 10 && took != may; tries++) {
            struct fc_cores cores = {{0}};
            for (int i = 0; i < CPU_SETSIZE; i++) {
                cores.taken[i / 64] |= (uint64_t)(i != other) << i % 64;
            }
            cpu_set_t here;
            CPU_ZERO(&here);
            CPU_SET(core, &here);
            sched_setaffinity(0, sizeof(here), &here);
            sched_setaffinity(0, sizeof(all), &all);
            if (may) {
                fc_shares_core(&cores);
                fc_leave_core(&cores, CPU_COUNT(&all));
                fc_shares_core(&cores);
            } else {
                fc_take_core(&cores, -1); /* so many are always runnable */
            }
            sched_getaffinity(0, sizeof(after), &after);
            check(CPU_EQUAL(&all, &after), "another affinity than before");
            took = cores.taken[other / 64] >> other % 64 & 1;
        }
        check(took == may, may ? "no other core was taken" : "a core was taken of somebody else");
    }
}
#endif

static const struct probe *find_probe(const char *arithmetic, const char *isa) {
    for (int i = 0; i < COUNT(probes); i++) {
        if (strcmp(probes[i]->arithmetic, arithmetic) == 0 && strcmp(probes[i]->isa, isa) == 0) {
            return probes[i];
        }
    }
    fprintf(stderr, "kernels_test: no probe_%s_%s.c\n", arithmetic, isa);
    exit(2);
}

/* `stored` keys and values. An arithmetic has queries and results of its own type. */
static void check_dtype(const char *stored, const char *arithmetic, const char *const *isas,
                        int show_bits) {
    struct target targets[8] = {{0}};
    int count = 0;
    for (int i = 0; isas[i]; i++) {
        /* An instruction set has tables of those after it: each table by its own name. */
        const struct fc_kernels *kernels = fc_find_kernels(arithmetic, isas[i]);
        if (!kernels || strcmp(kernels->isa, isas[i]) != 0) {
            continue;
        }
        struct target *t = &targets[count++];
        t->kernels = kernels;
        t->rows = fc_find_storage(arithmetic, arithmetic, kernels->isa);
        t->stored = fc_find_storage(stored, arithmetic, kernels->isa);
        if (!t->rows || !t->stored) {
            fprintf(stderr, "kernels_test: no %s storage for %s on %s here\n", stored, arithmetic,
                    kernels->isa);
            exit(2);
        }
        t->rows_format = find_format(arithmetic);
        t->stored_format = find_format(stored);
        t->probe = find_probe(arithmetic, kernels->isa);
        t->has_fma = strcmp(kernels->isa, "scalar") != 0;
        t->bits = 0xcbf29ce484222325;
    }
    if (!count) {
        return;
    }
    const int size = targets->kernels->real_size, turns = all ? 10 : 1;
    const int own = strcmp(stored, arithmetic) == 0;
    if (own) {
        check_exp2(targets, count, size);
    }
    for (int i = 0; i < count; i++) {
        struct target *t = &targets[i];
        snprintf(what, sizeof(what), "%s %s %s", stored, arithmetic, t->kernels->isa);
        if (own) {
            check_exp2_edges(t, size);
            check_max(t, size);
            check_log(t, 20000 * turns);
            check_see(t);
            check_merge(t, 0);
            check_merge(t, 1);
            check_no_columns(t);
            check_smallest_weights(t);
        } else {
            check_widening(t);
            check_widening_few(t);
        }
        for (int few = 0; few < 2 && t->stored_format; few++) {
            check_rounding(t, few);
        }
    }
    /* 5 has no divisor in common with the lengths. */
    check_tiles(targets, count, own ? 1 : 5, turns);
    check_spans(targets, count, own ? 1 : 2, turns);
    check_long_keys(targets, count, own ? 1 : 5, turns);
    if (own) { /* f16 has no numbers of such sizes */
        check_scales(targets, count);
    }

    const struct target *first = NULL;
    for (int i = 0; i < count; i++) {
        const struct target *t = &targets[i];
        const char *isa = t->kernels->isa;
        printf("%s_%s %-6s  ", stored, arithmetic, isa);
        if (own) {
            printf("2^x within %.4f ulp, log l within %.3f ulp; ", t->exp2_error, t->log_error);
        }
        printf("%.0f %% of the error bound used\n", 100 * t->bound_used);
        if (show_bits) {
            printf("bits %s_%s %s %016llx\n", stored, arithmetic, isa, (unsigned long long)t->bits);
        }
        first = first ? first : t->has_fma ? t : NULL;
        snprintf(what, sizeof(what), "%s %s %s", stored, arithmetic, isa);
        if (t->has_fma) {
            check(t->bits == first->bits, "other bits than %s", first->kernels->isa);
        }
    }
}

int main(int argc, char **argv) {
    const char *chosen[8] = {0};
    int show_bits = 0, count = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--all") == 0) {
            all = 1;
        } else if (strcmp(argv[i], "--brief") == 0) {
            brief = 1;
        } else if (strcmp(argv[i], "--bits") == 0) {
            show_bits = 1;
        } else if (argv[i][0] != '-' && count + 1 < COUNT(chosen)) {
            chosen[count++] = argv[i];
        } else {
            fprintf(stderr, "usage: %s [--bits] [--all | --brief] [instruction set ...]\n",
                    argv[0]);
            return 2;
        }
    }
    signal(SIGSEGV, fault);
    signal(SIGBUS, fault);
    signal(SIGILL, fault);
    map_areas();
    const char *const *isas = count ? chosen : fc_isas();
    for (int i = 0; isas[i]; i++) {
        /* Each has tables of its own, whatever it takes from those after it. */
        const struct fc_kernels *f32 = fc_find_kernels("f32", isas[i]);
        const struct fc_kernels *bf16 = fc_find_kernels("bf16", isas[i]);
        if (!(f32 && strcmp(f32->isa, isas[i]) == 0) &&
            !(bf16 && strcmp(bf16->isa, isas[i]) == 0)) {
            fprintf(stderr, "kernels_test: no kernels for %s here\n", isas[i]);
            return 2;
        }
    }
#ifdef __linux__
    check_cores();
#endif
    check_dtype("f32", "f32", isas, show_bits);
    check_dtype("f64", "f64", isas, show_bits);
    check_dtype("f16", "f32", isas, show_bits);
    check_dtype("bf16", "f32", isas, show_bits);
    check_dtype("bf16", "bf16", isas, show_bits); /* where there is any */
    printf("%ld passed, %ld failed\n", passed, failed);
    return failed != 0;
}
