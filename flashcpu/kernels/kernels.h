/* What the loop in _engine.pyx may ask of an instruction set: the arithmetic of a real type
 * (tile.inc) and the storage of a dtype (storage.inc, ring.inc; with few query rows,
 * decode.inc). Plain C, no SIMD here; the functions are written once, and compiled for each
 * instruction set in isa/.
 *
 * A strip is up to 3 vectors of query rows, one row in a lane; with few rows decode.inc has a
 * layout of its own. The kernels see a run of keys inside one span. Both lengths below are part of
 * the contract: they fix the order of every rounding. */
#ifndef FLASHCPU_KERNELS_H
#define FLASHCPU_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* The maximum is updated, and o and l are rescaled, once a block of keys (32, 128: as fast). */
#define FC_BLOCK 64
/* Every span of keys starts from (m, l, o) = (-inf, 0, 0); spans are merged left to right. Within a
 * span the sum of an output is one chain of roundings, so long spans are less exact. Largest error
 * in units of NumPy's, the worst of bench/accuracy.py, and share of the FMA rate at L = 2048, D =
 * 64: 1024: 2.2, 0.843   512: 1.6, 0.833   256: 1.3, 0.847. A merge costs as much as 2 keys. */
#define FC_SPAN 256
/* Vectors of query rows in a full strip. */
#define FC_NV 3
/* Bytes from a row's scores to the next row's, with few rows: those of a span, and a line more, or
 * the rows would stand in the same sets of L1. */
#define FC_FEW_STRIDE(real_size) (FC_SPAN * (real_size) + FC_ALIGN)
/* Columns of few packed query rows: d, filled up to whole pieces of K, 16 bytes of any type. */
#define FC_FEW_COLUMNS(d) (((d) + 7) / 8 * 8)
/* What the workspace is aligned to, in bytes: unaligned scratch cost AVX2 a third of its speed. */
#define FC_ALIGN 64

/* One strip: its packed queries, the state of its streaming softmax, the scores of one tile.
 * Row strides are nv * lanes numbers of the real type; decode.inc lays out qt, s and o otherwise.
 */
struct fc_strip {
    int nq, nv, d, dv;  /* query rows, vectors that hold them, lengths of a query and a value */
    int fresh;          /* the span has just been started: o is 0, whatever its memory holds */
    int mixes;          /* memory is faster in mixed order: fc_mixes() */
    int cold;           /* the first tile of an item of which nothing has been fetched yet */
    int one_load;       /* of a vector of 64 bytes for two products: fc_pipes() is FC_ONE_LOAD */
    int64_t rows_left;  /* rows of K and V from the first of this tile on that will be read */
    const void *next_k; /* what is read after the last of them, or NULL */
    const void *next_v;
    double scale;       /* of the scores, times log2 e */
    void *qt;           /* [d][nv*W] queries, transposed, times scale * log2 e (storage.inc) */
    void *m, *l, *o;    /* [nv*W], [nv*W], [dv][nv*W]: the span that is being streamed */
    void *m0, *l0, *o0; /* the same of all spans before it, merged */
    void *s;            /* [nk][nv*W] scores of the tile, then its weights */
    void *alpha;        /* [blocks][nv*W] block maxima of the tile, then rescale factors */
    void *end;          /* [nv*W] first key of the tile that the row does not see */
    /* Rows that are read next, which a kernel of tile.inc fetches while it works; or none. */
    const char *soon;
    ptrdiff_t soon_stride; /* bytes */
    int soon_rows, soon_bytes;
};

/* What a CPU begins in a cycle, of vectors of 64 bytes: one product, two products and as many
 * loads, two products and little more than one load (cpu.c). */
enum { FC_ONE_PRODUCT, FC_TWO_PRODUCTS, FC_ONE_LOAD, FC_PIPES };

/* How a dtype is stored, and moved into and out of an arithmetic. */
struct fc_storage {
    const char *dtype, *arithmetic, *isa;
    int elem_size; /* bytes of a stored element */
    /* for so many query rows the kernels for few are faster: shares of the lanes of the vectors
     * that would hold them, of one vector, two, ... a strip's, and of more; for CPUs of each kind
     * of pipes (fc_pipes) */
    double few_shares[FC_PIPES][FC_NV + 1];

    /* qt <- scale * rows; one pointer a lane, also for lanes beyond nq (to any row) */
    void (*pack)(const struct fc_strip *, const void *const *rows);
    /* out <- o0 / l0, lse (real) <- m0 ln 2 + log l0; one pointer a row, lse may be NULL */
    void (*finish)(const struct fc_strip *, void *const *out, void *const *lse);
    /* nk rows of K or V for the arithmetic: densely, or in panels of `panel` columns */
    void (*stage_rows)(void *dst, const void *src, ptrdiff_t ld, int nk, int d);
    void (*stage_panels)(void *dst, const void *src, ptrdiff_t ld, int nk, int d);
    /* The steps of fc_kernels for K and V as they are stored, which come block by block (ring.inc):
     * for rows of whole lines of so many elements, at least one, and strips of at most so many
     * vectors; 0 and NULL where none do */
    int line, ring_k, ring_v;
    void (*scores)(const struct fc_strip *, const void *k, ptrdiff_t ldk, int nk, int full);
    void (*accumulate)(const struct fc_strip *, const void *v, ptrdiff_t ldv, ptrdiff_t panel,
                       int nk, int full);
    /* the same steps for few query rows (decode.inc), K and V as they are stored */
    void (*pack_few)(const struct fc_strip *, const void *const *rows);
    void (*scores_few)(const struct fc_strip *, const void *k, ptrdiff_t ldk, int nk, int full);
    void (*accumulate_few)(const struct fc_strip *, const void *v, ptrdiff_t ldv, ptrdiff_t panel,
                           int nk, int full);
    void (*finish_few)(const struct fc_strip *, void *const *out, void *const *lse);
};

/* An arithmetic: in f32, in f64, or bf16: products of bf16 numbers, in pairs, summed in f32. */
struct fc_kernels {
    const char *dtype, *isa;
    int lanes;     /* W: query rows in a vector */
    int panel;     /* columns of V in a staged panel */
    int step;      /* numbers that enter a product together: K and V are staged in such units */
    int real_size; /* bytes of a computed number, and of a unit */

    /* (m, l) <- (-inf, 0); set `fresh` for o */
    void (*start_span)(const struct fc_strip *);
    /* end <- how many keys of the tile at k0 each row sees, when its keys end at row_end */
    void (*see)(const struct fc_strip *, const int64_t *row_end, int64_t k0);
    /* s <- K qt and block maxima; keys from `full` on are compared with `end` */
    void (*scores)(const struct fc_strip *, const void *k, ptrdiff_t ldk, int nk, int full);
    /* s <- weights; alpha, m, l follow */
    void (*softmax)(const struct fc_strip *, int nk, int full);
    /* o <- alpha o + V^T weights; columns of V come in panels, `panel` elements apart */
    void (*accumulate)(const struct fc_strip *, const void *v, ptrdiff_t ldv, ptrdiff_t panel,
                       int nk, int full);
    /* (m0, l0, o0) <- merge of (m0, l0, o0) and (m, l, o) */
    void (*merge)(const struct fc_strip *);
    /* the same for few query rows */
    void (*softmax_few)(const struct fc_strip *, int nk, int full);
    void (*merge_few)(const struct fc_strip *);

    /* for benchmarks: limits.inc */
    double (*fma_loop)(long turns); /* returns how many flops it did */
    double (*read_loop)(const void *from, size_t bytes, int mixes);
    void (*flush_loop)(const void *from, size_t bytes);
};

/* Instruction sets this build has for this CPU, the largest first, ended by NULL (cpu.c). */
const char *const *fc_isas(void);
/* The one of them to use unless another is asked for. */
const char *fc_fastest_isa(void);
/* The tables, or NULL when this CPU or build does not have them. An instruction set has those of
 * the ones after it too, where it has none of its own. */
const struct fc_storage *fc_find_storage(const char *dtype, const char *arithmetic,
                                         const char *isa);
const struct fc_kernels *fc_find_kernels(const char *arithmetic, const char *isa);
/* Which kind this CPU is: FC_ONE_PRODUCT, FC_TWO_PRODUCTS, FC_ONE_LOAD. */
int fc_pipes(void);
/* Whether this CPU reads memory faster in mixed order (fetch.inc). */
int fc_mixes(void);

#endif
